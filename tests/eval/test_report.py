"""The page: complete, self-contained, escaped, and with the right numbers first."""

import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fake_results import write_results

from unsloth_spectral.cli.app import app
from unsloth_spectral.cli.report import _by_length
from unsloth_spectral.errors import SpectralError
from unsloth_spectral.eval.methods.registry import methods
from unsloth_spectral.eval.report import Need, Picture, needs, render
from unsloth_spectral.eval.results import Point, read_results
from unsloth_spectral.eval.runner import run_evaluation
from unsloth_spectral.eval.tasks.fidelity import Fidelity
from unsloth_spectral.eval.tasks.lengths import Lengths
from unsloth_spectral.integrations.models import LoadedModel

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Checks that every tag is closed in order; collects text, tags and addresses."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("href", "src", "xlink:href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data + " "


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_results(tmp_path / "results")


def test_fewest_bits_for_each_level() -> None:
    points = [Point("a 2", "a", 2, 0.02), Point("a 4", "a", 4, 0.002), Point("b", "b", 3, 0.009), Point("c", "c", 1, 9)]
    assert needs(points, (0.1, 0.01, 0.001)) == {
        0.1: [Need("a 2", "a", 2), Need("b", "b", 3)],
        0.01: [Need("b", "b", 3), Need("a 4", "a", 4)],
        0.001: [],
    }


def test_the_answer_comes_first(folder: Path) -> None:
    text = " ".join(Page(render(read_results(folder))).text.split())
    assert "KL at most 0.01 2.13 bits spectral balanced next families: turboquant 4, 4.21;" in text
    assert text.index("KL at most") < text.index("Means over 3 cases")
    for words in (
        "kivi 4",
        "OutOfMemoryError: tried to allocate 2.00 GiB",
        "1 of 2 cases",
        "SmolLM2",
        "top1 agreement",
    ):
        assert words in text


def test_it_needs_nothing_from_outside(folder: Path) -> None:
    page = Page(render(read_results(folder), [Picture("needle", "a picture", "<svg><path/></svg>")]))
    assert page.addresses == []
    assert "svg" in page.tags
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"https?://|@import|url\(", render(read_results(folder)))


def test_the_best_of_each_column_is_marked(folder: Path) -> None:
    page = render(read_results(folder))
    (row,) = re.findall(r"<tr><th scope=\"row\">int8</th>\s*<td>8.25</td>.*?</tr>", page, re.DOTALL)[1:2]
    assert row.count('class="best"') == 4
    dense = re.findall(r"<tr><th scope=\"row\">dense</th>.*?</tr>", page, re.DOTALL)
    assert dense
    assert not any("best" in cell for cell in dense)


def test_everything_is_escaped(folder: Path) -> None:
    evil = "<script>alert('x')</script>&\"{{ 7 * 7 }}"
    for name in ("metrics.jsonl", "config.json", "environment.json"):
        text = (folder / name).read_text()
        for word in (
            "kivi 2",
            "fidelity",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            "A Processor (AVX512)",
            "OutOfMemory",
        ):
            text = text.replace(word, json.dumps(evil)[1:-1] + word)
        (folder / name).write_text(text)
    results = read_results(folder)
    page = render(results, [Picture(results.tasks[0], evil, "<svg></svg>")])
    assert "script" not in Page(page).tags
    assert "<script" not in page
    assert "{{ 7 * 7 }}kivi 2" in Page(page).text


def test_results_of_few_kinds(folder: Path) -> None:
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    for wanted in ('"task": "needle"', '"method": "dense"', '"method": "rank 16/32"'):
        (folder / "metrics.jsonl").write_text("".join(line for line in lines if wanted in line))
        page = render(read_results(folder))
        assert Page(page).text
        assert ("No measured method stays within" in page) == ("rank" in wanted)


def test_without_jinja(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(SpectralError, match=r'`pip install "unsloth-spectral\[plot\]"`'):
        render(read_results(folder))


def test_pictures_of_real_results(
    tmp_path: Path,
    tiny_llama: Callable[..., Any],
    character_tokenizer: Any,
    document: str,
) -> None:
    """Tasks, methods and runner as they are: the pictures of bits by layer and of lengths have what they need."""
    loaded = LoadedModel(tiny_llama(head_dim=64), character_tokenizer, "tiny")
    tasks = [
        Fidelity(document=document, starts=(0,), context_length=800, continuation_length=8),
        Lengths(document=document, lengths=(100, 800), starts=(0, 40), continuation_length=8),
    ]
    all_methods = methods()
    names = ["dense", "spectral balanced", "spectral balanced without profile", "kivi 2"]
    summary = run_evaluation(loaded, tasks, [all_methods[name] for name in names], tmp_path / "a")
    assert summary.failures == []
    app(["report", str(tmp_path / "a")], standalone_mode=False)
    assert {file.name for file in (tmp_path / "a" / "report").iterdir()} == {
        "report.html", "frontier-fidelity.png", "bits-fidelity.png", "lengths-lengths.png"
    }  # fmt: skip
    results = read_results(tmp_path / "a")
    series = {mean.method: mean.series for mean in results.means("fidelity")}
    assert [len(series[name].get("bits_keys", [])) for name in names] == [0, 2, 2, 0]
    curves = {curve[0]: curve[2:] for curve in _by_length(results, "lengths", results.means("lengths"))}
    by_case = {r.case: r.metrics for r in results.of("lengths") if r.method == "kivi 2"}
    assert list(curves) == names
    for place, metric in enumerate(("factor", "kl")):
        assert curves["kivi 2"][place] == {
            length: sum(by_case[f"length={length} start={start}"][metric] for start in (0, 40)) / 2
            for length in (100, 800)
        }
