"""Figures of ``unsloth-spectral spectrum``."""

from typing import TYPE_CHECKING, Any

import numpy as np

from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.plots.style import GREY, LABEL, TICK, TITLE, blank_figure, model_title, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

# Blue and vermilion of Okabe and Ito's palette, which every kind of colour vision tells apart.
_COLORS = {"keys": "#0072b2", "values": "#d55e00"}
_STYLES = {"keys": "-", "values": (0, (5, 1.5))}
_SHARE = 0.95
_MARKED_RANKS = (16, 32)


def spectrum_figure(report: dict[str, Any]) -> "Figure":
    """Draw a ``SpectrumReport.to_dict``: the variance kept at each rank, and the rank that each head needs.

    Args:
        report: the dictionary, or the content of a results file; the title has its ``"model"``, if any.

    Raises:
        InvalidArgumentError: the dictionary holds no spectra.
        SpectralError: matplotlib is not installed.
    """
    if not report.get("heads"):
        raise InvalidArgumentError(
            f"a spectrum figure needs results with 'heads', got {', '.join(map(repr, report)) or 'none'}: give what "
            "`unsloth-spectral spectrum --json` wrote"
        )
    figure = blank_figure(14, 6)
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.15))
    _draw_kept_variance(figure.add_subplot(grid[:, 0]), report)
    _draw_effective_ranks((figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 1])), report)
    figure.suptitle(
        f"{model_title(report)}: spectra of keys and values on {report['num_tokens']:,} tokens, in blocks of "
        f"{report['block_size']}",
        fontsize=TITLE + 2,
        parse_math=False,
    )
    return figure


def _draw_kept_variance(axes: "Axes", report: dict[str, Any]) -> None:
    bands = {side: np.percentile(_kept_variance(report, side), (10, 50, 90), axis=0) for side in _COLORS}
    largest = bands["keys"].shape[1] - 1
    for side, (low, median, high) in bands.items():
        needed = int(np.argmax(median >= _SHARE))
        label = f"{side}, median head: 95% at rank {needed}"
        axes.fill_between(np.arange(largest + 1), low, high, color=_COLORS[side], alpha=0.2, linewidth=0)
        axes.plot(median, color=_COLORS[side], linestyle=_STYLES[side], linewidth=2.2, label=label)
    for rank in (rank for rank in _MARKED_RANKS if rank < largest):
        axes.axvline(rank, color=GREY, linewidth=1, linestyle=":")
        lower, upper = sorted(bands, key=lambda side: bands[side][1, rank])
        _mark(axes, rank, bands[upper][1, rank], _COLORS[upper], above=True)
        _mark(axes, rank, bands[lower][1, rank], _COLORS[lower], above=False)
    axes.axhline(_SHARE, color=GREY, linewidth=1, linestyle=":")
    axes.fill_between([], [], color=GREY, alpha=0.2, linewidth=0, label="shaded: 10th to 90th percentile of heads")
    axes.set_xlim(0, largest)
    axes.set_xticks(range(0, largest + 1, _tick_step(largest)))
    axes.set_ylim(0, 1.06)
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, _SHARE, 1])
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_xlabel(f"rank (of {largest})", fontsize=LABEL)
    axes.set_ylabel("share of the variance kept", fontsize=LABEL)
    axes.set_title("Variance kept at each rank", fontsize=TITLE)
    axes.legend(loc="lower right", fontsize=TICK, framealpha=1, edgecolor="none")
    tidy(axes)


def _mark(axes: "Axes", rank: int, share: float, color: str, *, above: bool) -> None:
    from matplotlib.patheffects import withStroke

    # The curves only ever rise and flatten: left above and right below one there is room.
    axes.plot(rank, share, "o", color=color, markersize=6)
    axes.annotate(
        f"{share:.0%}",
        (rank, share),
        xytext=(-5, 5) if above else (6, -5),
        textcoords="offset points",
        ha="right" if above else "left",
        va="bottom" if above else "top",
        color=color,
        fontsize=LABEL,
        fontweight="bold",
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )


def _draw_effective_ranks(both: tuple["Axes", "Axes"], report: dict[str, Any]) -> None:
    largest = report["head_dim"]
    layers = sorted({head["layer_idx"] for head in report["heads"]})
    step = -(-len(layers) // 16)
    for axes, side in zip(both, _COLORS, strict=True):
        ranks = _effective_ranks(report, side)
        # Both use the whole range: a scale fitted to the data would exaggerate small differences.
        image = axes.imshow(ranks, cmap="viridis", vmin=0, vmax=largest, aspect="auto")
        axes.set_facecolor("#dddddd")
        axes.set_title(f"{side.capitalize()}: rank that keeps 95% of the variance, by head", fontsize=TITLE)
        axes.set_ylabel("head", fontsize=LABEL)
        axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        axes.set_yticks(range(0, len(ranks), -(-len(ranks) // 8)))
        axes.tick_params(labelsize=TICK)
    both[1].set_xlabel("layer", fontsize=LABEL)
    bar = both[1].figure.colorbar(image, ax=both, ticks=range(0, largest + 1, _tick_step(largest)))
    bar.set_label(f"rank (of {largest})", fontsize=LABEL)
    bar.ax.tick_params(labelsize=TICK)


def _kept_variance(report: dict[str, Any], side: str) -> "NDArray[np.float64]":
    """Share kept at ranks 0 to the largest of all heads, one row per head; 1 beyond a smaller head's full rank."""
    lengths = [len(head[name]["singular_values"]) for head in report["heads"] for name in _COLORS]
    curves = np.ones((len(report["heads"]), 1 + max(report["head_dim"], *lengths)))
    for curve, head in zip(curves, report["heads"], strict=True):
        squares = np.square(head[side]["singular_values"])
        if squares.sum() > 0:
            curve[: len(squares) + 1] = np.concatenate([[0], squares.cumsum() / squares.sum()])
    return curves


def _effective_ranks(report: dict[str, Any], side: str) -> "NDArray[np.float64]":
    """Effective rank by head and layer; NaN where a layer has fewer heads than another."""
    layers = sorted({head["layer_idx"] for head in report["heads"]})
    num_heads = 1 + max(head["head_idx"] for head in report["heads"])
    ranks = np.full((num_heads, len(layers)), np.nan)
    for head in report["heads"]:
        ranks[head["head_idx"], layers.index(head["layer_idx"])] = head[side]["effective_rank"]
    return ranks


def _tick_step(largest: int) -> int:
    """A step that puts a tick on each marked rank, with about eight in all."""
    return next((step for step in (4, 8, 16) if largest <= 8 * step), 32)
