"""KL from the dense cache along a generation."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.plots.style import (
    GREY,
    INK,
    LABEL,
    LINES,
    TICK,
    TITLE,
    family_colors,
    panels,
    plain_number,
    setting_of,
    short,
    tidy,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

_WINDOWS = 32


def drift_figure(rows: Sequence[tuple[str, str, Sequence[float]]], *, title: str) -> "Figure":
    """One panel per family: its methods in colour, all others in grey, averaged over windows of tokens.

    Args:
        rows: method, family and KL at each generated token; rows without a positive number are left out.
        title: of the figure.

    Raises:
        InvalidArgumentError: no row is left.
        SpectralError: matplotlib is not installed.
    """
    curves = {
        method: _smooth(kl) for method, _, kl in rows if np.nan_to_num(np.asarray(kl, dtype=float)).max(initial=0) > 0
    }
    if not curves:
        raise InvalidArgumentError("a drift figure needs a method with KL above 0 along a generation, got none")
    families: dict[str, list[str]] = {}
    for method, family, _ in rows:
        if method in curves:
            families.setdefault(family, []).append(method)
    colors = family_colors(family for _, family, _ in rows)
    figure, grid = panels(len(families), 3, 3.9, 2.7)
    for axes, (family, methods) in zip(grid, families.items(), strict=True):
        for method in curves.keys() - set(methods):
            axes.plot(*curves[method], color=GREY, alpha=0.18, linewidth=0.9)
        for index, method in enumerate(methods):
            label = short(setting_of(method, family) or method)
            style = LINES[index % len(LINES)]
            axes.plot(*curves[method], color=colors[family], linestyle=style, linewidth=1.8, label=label, gid=method)
        axes.set_yscale("log")
        axes.set_title(short(family), fontsize=TICK, color=colors[family], fontweight="bold", parse_math=False)
        _add_legend(axes, colors[family])
        tidy(axes)
        axes.tick_params(labelsize=TICK - 1)
        axes.grid(color=GREY, alpha=0.18, linewidth=0.8, axis="y")
    positive = np.concatenate([values[values > 0] for _, values in curves.values()])
    # Room below the curves, for the legends.
    grid[0].set_ylim(positive.min() / 8, positive.max() * 2)
    grid[0].yaxis.set_major_formatter(plain_number)
    figure.supxlabel("token of the generation", fontsize=LABEL, color=INK)
    figure.supylabel("KL from the dense cache, nats", fontsize=LABEL, color=INK)
    figure.suptitle(title, fontsize=TITLE + 1, color=INK, parse_math=False)
    return figure


def _add_legend(axes: "Axes", color: str) -> None:
    legend = axes.legend(
        loc="lower left", ncols=2, fontsize=TICK - 2, frameon=False, handlelength=2.6, labelcolor=color, borderpad=0.1
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _smooth(kl: Sequence[float]) -> "tuple[NDArray[np.float64], NDArray[np.float64]]":
    """Middles and means of about 32 windows: single tokens differ a thousandfold and would hide the trend."""
    values = np.asarray(kl, dtype=np.float64)
    edges = np.unique(np.linspace(0, len(values), min(_WINDOWS, len(values)) + 1).astype(int))
    pairs = list(pairwise(edges))
    middles = np.array([(start + stop - 1) / 2 for start, stop in pairs])
    return middles, np.array([values[start:stop].mean() for start, stop in pairs])
