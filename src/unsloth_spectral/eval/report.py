"""Results as one HTML page: headline, tables, the caller's pictures and the settings of the measurement."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unsloth_spectral.errors import SpectralError
from unsloth_spectral.eval.metrics import best_of, figure_text, lower_is_better, primary_metric
from unsloth_spectral.eval.results import Mean, Point, Results, frontier

_LEVELS = (0.1, 0.03, 0.01, 0.003, 0.001)
_CARDS = (0.03, 0.01, 0.003)
_TEMPLATES = Path(__file__).parent / "templates"
_EXPLAINED = {
    "kl": "divergence of the next token's distribution from the dense cache's, nats",
    "top1_agreement": "share of positions where the likeliest token is the dense cache's",
    "perplexity": "of the true next tokens",
    "perplexity_change": "perplexity less the dense cache's",
    "factor": "compression factor of the whole cache after the prefill, as above",
    "cold_bits_per_element": "bits per element, as above",
}


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure for the page: its task, its caption and its inline SVG."""

    task: str
    caption: str
    svg: str


@dataclass(frozen=True, slots=True)
class Need:
    """The method of a family that stays within a level of KL with the fewest bits."""

    method: str
    family: str
    bits: float


def needs(points: Sequence[Point], levels: Sequence[float] = _LEVELS) -> dict[float, list[Need]]:
    """For each level of KL, the methods that stay within it: one per family, fewest bits first.

    Only measured settings count; nothing is interpolated.
    """
    by_level: dict[float, list[Need]] = {}
    for level in levels:
        best: dict[str, Need] = {}
        for point in sorted(points, key=lambda point: (point.bits, point.value)):
            if point.value <= level:
                best.setdefault(point.family, Need(point.method, point.family, point.bits))
        by_level[level] = sorted(best.values(), key=lambda need: need.bits)
    return by_level


def render(results: Results, pictures: Sequence[Picture] = ()) -> str:
    """The page as one self-contained HTML document.

    Args:
        results: of ``read_results``.
        pictures: their SVG goes into the page unescaped.

    Raises:
        SpectralError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise SpectralError(
            'the report is made with jinja2, which is not installed: run `pip install "unsloth-spectral[plot]"`'
        ) from error

    engine = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    tables = {task: _table(results.means(task)) for task in results.tasks}
    return engine.get_template("report.html").render(
        model=results.config["model"],
        dtype=results.config.get("dtype", "unknown dtype"),
        environment=results.environment,
        headline=_headline(results),
        tables=tables,
        pictures={
            task: [(picture.caption, Markup(picture.svg)) for picture in pictures if picture.task == task]
            for task in tables
        },
        failures=results.failures,
        explained={
            name: text for name, text in _EXPLAINED.items() if any(name in t["metrics"] for t in tables.values())
        },
        config=json.dumps(results.config, indent=1, ensure_ascii=False),
        where=json.dumps(results.environment, indent=1, ensure_ascii=False),
    )


def kl_task(results: Results) -> str | None:
    """The headline's task: the first one that measures KL."""
    return next((task for task in results.tasks if primary_metric(results.means(task)) == "kl"), None)


def _headline(results: Results) -> dict[str, Any] | None:
    task = kl_task(results)
    points = frontier(results.means(task), "kl") if task is not None else []
    if task is None or not points:
        return None
    by_level = needs(points)
    families = list(dict.fromkeys(point.family for point in points))
    cards = [(level, by_level[level][0], by_level[level][1:3]) for level in _CARDS if by_level[level]]
    rows = [
        (family, [next((need for need in by_level[level] if need.family == family), None) for level in _LEVELS])
        for family in families
    ]
    least = {level: by_level[level][0].bits for level in _LEVELS if by_level[level]}
    # Without a card, because every method is far off, the page names the nearest method.
    nearest = min(points, key=lambda point: (point.value, point.bits))
    return {"task": task, "cards": cards, "levels": _LEVELS, "rows": rows, "least": least, "nearest": nearest}


def _table(means: list[Mean]) -> dict[str, Any]:
    names = list(dict.fromkeys(name for mean in means for name in mean.metrics))
    best = best_of(means)
    rows = []
    for mean in means:
        cells = [
            (figure_text(mean.metrics[name]) if name in mean.metrics else "", mean.method in best.get(name, ()))
            for name in names
        ]
        rows.append({"mean": mean, "cells": cells})
    arrows = {name: "lower is better" if lower_is_better(name) else "higher is better" for name in names}
    return {"metrics": arrows, "rows": rows, "most": max((mean.num_cases for mean in means), default=0)}
