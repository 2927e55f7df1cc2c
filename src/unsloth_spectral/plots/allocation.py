"""Bits by layer of methods that divide one budget among layers."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.plots.style import GREY, INK, LABEL, TICK, TITLE, panels, short, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = {"keys": "#0072b2", "values": "#d55e00"}


def allocation_figure(bits: Mapping[str, Mapping[str, Sequence[float]]], *, title: str) -> "Figure":
    """One panel per method, variants of a method side by side: bits per element of keys and values in each layer.

    Args:
        bits: by method, then ``keys`` and ``values``: one number per layer, NaN where a layer has none.
        title: of the figure.

    Raises:
        InvalidArgumentError: there is no method.
        SpectralError: matplotlib is not installed.
    """
    if not bits:
        raise InvalidArgumentError("an allocation figure needs a method with bits by layer, got none")
    rows = _rows(list(bits))
    columns = max(map(len, rows))
    figure, cells = panels(len(rows) * columns, columns, 3.9, 2.4)
    from matplotlib.ticker import MaxNLocator

    places = [(row, column) for row in range(len(rows)) for column in range(columns)]
    grid: dict[str, Axes] = {}
    for axes, (row, column) in zip(cells, places, strict=True):
        axes.set_visible(column < len(rows[row]))
        # The lowest panel of its column has the layers' numbers.
        axes.tick_params(labelbottom=all(column >= len(below) for below in rows[row + 1 :]))
        if column < len(rows[row]):
            grid[rows[row][column]] = axes
    for method, axes in grid.items():
        means = []
        for side, widths in bits[method].items():
            axes.step(range(len(widths)), widths, where="mid", color=_COLORS[side], linewidth=1.8, gid=side,
                      linestyle="-" if side == "keys" else (0, (5, 1.5)))  # fmt: skip
            means.append(f"{side} {np.nanmean(widths):.2f}")
        axes.set_title(short(method, 36), fontsize=TICK, color=INK, fontweight="bold", parse_math=False)
        axes.text(0.99, 0.04, "mean: " + ", ".join(means), transform=axes.transAxes, ha="right", fontsize=TICK - 2,
                  color=GREY)  # fmt: skip
        tidy(axes)
        axes.tick_params(labelsize=TICK - 1)
        axes.grid(color=GREY, alpha=0.18, linewidth=0.8, axis="y")
    first = cells[0]
    first.set_ylim(0, 1.1 * max(np.nanmax(widths) for sides in bits.values() for widths in sides.values()))
    first.xaxis.set_major_locator(MaxNLocator(integer=True))
    for x, (side, color) in zip((0.02, 0.19), _COLORS.items(), strict=True):
        dash = "—" if side == "keys" else "- -"
        first.text(x, 0.04, f"{dash} {side}", transform=first.transAxes, color=color, fontsize=TICK - 1)
    figure.supxlabel("layer", fontsize=LABEL, color=INK)
    figure.supylabel("bits per element", fontsize=LABEL, color=INK)
    figure.suptitle(title, fontsize=TITLE + 1, color=INK, parse_math=False)
    return figure


def _rows(methods: Sequence[str]) -> list[list[str]]:
    """Methods in rows: a method beside those whose names begin with its name, or three per row if there are none."""
    groups: dict[str, list[str]] = {}
    for method in methods:
        base = min((other for other in methods if f"{method} ".startswith(f"{other} ")), key=len)
        groups.setdefault(base, []).append(method)
    if len(groups) == len(methods):
        return [list(methods[start : start + 3]) for start in range(0, len(methods), 3)]
    return list(groups.values())
