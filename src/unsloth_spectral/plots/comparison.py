"""Figures of ``unsloth-spectral compare``."""

from typing import TYPE_CHECKING, Any

from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.plots.style import GREY, LABEL, TICK, TITLE, blank_figure, model_title, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def comparison_figure(result: dict[str, Any]) -> "Figure":
    """Draw a ``Comparison.to_dict``: bytes against context length, and fidelity of each cache.

    Args:
        result: the dictionary, or the content of a results file.

    Raises:
        InvalidArgumentError: the dictionary holds no caches.
        SpectralError: matplotlib is not installed.
    """
    if not result.get("caches"):
        raise InvalidArgumentError(
            f"a comparison figure needs results with 'caches', got {', '.join(map(repr, result)) or 'none'}: give what "
            "`unsloth-spectral compare --json` wrote"
        )
    figure = blank_figure(14, 6)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    _draw_context_bytes(left, result)
    _draw_fidelity(right, result)
    figure.suptitle(
        f"{model_title(result)}: KV cache of {result['context_length']:,} tokens, dense ({result['dtype']}) and "
        "spectral",
        fontsize=TITLE + 2,
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
            fontsize=TICK,
            annotation_clip=False,
        )
    axes.set_xlim(0, lengths[-1] * 1.28)
    axes.set_xticks([length for length in lengths if (length * 4) % lengths[-1] == 0])
    axes.set_ylim(0, None)
    axes.set_xlabel("context length, tokens", fontsize=LABEL)
    axes.set_ylabel("stored bytes, MB", fontsize=LABEL)
    axes.set_title("Memory of the cache against context length", fontsize=TITLE)
    tidy(axes)
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
            fontsize=TICK,
        )
    names = [
        f"{cache['name']}\n{cache['compression_factor']:.1f}x smaller, {cache['bits_per_element']:.1f} bits"
        for cache, _ in caches
    ]
    axes.set_yticks(range(len(caches)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, (largest or 1.0) * 1.9)
    axes.set_xlabel("KL divergence from the dense cache, nats (0: identical)", fontsize=LABEL)
    axes.set_title("Fidelity on the 256 tokens after the context", fontsize=TITLE)
    tidy(axes)


def _cache_colors(result: dict[str, Any]) -> list[str]:
    """Grey for the dense cache, Okabe and Ito's colours for the others."""
    palette = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
    colors: list[str] = []
    for cache in result["caches"]:
        colors.append(GREY if cache["name"] == "dense" else palette[len(colors) % len(palette) - 1])
    return colors
