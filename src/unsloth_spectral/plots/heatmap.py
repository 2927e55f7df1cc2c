"""Needle tests: retrieval by length of the text and depth of the needle."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.plots.style import GREY, INK, LABEL, PAPER, TICK, TITLE, panels, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CASE = re.compile(r"\blength=(\d+)\b.*\bdepth=(\d*\.?\d+)")


def place_of(case: str) -> tuple[int, float] | None:
    """``(2048, 0.3)`` from ``length=2048 depth=0.30``; None for other names."""
    match = _CASE.search(case)
    return (int(match[1]), float(match[2])) if match else None


def heatmap_figure(shares: Mapping[str, Mapping[str, float]], *, title: str, metric: str) -> "Figure":
    """One panel per method: pale cells were found, dark red ones lost.

    Args:
        shares: from 0 to 1, by method, then by case; cases not named ``length=... depth=...`` are left out.
        title: of the figure.
        metric: the label of the colour scale.

    Raises:
        InvalidArgumentError: no case has such a name.
        SpectralError: matplotlib is not installed.
    """
    placed: dict[str, dict[tuple[int, float], list[float]]] = {}
    for method, by_case in shares.items():
        for case, value in by_case.items():
            place = place_of(case)
            if place is not None:
                # Cases that differ in something else, such as a seed, share a cell.
                placed.setdefault(method, {}).setdefault(place, []).append(value)
    if not placed:
        raise InvalidArgumentError("a needle heat map needs cases named 'length=... depth=...', got none")
    lengths = sorted({length for cells in placed.values() for length, _ in cells})
    depths = sorted({depth for cells in placed.values() for _, depth in cells})
    figure, grid = panels(len(placed), 5, 2.4, 2.0)
    from matplotlib.colors import LinearSegmentedColormap

    # Its lightness rises all the way, so that it reads in grey and for every kind of colour vision.
    colors = LinearSegmentedColormap.from_list("found", ["#7a0f1e", "#d6604d", "#f4b183", "#d3e6db"]).with_extremes(
        bad="#b0b0b0"
    )
    for axes, (method, cells) in zip(grid, placed.items(), strict=True):
        table = np.full((len(depths), len(lengths)), np.nan)
        for (length, depth), values in cells.items():
            table[depths.index(depth), lengths.index(length)] = np.mean(values)
        image = axes.pcolormesh(np.ma.masked_invalid(table), cmap=colors, vmin=0, vmax=1, edgecolors=PAPER,
                                linewidth=1)  # fmt: skip
        mean = float(np.nanmean(table)) if not np.isnan(table).all() else math.nan
        axes.set_title(f"{short(method, 27)}\n{mean:.0%}", fontsize=TICK - 1, color=INK, parse_math=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(labelsize=TICK - 2, length=0)
    columns, rows = _some(range(len(lengths)), 5), _some(range(len(depths)), 6)
    # One call each: the panels share their scales.
    grid[0].set_xticks([index + 0.5 for index in columns], [_thousands(lengths[index]) for index in columns])
    grid[0].set_yticks([index + 0.5 for index in rows], [f"{depths[index]:.0%}" for index in rows])
    grid[0].set_ylim(len(depths), 0)
    figure.supxlabel("tokens of text", fontsize=LABEL, color=INK)
    figure.supylabel("depth of the needle", fontsize=LABEL, color=INK)
    figure.suptitle(title, fontsize=TITLE + 1, color=INK, parse_math=False)
    bar = figure.colorbar(image, ax=grid, ticks=[0, 0.5, 1], shrink=0.5, aspect=25, pad=0.01)
    bar.set_label(metric, fontsize=TICK, color=GREY, parse_math=False)
    bar.ax.tick_params(labelsize=TICK - 2)
    bar.outline.set_visible(False)
    return figure


def _some(values: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of the values, evenly apart, the first among them."""
    return list(values[:: -(-len(values) // most)])


def _thousands(count: int) -> str:
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else str(count)
