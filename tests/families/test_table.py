"""docs/models.md has the rows and columns of the matrix, and the results of the tests."""

import json
from pathlib import Path

import pytest
import transformers
from families.matrix import WAYS
from families.models import FAMILIES
from families.table import MARKS, NOT_RUN, page, table

pytest_plugins = ("pytester",)
COMMITTED = Path(__file__).parents[2] / "docs" / "models.md"


def cells_of(text: str) -> dict[str, dict[str, str]]:
    """Marks by family and column of the table in ``text``."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    header, _, *rows = ([part.strip() for part in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


def test_the_committed_table_lists_the_families_and_ways() -> None:
    text = COMMITTED.read_text(encoding="utf-8")
    cells, is_of_this_release = cells_of(text), f"with transformers {transformers.__version__} " in text
    assert list(cells) == list(FAMILIES), "run `make models`"
    for family, row in cells.items():
        assert list(row) == ["rebuilt", *WAYS], "run `make models`"
        rebuilt = row.pop("rebuilt")
        if is_of_this_release:
            assert rebuilt == ("yes" if FAMILIES[family].is_materialised else "")
        assert set(row.values()) <= set(MARKS.values()), f"{family} has cells that were not run: run `make models`"
        assert (set(row.values()) == {MARKS["unsupported"]}) == (FAMILIES[family].refusal is not None)


def test_the_page_says_what_was_recorded() -> None:
    cells = cells_of(
        page({"Llama": {"greedy": "works", "crop": "fails"}, "Bamba": {"crop": "refused by transformers"}})
    )
    assert cells["Llama"]["greedy"] == "✓"
    assert cells["Llama"]["crop"] == "**fails**"
    assert cells["Bamba"]["crop"] == "–"
    assert cells["Qwen2"]["greedy"] == NOT_RUN
    assert cells["OpenAI GPT"]["greedy"] == NOT_RUN
    assert len(table({}).splitlines()) == len(FAMILIES) + 2


def test_a_failing_cell_is_recorded_as_such(pytester: pytest.Pytester) -> None:
    pytester.makeconftest((Path(__file__).parent / "conftest.py").read_text(encoding="utf-8"))
    pytester.makepyfile(
        """
        def test_one(cell):
            cell("Llama", "greedy", "works")

        def test_two(cell):
            cell("Llama", "crop", "works")
            raise AssertionError

        def test_three(cell):
            cell("Llama", "crop", "works")

        def test_no_such_way(cell):
            cell("Llama", "by hand", "works")
        """
    )
    result = pytester.runpytest_inprocess("--matrix", "found.json")
    result.assert_outcomes(passed=2, failed=2)
    assert json.loads((pytester.path / "found.json").read_text()) == {"Llama": {"greedy": "works", "crop": "fails"}}
