"""Results folders: means, frontiers of comparable methods, and the name of a damaged file in its error."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from fake_results import FAMILIES, write_results

from unsloth_spectral.errors import LoadError
from unsloth_spectral.eval.metrics import best_of, figure_text, lower_is_better, primary_metric
from unsloth_spectral.eval.results import Mean, Point, frontier, read_results


def line(method: str, case: str, kl: float | None, bits: float | None = 2.0, **others: Any) -> dict[str, Any]:
    line: dict[str, Any] = {"task": "fidelity", "method": method, "family": method.split()[0], "case": case}
    footprint = {"stored_bytes": 10, "dense_bytes": 40, "cold_bits_per_element": bits}
    line |= {"metrics": {} if kl is None else {"kl": kl}, "footprint": footprint, "series": {}, "seconds": 2}
    return {**line, **others}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = {"model": "m", "settings": {}, "tasks": ["fidelity"], "methods": ["dense", "kivi 2", "kivi 4"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "environment.json").write_text("{}")
    write(tmp_path, line("kivi 4", "a", 0.1), line("dense", "a", 0.0, None), line("kivi 4", "b", 0.3, 4.0))
    return tmp_path


def write(folder: Path, *lines: dict[str, Any]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_means_over_cases_in_the_order_asked_for(folder: Path) -> None:
    dense, kivi = read_results(folder).means("fidelity")
    assert (dense.method, dense.cold_bits_per_element, dense.complete, dense.num_cases) == ("dense", None, False, 1)
    assert (kivi.method, kivi.family, kivi.complete) == ("kivi 4", "kivi", True)
    assert kivi.metrics == {"kl": pytest.approx(0.2)}
    assert (kivi.cold_bits_per_element, kivi.compression_factor, kivi.seconds) == (3.0, 4.0, 2.0)


def test_series_are_averaged_where_they_are(folder: Path) -> None:
    rows = [line("dense", "a", 0, series={"kl": [1.0, 2.0, 3.0]}), line("dense", "b", 0, series={"kl": [3.0]})]
    write(folder, *rows, line("dense", "c", 0))
    (mean,) = read_results(folder).means("fidelity")
    assert mean.series == {"kl": [2.0, 2.0, 3.0]}


def test_infinite_values_spoil_a_mean_and_are_not_hidden(folder: Path) -> None:
    write(folder, line("kivi 4", "a", math.inf), line("kivi 4", "b", 1.0), line("kivi 2", "a", -math.inf),
          line("kivi 2", "b", math.inf))  # fmt: skip
    two, four = read_results(folder).means("fidelity")
    assert four.metrics["kl"] == math.inf
    assert math.isnan(two.metrics["kl"])
    assert frontier([two, four], "kl") == []
    assert best_of([two, four]) == {}


def test_frontier_leaves_out_what_does_not_compare(folder: Path) -> None:
    write(
        folder,
        line("dense", "a", 0.0, None),
        line("dense", "b", 0.0, None),
        line("kivi 2", "a", 0.1),
        line("kivi 4", "a", 0.1),
        line("kivi 4", "b", 0.2),
        line("odd", "a", None),
        line("odd", "b", None),
    )
    means = read_results(folder).means("fidelity")
    assert frontier(means, "kl") == [Point("kivi 4", "kivi", 2.0, pytest.approx(0.15))]
    assert best_of(means) == {"kl": {"kivi 4"}}, "neither dense nor a method with fewer cases competes"


def test_failures_apart_and_later_tries_count(folder: Path) -> None:
    failed = {"task": "fidelity", "method": "kivi 4", "family": "kivi", "case": "a", "error": "E: x", "seconds": 1}
    write(folder, failed, line("kivi 4", "a", 0.5), {**failed, "case": "b"})
    results = read_results(folder)
    assert [record.metrics for record in results.records] == [{"kl": 0.5}]
    assert [(record.case, record.error) for record in results.failures] == [("b", "E: x")]
    assert json.loads(json.dumps(results.summary()))["failures"][0]["error"] == "E: x"


def test_a_half_written_line_is_no_mistake(folder: Path) -> None:
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(json.dumps(line("kivi 2", "a", 1.0)).encode()[:40])
    assert len(read_results(folder).records) == 3


@pytest.mark.parametrize("name", ["config.json", "environment.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", [None, "nonsense\n", "[1]\n", b"\xff\n"])
def test_missing_and_malformed_files_are_named(folder: Path, name: str, content: str | bytes | None) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LoadError) as caught:
        read_results(folder)
    assert str(folder / name) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": 1}, "'task' must be text, got 1"),
        ({"metrics": {"kl": "much"}}, "'metrics' must be numbers by name"),
        ({"metrics": [1]}, "'metrics' must be numbers"),
        ({"series": {"kl": 3}}, "'series' must be rows"),
        ({"footprint": {"stored_bytes": 1}}, "'footprint' must be a footprint"),
        ({"footprint": None}, "'footprint' must be a footprint, got None"),
        ({"seconds": None}, "'seconds' must be a number, got None"),
        ({"error": 7}, "'error' must be text"),
    ],
)
def test_wrong_entries_are_named(folder: Path, change: dict[str, Any], message: str) -> None:
    write(folder, line("dense", "a", 0.0), {**line("kivi 2", "a", 0.0), **change})
    with pytest.raises(LoadError, match=r"line 2 of .*metrics\.jsonl") as caught:
        read_results(folder)
    assert message in str(caught.value)


def test_config_without_an_entry(folder: Path) -> None:
    (folder / "config.json").write_text('{"model": "m"}')
    with pytest.raises(LoadError, match="has no 'methods' of type list"):
        read_results(folder)
    with pytest.raises(LoadError, match="no results folder"):
        read_results(folder / "missing")


def test_fake_results_are_real_enough(tmp_path: Path) -> None:
    results = read_results(write_results(tmp_path / "a"))
    assert results.tasks == ["fidelity", "needle", "needle-depth", "lengths", "drift"]
    assert len(frontier(results.means("fidelity"), "kl")) == sum(map(len, FAMILIES.values()))


def test_metrics() -> None:
    for name in ("kl", "perplexity", "perplexity_change", "KL-mean"):
        assert lower_is_better(name)
    for name in ("top1_agreement", "retrieved", "score", "first_difference", "kept"):
        assert not lower_is_better(name)
    mean = Mean("a", "a", 1, True, {"x": 1.0, "kl": 2.0}, 1.0, 1.0, {}, 1.0)
    assert primary_metric([mean]) == "kl"
    assert primary_metric([]) is None
    texts = {
        0.0: "0",
        0.00213: "0.00213",
        0.1: "0.100",
        14.26: "14.3",
        256.0: "256",
        12345.6: "12,346",
        1e-7: "1.0e-07",
    }
    assert {value: figure_text(value) for value in texts} == texts
    assert figure_text(math.inf) == "inf"
