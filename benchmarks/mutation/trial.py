"""A trial of a mutant: tests run in a forked process, on a private copy of the tree."""

import multiprocessing
import os
import resource
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import hypothesis  # noqa: F401
import pytest
from coverage import Coverage
from transformers import LlamaForCausalLM  # noqa: F401

# A mutant that asks for more has failed; a process with torch in it maps about four.
MEMORY = 12 << 30
OPTIONS = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--hypothesis-seed=0"]


@dataclass(slots=True, eq=False)  # pytest wants plugins hashable
class Recorder:
    """A plugin of pytest that runs the tests of ``order`` in its order, or all tests where it is empty.

    Attributes:
        failure: the first test that fails, None where all pass.
        seconds: by test.
    """

    order: dict[str, int]
    coverage: Coverage | None = None
    failure: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.order:
            known = [item for item in items if item.nodeid in self.order]
            items[:] = sorted(known, key=lambda item: self.order[item.nodeid])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if self.coverage:
            self.coverage.switch_context(nodeid)

    def pytest_runtest_logfinish(self) -> None:
        if self.coverage:
            self.coverage.switch_context("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failure = self.failure or report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failure = self.failure or f"{report.nodeid} (import)"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The first test that failed, None where all passed, and the seconds that each took."""

    failure: str | None
    seconds: dict[str, float]


def copy_tree(root: Path, copy: Path) -> None:
    """Copy what tests need."""
    for folder in ("src", "tests"):
        shutil.copytree(root / folder, copy / folder)
    shutil.copy2(root / "pyproject.toml", copy)


def measure(copy: Path, paths: Sequence[str], coverage_file: Path) -> Outcome:
    """Run all tests of ``paths`` on the tree ``copy`` and write which lines each of them reaches."""
    return _forked(copy, paths, {}, 3600, coverage_file)


def run_tests(copy: Path, tests: Sequence[str], timeout: float) -> Outcome:
    """Run ``tests``, named as pytest names them, of the tree ``copy`` in their order until one fails."""
    files = dict.fromkeys(test.partition("::")[0] for test in tests)
    return _forked(copy, list(files), {test: place for place, test in enumerate(tests)}, timeout, None)


def _forked(
    copy: Path, paths: Sequence[str], order: dict[str, int], timeout: float, coverage_file: Path | None
) -> Outcome:
    """Run pytest in a fork of this process, which has imported torch and transformers: that takes longer than most
    tests."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_here, args=(sender, copy, paths, order, coverage_file))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(timeout) else Outcome("timeout", {})
    except EOFError:
        return Outcome("crash", {})
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()


def _run_here(
    sender: Connection, copy: Path, paths: Sequence[str], order: dict[str, int], coverage_file: Path | None
) -> None:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = sys.path[0] = str(copy / "src")
    # Bytecode is found by size and second of its source: two mutants may share both.
    sys.dont_write_bytecode = coverage_file is None
    for name in [name for name in sys.modules if name.partition(".")[0] == "unsloth_spectral"]:
        del sys.modules[name]
    coverage = Coverage(data_file=str(coverage_file), source=[str(copy / "src")]) if coverage_file else None
    recorder = Recorder(order, coverage)
    if coverage:
        coverage.start()
    code = pytest.main([*OPTIONS, *paths], plugins=[recorder])
    if coverage:
        coverage.stop()
        coverage.save()
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        recorder.failure = recorder.failure or "pytest does not start"
    sender.send(Outcome(recorder.failure, recorder.seconds))
    os._exit(0)


@contextmanager
def mutated(path: Path, code: str) -> Iterator[None]:
    """``path`` holds ``code`` within the block."""
    original, times = path.read_bytes(), path.stat()
    path.write_text(code, encoding="utf-8")
    try:
        yield
    finally:
        path.write_bytes(original)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
