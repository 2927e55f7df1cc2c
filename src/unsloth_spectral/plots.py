"""Results files to figures. Draws without pyplot, so no display is needed and no global state is touched."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unsloth_spectral.errors import InvalidArgumentError, SpectralError
from unsloth_spectral.files import check_target, replacing

# matplotlib is an extra, and slow to import: the functions import it.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

FORMATS = (".png", ".svg", ".pdf")

# Blue and vermilion of Okabe and Ito's palette, which every kind of colour vision tells apart.
_COLORS = {"keys": "#0072b2", "values": "#d55e00"}
_STYLES = {"keys": "-", "values": (0, (5, 1.5))}
_GREY = "#666666"
_SHARE = 0.95
_MARKED_RANKS = (16, 32)
_TITLE, _LABEL, _TICK = 13, 12, 11


def check_figure_target(path: str | os.PathLike[str]) -> Path:
    """The path of a figure to be written, checked before the work whose result it is to show.

    Raises:
        InvalidArgumentError: the suffix is not .png, .svg or .pdf, or the folder is missing or cannot be written to.
        SpectralError: matplotlib is not installed.
    """
    target = check_target(path, FORMATS)
    _require_matplotlib()
    return target


def save_figure(figure: "Figure", path: str | os.PathLike[str]) -> None:
    """Write ``figure`` to ``path``, whole or not at all, in the format that the suffix names.

    Raises:
        InvalidArgumentError: the suffix is not .png, .svg or .pdf, or the folder is missing or cannot be written to.
    """
    target = check_target(path, FORMATS)
    with replacing(target) as temporary:
        figure.savefig(temporary, format=target.suffix[1:].lower())


def spectrum_figure(report: dict[str, Any]) -> "Figure":
    """What ``SpectrumReport.to_dict`` gives, drawn: variance kept at each rank, and the rank each head needs.

    Args:
        report: the dictionary, or a results file's; ``"model"`` in it, if there, goes into the title.

    Raises:
        InvalidArgumentError: it holds no spectra.
        SpectralError: matplotlib is not installed.
    """
    if not report.get("heads"):
        raise InvalidArgumentError(
            f"a spectrum figure needs results with 'heads', got {', '.join(map(repr, report)) or 'none'}: give what "
            "`unsloth-spectral spectrum --json` wrote"
        )
    figure = _blank_figure(14, 6)
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.15))
    _draw_kept_variance(figure.add_subplot(grid[:, 0]), report)
    _draw_effective_ranks((figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 1])), report)
    figure.suptitle(
        f"{_model_title(report)}: spectra of keys and values on {report['num_tokens']:,} tokens, in blocks of "
        f"{report['block_size']}",
        fontsize=_TITLE + 2,
        parse_math=False,
    )
    return figure


def comparison_figure(result: dict[str, Any]) -> "Figure":
    """What ``Comparison.to_dict`` gives, drawn: bytes against context length, and what the answers cost.

    Args:
        result: the dictionary, or a results file's.

    Raises:
        InvalidArgumentError: it holds no caches.
        SpectralError: matplotlib is not installed.
    """
    if not result.get("caches"):
        raise InvalidArgumentError(
            f"a comparison figure needs results with 'caches', got {', '.join(map(repr, result)) or 'none'}: give what "
            "`unsloth-spectral compare --json` wrote"
        )
    figure = _blank_figure(14, 6)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    _draw_context_bytes(left, result)
    _draw_fidelity(right, result)
    figure.suptitle(
        f"{_model_title(result)}: KV cache of {result['context_length']:,} tokens, dense ({result['dtype']}) and "
        "spectral",
        fontsize=_TITLE + 2,
        parse_math=False,
    )
    return figure


def _draw_context_bytes(axes: "Axes", result: dict[str, Any]) -> None:
    lengths = result["lengths"]
    for cache, color in zip(result["caches"], _cache_colors(result), strict=True):
        axes.plot(lengths, [count / 1e6 for count in cache["context_bytes"]], color=color, linewidth=2.2)
        axes.annotate(
            f" {cache['name']}\n {cache['stored_bytes'] / 1e6:.3g} MB",
            (lengths[-1], cache["context_bytes"][-1] / 1e6),
            va="center",
            color=color,
            fontsize=_TICK,
            annotation_clip=False,
        )
    axes.set_xlim(0, lengths[-1] * 1.28)
    axes.set_xticks([length for length in lengths if (length * 4) % lengths[-1] == 0])
    axes.set_ylim(0, None)
    axes.set_xlabel("context length, tokens", fontsize=_LABEL)
    axes.set_ylabel("stored bytes, MB", fontsize=_LABEL)
    axes.set_title("Memory of the cache against context length", fontsize=_TITLE)
    _tidy(axes)
    _spread_labels(axes)


def _spread_labels(axes: "Axes") -> None:
    """Move the labels at the curves' ends apart where they would overlap."""
    room = (axes.get_ylim()[1] - axes.get_ylim()[0]) * 0.1
    below = -room
    for label in sorted(axes.texts, key=lambda text: text.xy[1]):  # type: ignore[attr-defined]
        x, y = label.get_position()
        y = max(y, below + room)
        label.set_position((x, y))
        below = y


