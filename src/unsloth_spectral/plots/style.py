"""Size, colours and type of all figures, and writing them. It uses no pyplot, so it needs no display and has no global
state."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unsloth_spectral.errors import SpectralError
from unsloth_spectral.files import check_target, replacing

# matplotlib is an extra, and slow to import: the functions import it.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
GREY = "#666666"
# Text and axes, and the paper: `inline` makes variables of these, `GREY` and `PALETTE` for the page's dark scheme.
INK, PAPER = "#1f2328", "#ffffff"
# Okabe and Ito's hues, spread to ten, each dark enough for small type on white.
PALETTE = (
    "#0072b2", "#d55e00", "#00855f", "#b5508a", "#9a6f00", "#5b5bd0", "#c2304f", "#3a86a8", "#6b7d1e", "#8a5a44",
)  # fmt: skip
MARKERS = "osD^vPX*hp"
LINES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))
TITLE, LABEL, TICK = 13, 12, 11


def check_figure_target(path: str | os.PathLike[str]) -> Path:
    """The path of a figure, checked before the work that the figure will show.

    Raises:
        InvalidArgumentError: the suffix is not .png, .svg or .pdf, or the folder is missing or cannot be written to.
        SpectralError: matplotlib is not installed.
    """
    target = check_target(path, FORMATS)
    require_matplotlib()
    return target


def save_figure(figure: "Figure", path: str | os.PathLike[str]) -> None:
    """Write ``figure`` to ``path``, whole or not at all, in the format that the suffix names.

    Raises:
        InvalidArgumentError: the suffix is not .png, .svg or .pdf, or the folder is missing or cannot be written to.
    """
    target = check_target(path, FORMATS)
    with replacing(target) as temporary:
        figure.savefig(temporary, format=target.suffix[1:].lower())


def model_title(report: dict[str, Any]) -> str:
    """The model's name, shortened to its end if it is a long path."""
    name = str(report.get("model", "KV cache"))
    return name if len(name) <= 50 else f"...{name[-47:]}"


def blank_figure(width: float, height: float) -> "Figure":
    """A white figure of ``width`` by ``height`` inches, 100 pixels each."""
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100, facecolor="white", layout="constrained")


def tidy(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=TICK)


def require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SpectralError(
            'figures are drawn with matplotlib, which is not installed: run `pip install "unsloth-spectral[plot]"`'
        ) from error


def family_colors(families: Iterable[str]) -> dict[str, str]:
    """A colour for each family in order, grey for the dense cache; equal lists get equal colours."""
    others = [family for family in dict.fromkeys(families) if family != "dense"]
    colors = {family: PALETTE[index % len(PALETTE)] for index, family in enumerate(others)}
    return {"dense": GREY, **colors}


def family_markers(families: Iterable[str]) -> dict[str, str]:
    """A marker for each family, for prints without colour."""
    return {family: MARKERS[index % len(MARKERS)] for index, family in enumerate(dict.fromkeys(families))}


def setting_of(method: str, family: str) -> str:
    """The part of a method's name behind its family: ``16/32`` from ``rank 16/32``, or empty."""
    family_words = family.split()
    return " ".join(word for word in method.split() if word not in family_words)


def short(name: str, limit: int = 28) -> str:
    """``name``, cut to ``limit`` characters."""
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


def log_values(axes: "Axes", low: float, high: float) -> None:
    """A logarithmic vertical axis for values from ``low`` to ``high``, with enough ticks."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.set_ylim(low / 2, high * 2)
    # Powers of ten alone leave a narrow range with one tick.
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 1e4 else (1.0, 3.0)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(plain_number)


def plain_number(value: float, _: object = None) -> str:
    """A tick of a logarithmic axis, without an exponent."""
    return f"{value:.10f}".rstrip("0").rstrip(".")


def panels(count: int, columns: int, width: float, height: float) -> "tuple[Figure, list[Axes]]":
    """A figure of ``count`` panels, ``width`` by ``height`` inches each, with shared scales."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = blank_figure(max(width * columns, 6), height * rows + 0.8)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel().tolist()
    for spare in grid[count:]:
        spare.set_visible(False)
    for axes in grid[count - columns : count]:
        axes.tick_params(labelbottom=True)
    return figure, grid[:count]
