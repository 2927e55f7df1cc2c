"""A seeded sample of mutants: one at most for each place in the source that cosmic-ray's operators can change."""

import ast
import difflib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

Position = tuple[int, int]
BITWISE = {"RShift", "LShift", "BitOr", "BitAnd", "BitXor"}


@dataclass(frozen=True, slots=True)
class Mutant:
    """A file with one change. ``removed`` and ``added`` are the changed lines and identify the mutant in its file."""

    file: str
    line: int
    operator: str
    removed: str
    added: str
    code: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.file, self.removed, self.added


@dataclass(frozen=True, slots=True)
class Change:
    """The n-th place in a file where an operator can change it."""

    operator: str
    occurrence: int


def sample(root: Path, files: list[str], seed: int, size: int) -> list[Mutant]:
    """``size`` mutants of ``files``, names relative to ``root``, in the order of the files.

    Places and changes are ranked by a hash of their own text, so that most of a sample stays when other lines change.
    """
    sources = {file: (root / file).read_text(encoding="utf-8") for file in files}
    places = {(file, position): changes for file in files for position, changes in changes_of(sources[file]).items()}

    def rank(*parts: object) -> str:
        return hashlib.sha256(repr((seed, *parts)).encode()).hexdigest()

    def rank_of_place(place: tuple[str, Position]) -> str:
        file, (line, column) = place
        return rank(file, sources[file].splitlines()[line - 1].strip(), column)

    chosen: dict[tuple[str, str, str], Mutant] = {}
    for place in sorted(places, key=rank_of_place):
        file, (line, _) = place
        changes = places[place]
        for index in sorted(range(len(changes)), key=lambda index: rank(rank_of_place(place), index)):
            mutant = apply(changes[index], file, line, sources[file])
            if mutant is not None:
                chosen.setdefault(mutant.key, mutant)
                break
        if len(chosen) == size:
            break
    return sorted(chosen.values(), key=lambda mutant: (mutant.file, mutant.line))


def changes_of(source: str) -> dict[Position, list[Change]]:
    """The changes that can be made at each place, without those that no test can be expected to see."""
    hidden = list(hidden_spans(ast.parse(source)))
    nodes = list(ast_nodes(get_ast(source)))
    places: dict[Position, list[Change]] = {}
    for name in operator_names():
        # Operators with arguments want names of variables.
        if get_operator(name).arguments() or mixes_bits_and_numbers(name):
            continue
        operator = get_operator(name)()
        positions = [start for node in nodes for start, _ in operator.mutation_positions(node)]
        for occurrence, start in enumerate(positions):
            if not any(first <= start < last for first, last in hidden):
                places.setdefault(start, []).append(Change(name, occurrence))
    return places


def mixes_bits_and_numbers(operator: str) -> bool:
    """True if the operator exchanges ``>>`` and ``-`` or the like, which raises a TypeError on tensors in any test."""
    _, *exchanged = operator.split("_")
    return "ReplaceBinaryOperator" in operator and len(BITWISE.intersection(exchanged)) == 1


def hidden_spans(tree: ast.Module) -> Iterator[tuple[Position, Position]]:
    """Annotations, assertions, raised errors, formatted texts, log messages and ``__all__``."""
    for node in ast.walk(tree):
        hidden: list[ast.AST | None] = []
        match node:
            case ast.arg(annotation=annotation) | ast.AnnAssign(annotation=annotation):
                hidden = [annotation]
            case ast.FunctionDef(returns=returns):
                hidden = [returns]
            case ast.Raise() | ast.Assert() | ast.JoinedStr() | ast.Assign(targets=[ast.Name(id="__all__")]):
                hidden = [node]
            case ast.Call(func=ast.Name(id="warn_once") | ast.Attribute(value=ast.Name(id="logger"))):
                hidden = [node]
        for part in hidden:
            if isinstance(part, ast.expr | ast.stmt):
                yield (part.lineno, part.col_offset), (part.end_lineno or 0, part.end_col_offset or 0)


def apply(change: Change, file: str, line: int, source: str) -> Mutant | None:
    """The mutant, or None where the change makes no other program or no program at all."""
    code = mutate_code(source, get_operator(change.operator)(), change.occurrence)
    try:
        if ast.dump(ast.parse(code)) == ast.dump(ast.parse(source)):
            return None
    except SyntaxError:
        return None
    lines = list(difflib.unified_diff(source.splitlines(), code.splitlines(), n=0, lineterm=""))[2:]
    removed, added = (" ".join(text[1:].strip() for text in lines if text[0] == sign).strip() for sign in ("-", "+"))
    return Mutant(file, line, change.operator.partition("/")[2], removed, added, code)