def _draw_fidelity(axes: "Axes", result: dict[str, Any]) -> None:
    caches = [
        (cache, color)
        for cache, color in zip(result["caches"], _cache_colors(result), strict=True)
        if cache["name"] != "dense"
    ]
    largest = max((cache["fidelity"]["kl"] for cache, _ in caches), default=1.0)
    for row, (cache, color) in enumerate(caches):
        fidelity = cache["fidelity"]
        axes.barh(row, fidelity["kl"], color=color, height=0.6)
        axes.annotate(
            f" KL {fidelity['kl']:.3f}, perplexity {fidelity['perplexity_change']:+.2f}\n "
            f"{fidelity['top1_agreement']:.1%} same top token",
            (fidelity["kl"], row),
            va="center",
            fontsize=_TICK,
        )
    names = [
        f"{cache['name']}\n{cache['compression_factor']:.1f}x smaller, {cache['bits_per_element']:.1f} bits"
        for cache, _ in caches
    ]
    axes.set_yticks(range(len(caches)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, (largest or 1.0) * 1.9)
    axes.set_xlabel("KL divergence from the dense cache, nats (0: identical)", fontsize=_LABEL)
    axes.set_title("What it costs: 256 tokens after the context", fontsize=_TITLE)
    _tidy(axes)


def _cache_colors(result: dict[str, Any]) -> list[str]:
    """Grey for the dense cache, Okabe and Ito's colours for the others."""
    palette = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
    colors: list[str] = []
    for cache in result["caches"]:
        colors.append(_GREY if cache["name"] == "dense" else palette[len(colors) % len(palette) - 1])
    return colors


def _draw_kept_variance(axes: "Axes", report: dict[str, Any]) -> None:
    bands = {side: np.percentile(_kept_variance(report, side), (10, 50, 90), axis=0) for side in _COLORS}
    largest = bands["keys"].shape[1] - 1
    for side, (low, median, high) in bands.items():
        needed = int(np.argmax(median >= _SHARE))
        label = f"{side}, median head: 95% at rank {needed}"
        axes.fill_between(np.arange(largest + 1), low, high, color=_COLORS[side], alpha=0.2, linewidth=0)
        axes.plot(median, color=_COLORS[side], linestyle=_STYLES[side], linewidth=2.2, label=label)
    for rank in (rank for rank in _MARKED_RANKS if rank < largest):
        axes.axvline(rank, color=_GREY, linewidth=1, linestyle=":")
        lower, upper = sorted(bands, key=lambda side: bands[side][1, rank])
        _mark(axes, rank, bands[upper][1, rank], _COLORS[upper], above=True)
        _mark(axes, rank, bands[lower][1, rank], _COLORS[lower], above=False)
    axes.axhline(_SHARE, color=_GREY, linewidth=1, linestyle=":")
    axes.fill_between([], [], color=_GREY, alpha=0.2, linewidth=0, label="shaded: 10th to 90th percentile of heads")
    axes.set_xlim(0, largest)
    axes.set_xticks(range(0, largest + 1, _tick_step(largest)))
    axes.set_ylim(0, 1.06)
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, _SHARE, 1])
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_xlabel(f"rank (of {largest})", fontsize=_LABEL)
    axes.set_ylabel("share of the variance kept", fontsize=_LABEL)
    axes.set_title("Variance kept at each rank", fontsize=_TITLE)
    axes.legend(loc="lower right", fontsize=_TICK, framealpha=1, edgecolor="none")
    _tidy(axes)


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
        fontsize=_LABEL,
        fontweight="bold",
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )


def _draw_effective_ranks(both: tuple["Axes", "Axes"], report: dict[str, Any]) -> None:
    largest = report["head_dim"]
    layers = sorted({head["layer_idx"] for head in report["heads"]})
    step = -(-len(layers) // 16)
    for axes, side in zip(both, _COLORS, strict=True):
        ranks = _effective_ranks(report, side)
        # The whole range for both: a scale fitted to the data would make much of small differences.
        image = axes.imshow(ranks, cmap="viridis", vmin=0, vmax=largest, aspect="auto")
        axes.set_facecolor("#dddddd")
        axes.set_title(f"{side.capitalize()}: rank that keeps 95% of the variance, by head", fontsize=_TITLE)
        axes.set_ylabel("head", fontsize=_LABEL)
        axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        axes.set_yticks(range(0, len(ranks), -(-len(ranks) // 8)))
        axes.tick_params(labelsize=_TICK)
    both[1].set_xlabel("layer", fontsize=_LABEL)
    bar = both[1].figure.colorbar(image, ax=both, ticks=range(0, largest + 1, _tick_step(largest)))
    bar.set_label(f"rank (of {largest})", fontsize=_LABEL)
    bar.ax.tick_params(labelsize=_TICK)


def _kept_variance(report: dict[str, Any], side: str) -> "NDArray[np.float64]":
    """Share kept at ranks 0 to the largest of all heads, one row a head; smaller heads lose nothing beyond theirs."""
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


def _model_title(report: dict[str, Any]) -> str:
    """The model's name, or the end of it: names can be long paths."""
    name = str(report.get("model", "KV cache"))
    return name if len(name) <= 50 else f"...{name[-47:]}"


def _blank_figure(width: float, height: float) -> "Figure":
    """A white figure of ``width`` by ``height`` inches, 100 pixels each."""
    _require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100, facecolor="white", layout="constrained")


def _tidy(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=_TICK)


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SpectralError(
            'figures are drawn with matplotlib, which is not installed: run `pip install "unsloth-spectral[plot]"`'
        ) from error
