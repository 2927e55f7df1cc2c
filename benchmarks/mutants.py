"""Mutation tests of codec, cache and attention: does a test fail when one operator, number or condition is changed?

Each mutant runs against the tests that reach its line, those of its own test file first. A mutant that no test
kills needs a new test, or a line in benchmarks/mutation/equivalent.json that says why nobody can notice it.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from coverage import CoverageData
from harness import RESULTS, Target, finish, write
from mutation.sample import Mutant, sample
from mutation.suite import Suite
from mutation.trial import copy_tree, measure, mutated, run_tests

from unsloth_spectral.eval.environment import version_of
from unsloth_spectral.files import check_target

ROOT = Path(__file__).parents[1]
PACKAGE = Path("src/unsloth_spectral")
FOLDERS = ("codec", "cache", "attention")
# These run in Triton's interpreter alone, in another environment: `make test-triton`.
LEFT_OUT = ("attention/gpu.py", "attention/gpu_kernels.py")
OTHER_TESTS = ("tests/integrations/test_spectral_codec.py",)
JUDGED = Path(__file__).parent / "mutation" / "equivalent.json"
EXAMPLE = "example: python benchmarks/mutants.py --seed 1 --sample 20 --json /tmp/mutants.json"

Key = tuple[str, str, str]
# Names of tests, and a time limit for all of them.
Stages = list[tuple[list[str], float]]


def measured_suite(copy: Path, coverage_file: Path) -> Suite:
    """Run every test on the unchanged source.

    Raises:
        SystemExit: one fails.
    """
    outcome = measure(copy, [*(f"tests/{folder}" for folder in FOLDERS), *OTHER_TESTS], coverage_file)
    if outcome.failure:
        sys.exit(f"{outcome.failure} fails on the source as it is: mend it first")
    print(f"{len(outcome.seconds)} tests take {sum(outcome.seconds.values()):.0f} s on the source as it is")
    reached = CoverageData(basename=str(coverage_file))
    reached.read()
    return Suite(copy / PACKAGE, outcome.seconds, reached)


def attempt(mutant: Mutant, stages: Stages) -> tuple[str | None, float]:
    """The test that kills ``mutant``, or None, and the seconds it took. Runs in a worker, on the worker's copy."""
    started = time.perf_counter()
    with mutated(_copy / PACKAGE / mutant.file, mutant.code):
        failures = (run_tests(_copy, tests, limit).failure for tests, limit in stages)
        killer = next((failure for failure in failures if failure), None)
    return killer, time.perf_counter() - started


_copy = Path()


def take_copy(copies: "multiprocessing.SimpleQueue[Path]") -> None:
    """Give this worker a copy of the tree that nothing else changes."""
    global _copy
    _copy = copies.get()


def try_all(mutants: list[Mutant], workers: int) -> Iterator[tuple[Mutant, str | None, float]]:
    """Each mutant with the test that kills it and the seconds it took, in the order in which they finish."""
    if not mutants:
        return
    context = multiprocessing.get_context("fork")
    copies: multiprocessing.SimpleQueue[Path] = context.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        for number in range(workers):
            copy_tree(ROOT, Path(folder, str(number)))
            copies.put(Path(folder, str(number)))
        suite = measured_suite(Path(folder, "0"), Path(folder, "coverage"))
        with ProcessPoolExecutor(workers, context, take_copy, (copies,)) as pool:
            stages = {mutant: list(suite.stages(mutant.file, mutant.line)) for mutant in mutants}
            trials = {pool.submit(attempt, mutant, stages[mutant]): mutant for mutant in mutants}
            for trial in as_completed(trials):
                yield trials[trial], *trial.result()


def record_of(mutant: Mutant, killer: str | None, judged: dict[Key, str]) -> dict[str, Any]:
    """A mutant as the results file keeps it."""
    record = {
        "file": mutant.file,
        "line": mutant.line,
        "operator": mutant.operator,
        "removed": mutant.removed,
        "added": mutant.added,
    }
    if killer:
        return {**record, "outcome": "killed", "by": killer}
    if reason := judged.get(mutant.key):
        return {**record, "outcome": "equivalent", "reason": reason}
    return {**record, "outcome": "survived"}


def key_of(record: dict[str, Any]) -> Key:
    return record["file"], record["removed"], record["added"]


def earlier_kills(path: Path) -> dict[Key, str]:
    """The mutants that the results file says were killed, and by which test."""
    if not path.exists():
        return {}
    mutants = json.loads(path.read_text(encoding="utf-8"))["mutants"]
    return {key_of(record): record["by"] for record in mutants if record["outcome"] == "killed"}


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=RESULTS / "mutants.json", help="where the results go")
    parser.add_argument("--seed", type=int, default=0, help="another seed takes another sample")
    parser.add_argument("--sample", type=int, default=200, help="number of mutants")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="mutants tried at once")
    parser.add_argument("--resume", action="store_true", help="believe the results file's kills and the judgements")
    parsed = parser.parse_args()
    check_target(parsed.json, (".json",))
    return parsed


def main() -> None:
    options = parsed_arguments()
    package = ROOT / PACKAGE
    files = [
        str(path.relative_to(package))
        for folder in FOLDERS
        for path in sorted((package / folder).rglob("*.py"))
        if str(path.relative_to(package)) not in LEFT_OUT
    ]
    judged = {key_of(record): record["reason"] for record in json.loads(JUDGED.read_text(encoding="utf-8"))}
    mutants = sample(package, files, options.seed, options.sample)
    killers: dict[Key, str | None] = dict(earlier_kills(options.json) if options.resume else {})
    if options.resume:
        killers |= {mutant.key: None for mutant in mutants if mutant.key in judged}
    left = [mutant for mutant in mutants if mutant.key not in killers]
    print(f"{len(mutants)} mutants of {len(files)} files, {len(left)} to try")

    def results() -> dict[str, Any]:
        records = [record_of(mutant, killers[mutant.key], judged) for mutant in mutants if mutant.key in killers]
        return {
            "benchmark": "mutants",
            "command": "make mutants",
            "cosmic_ray": version_of("cosmic-ray"),
            "seed": options.seed,
            "sample": options.sample,
            "left_out": LEFT_OUT,
            "counts": Counter(record["outcome"] for record in records),
            "mutants": records,
        }

    for number, (mutant, killer, seconds) in enumerate(try_all(left, options.workers), 1):
        killers[mutant.key] = killer
        outcome = record_of(mutant, killer, judged)["outcome"]
        print(f"{number:>4}/{len(left)} {seconds:4.0f} s {outcome:>10}  {mutant.file}:{mutant.line}  {mutant.added}")
        write(options.json, results(), [])
    records = results()
    survivors = [record for record in records["mutants"] if record["outcome"] == "survived"]
    for record in survivors:
        print(f"SURVIVED  {record['file']}:{record['line']}\n  - {record['removed']}\n  + {record['added']}")
    for record in records["mutants"]:
        if record["outcome"] == "killed" and key_of(record) in judged:
            print(f"JUDGED EQUIVALENT, BUT KILLED  {record['file']}:{record['line']}  {record['added']}")
    target = Target("survivors without a judgement", 0, len(survivors), at_least=False)
    finish(options.json, records, [target])
    sys.exit(0 if target.met else 1)


if __name__ == "__main__":
    main()
