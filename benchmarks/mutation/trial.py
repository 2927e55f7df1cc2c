"""A trial of a mutant: tests run in a forked process, on a private copy of the tree."""

import multiprocessing
import os
import resource
import shutil
import signal
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import hypothesis  # noqa: F401
import pytest
from transformers import LlamaForCausalLM  # noqa: F401

# A mutant that asks for more has failed; a process with torch in it maps about four.
MEMORY = 12 << 30
OPTIONS = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--hypothesis-seed=0"]


@dataclass(slots=True, eq=False)  # pytest wants plugins hashable
class Recorder:
    """A plugin of pytest that keeps the first failure and the seconds that each test file takes."""

    failure: str | None = None
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid.partition("::")[0]] += report.duration
        if report.failed:
            self.failure = self.failure or report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failure = self.failure or f"{report.nodeid} (import)"


def copy_tree(root: Path, copy: Path) -> None:
    """Copy what tests need."""
    for folder in ("src", "tests"):
        shutil.copytree(root / folder, copy / folder)
    shutil.copy2(root / "pyproject.toml", copy)


def run_tests(copy: Path, tests: list[str], timeout: float, keep_bytecode: bool = False) -> Recorder:
    """Run ``tests`` of the tree ``copy`` until one fails.

    Forked, because this process has imported torch and transformers: they take longer than most tests.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_here, args=(sender, copy, tests, keep_bytecode))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(timeout) else Recorder("timeout")
    except EOFError:
        return Recorder("crash")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()


def _run_here(sender: Connection, copy: Path, tests: list[str], keep_bytecode: bool) -> None:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = sys.path[0] = str(copy / "src")
    # Bytecode is found by size and second of its source: two mutants may share both.
    sys.dont_write_bytecode = not keep_bytecode
    for name in [name for name in sys.modules if name.partition(".")[0] == "unsloth_spectral"]:
        del sys.modules[name]
    recorder = Recorder()
    code = pytest.main([*OPTIONS, *tests], plugins=[recorder])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        recorder.failure = recorder.failure or "pytest does not start"
    sender.send(recorder)
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
