"""Records the result of each case: ``pytest tests/real_unsloth --cases FILE``."""

import json
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from unsloth_spectral.files import replacing

_PACKAGES = ("unsloth", "unsloth_zoo", "transformers", "torch", "peft", "triton", "bitsandbytes")
CASE = "case"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", metavar="FILE", help="write the checks that each case passed and failed, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--cases", default=None)
    # Workers report to the process that started them.
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(Path(path)))


class Recorder:
    """Collects the cases of a run, and writes them at its end with the versions they ran with."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cases: dict[str, Any] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self._cases.update(value for name, value in report.user_properties if name == CASE)

    def pytest_sessionfinish(self) -> None:
        if not self._cases:
            return
        record = {
            "command": "make test-unsloth",
            "date": date.today().isoformat(),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in _PACKAGES},
            "cases": dict(sorted(self._cases.items())),
        }
        with replacing(self._path) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
