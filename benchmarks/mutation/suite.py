"""The tests that can kill a mutant: those that reach its lines, the nearest first."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from coverage import CoverageData

SLOW_SECONDS = 30


@dataclass(frozen=True, slots=True)
class Suite:
    """Tests with the seconds that each takes on the source as it is, and the lines of ``package`` that they reach."""

    package: Path
    seconds: dict[str, float]
    reached: CoverageData

    def stages(self, file: str, line: int) -> Iterator[tuple[list[str], float]]:
        """Tests for a line of a source file, with a time limit: first those of its own test file, then the others.

        Slow test files of other folders are left out.
        """
        mirroring_file = str(Path("tests", file).with_name(f"test_{Path(file).name}"))
        folder, top = str(Path("tests", file).parent), f"tests/{Path(file).parts[0]}/"
        by_file: dict[str, list[str]] = defaultdict(list)
        for test in self.reaching(file, line):
            by_file[test.partition("::")[0]].append(test)

        def seconds_of(test_file: str) -> float:
            return sum(self.seconds[test] for test in by_file[test_file])

        def distance(test_file: str) -> tuple[bool, bool, float]:
            return str(Path(test_file).parent) != folder, not test_file.startswith(top), seconds_of(test_file)

        near = [name for name in by_file if name.startswith(top) or seconds_of(name) < SLOW_SECONDS]
        others = sorted((name for name in near if name != mirroring_file), key=distance)
        for test_files in ([mirroring_file], others):
            tests = [test for name in test_files for test in sorted(by_file[name], key=lambda test: self.seconds[test])]
            if tests:
                yield tests, 30 + 5 * sum(self.seconds[test] for test in tests)

    def reaching(self, file: str, line: int) -> list[str]:
        """The tests that run the statement at ``line``; all of them where importing the file runs it."""
        path = self.package / file
        contexts_by_line = self.reached.contexts_by_lineno(str(path))
        lines = statement_lines(ast.parse(path.read_text(encoding="utf-8")), line)
        contexts = {context for number in lines for context in contexts_by_line.get(number, [])}
        tests = contexts & self.seconds.keys()
        return sorted(self.seconds if contexts and not tests else tests)


def statement_lines(tree: ast.Module, line: int) -> range:
    """The lines of the innermost statement at ``line``: of a compound one the head, of a decorated one all."""
    lines = range(line, line + 1)
    for node in ast.walk(tree):  # outer ones first
        if not isinstance(node, ast.stmt):
            continue
        decorators: list[ast.expr] = getattr(node, "decorator_list", [])
        first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
        last = node.end_lineno or node.lineno
        if not first <= line <= last:
            continue
        body: list[ast.stmt] = getattr(node, "body", [])
        if body and line >= node.lineno:
            last = max(node.lineno, body[0].lineno - 1)
        lines = range(first, last + 1)
    return lines
