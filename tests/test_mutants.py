"""Judgements on mutants belong to lines that exist: see benchmarks/mutants.py."""

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
JUDGED = json.loads((ROOT / "benchmarks" / "mutation" / "equivalent.json").read_text("utf-8"))


@pytest.mark.parametrize("judgement", JUDGED, ids=lambda judgement: f"{judgement['file']}: {judgement['added']}")
def test_a_judged_line_still_stands_in_its_file(judgement: dict[str, Any]) -> None:
    source = (ROOT / "src" / "unsloth_spectral" / judgement["file"]).read_text("utf-8")
    assert " ".join(judgement["removed"].split()) in " ".join(source.split())
    assert judgement["reason"]
