"""Processes that have loaded Unsloth, one at a time."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("case.py")


class Loaded:
    """Unsloth in a process, loaded for ``way`` with ``environment``; it runs cases in forks."""

    def __init__(self, way: str, environment: dict[str, str], folder: Path) -> None:
        self._log = folder / "loading.txt"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(SCRIPT), way],
                env={**os.environ, **environment, "UNSLOTH_COMPILE_LOCATION": str(folder / "compiled")},
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._answer("LOADED")

    def run(self, folder: Path, **case: Any) -> dict[str, Any]:
        """Run a case in ``folder`` and return its result."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({**case, "folder": str(folder)}) + "\n")
        self._process.stdin.flush()
        status = self._answer("ENDED")
        assert status == "0", f"exit status {status}: {(folder / 'output.txt').read_text()[-4000:]}"
        result: dict[str, Any] = json.loads((folder / "result.json").read_text())
        return result

    def _answer(self, word: str) -> str:
        assert self._process.stdout is not None
        # Unsloth prints to the same stream while it loads.
        for line in self._process.stdout:
            if line.startswith(word + " "):
                return line.removeprefix(word).strip()
        raise AssertionError(f"Unsloth's process ended without {word}: {self._log.read_text()[-4000:]}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


class Current:
    """The process of the last case, kept for the next one that wants the same."""

    def __init__(self) -> None:
        self._key: object = None
        self._process: Loaded | None = None

    def get(self, way: str, environment: dict[str, str], folder: Path) -> Loaded:
        key = (way, environment)
        if self._process is None or key != self._key:
            self.close()
            self._process, self._key = Loaded(way, environment, folder), key
        return self._process

    def close(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None
