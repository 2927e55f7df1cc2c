"""Records the result of each cell of the matrix: ``pytest tests/families --matrix FILE``."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from families.matrix import WAYS
from families.models import FAMILIES
from transformers.utils import logging

FAILS = "fails"
_PROPERTY = "matrix cell"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", metavar="FILE", help="write what each family and way of generating came to, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--matrix", default=None)
    if path is not None:
        config.pluginmanager.register(Recorder(Path(path)))


class Recorder:
    """Collects the cells of a run; one that fails anywhere fails."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cells: dict[str, dict[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name == _PROPERTY and (report.when == "call" or report.failed):
                family, way, outcome = value
                row = self._cells.setdefault(family, {})
                if row.get(way) != FAILS:
                    row[way] = FAILS if report.failed else outcome

    def pytest_sessionfinish(self) -> None:
        self._path.write_text(json.dumps(self._cells, indent=1) + "\n", encoding="utf-8")


@pytest.fixture
def cell(record_property: Callable[..., None]) -> Callable[..., None]:
    """``cell(family, way, outcome)`` says which cell of the matrix a test fills."""

    def record(family: str, way: str, outcome: str) -> None:
        assert family in FAMILIES
        assert way in WAYS
        record_property(_PROPERTY, (family, way, outcome))

    return record


@pytest.fixture(autouse=True)
def _quiet_library() -> None:
    """Warnings about the unusual sizes of tiny models are ignored."""
    logging.set_verbosity_error()
