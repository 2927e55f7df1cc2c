"""Compression factor and KL by length of the prefix."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.plots.style import (
    GREY,
    INK,
    LABEL,
    LINES,
    MARKERS,
    TICK,
    TITLE,
    blank_figure,
    family_colors,
    log_values,
    short,
    tidy,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CASE = re.compile(r"^length=(\d+)( start=\d+)?$")


def length_of(case: str) -> int | None:
    """512 from ``length=512`` or ``length=512 start=20000``; None for other names."""
    match = _CASE.match(case)
    return int(match[1]) if match else None


def lengths_figure(
    curves: Sequence[tuple[str, str, Mapping[int, float], Mapping[int, float]]], *, title: str
) -> "Figure":
    """Two panels with one line per method: the factor by length, and the KL by length.

    Args:
        curves: method, family, factor by length and KL by length. The legend orders methods by
            their factor at the longest length. A KL of 0 is left out, since the axis is logarithmic.
        title: of the figure.

    Raises:
        InvalidArgumentError: there is no curve.
        SpectralError: matplotlib is not installed.
    """
    if not any(factors for _, _, factors, _ in curves):
        raise InvalidArgumentError("a figure by length needs a method with factors by length, got none")
    figure = blank_figure(13.5, max(5.6, 1.6 + 0.21 * len(curves)))
    left, right = figure.subplots(1, 2)
    colors = family_colors(family for _, family, _, _ in curves)
    looks = _looks(curves)
    for method, family, factors, kl in sorted(curves, key=lambda curve: -_last(curve[2])):
        line, marker = looks[method]
        # Dashed lines lie on top, so that equal lines are both visible.
        for axes, points in ((left, factors), (right, {length: value for length, value in kl.items() if value > 0})):
            axes.plot(list(points), list(points.values()), color=colors[family], linestyle=line, marker=marker,
                      markersize=5, linewidth=1.7, label=short(method, 36), gid=method,
                      zorder=2 if line == "-" else 2.5)  # fmt: skip
    lengths = sorted({length for _, _, factors, _ in curves for length in factors})
    _finish(left, lengths, "times smaller than a dense cache, exact tokens included")
    _finish(right, lengths, "KL from the dense cache, nats")
    left.set_ylim(bottom=0)
    positive = [value for _, _, _, kl in curves for value in kl.values() if value > 0]
    if positive:
        log_values(right, min(positive), max(positive))
    legend = figure.legend(
        handles=left.get_lines(), loc="outside right upper", fontsize=TICK - 2, frameon=False, handlelength=3.4
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.supxlabel("tokens of the prefix", fontsize=LABEL, color=INK)
    figure.suptitle(title, fontsize=TITLE + 1, color=INK, parse_math=False)
    return figure


def _looks(
    curves: Sequence[tuple[str, str, Mapping[int, float], Mapping[int, float]]],
) -> dict[str, tuple[object, str]]:
    """Dashes and marker of each method, which tell the members of a family apart: they share one colour."""
    members: dict[str, list[str]] = {}
    for method, family, _, _ in curves:
        members.setdefault(family, []).append(method)
    return {
        method: (LINES[index % len(LINES)], MARKERS[index % len(MARKERS)])
        for methods in members.values()
        for index, method in enumerate(methods)
    }


def _last(points: Mapping[int, float]) -> float:
    return points[max(points)] if points else -np.inf


def _finish(axes: "Axes", lengths: list[int], label: str) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylabel(label, fontsize=LABEL, color=INK)
    tidy(axes)
    axes.grid(color=GREY, alpha=0.18, linewidth=0.8)
