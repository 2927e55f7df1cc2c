"""Bits by layer: where a method that divides one budget among layers spends it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.plots.style import GREY, INK, LABEL, TICK, TITLE, panels, short, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = {"keys": "#0072b2", "values": "#d55e00"}


def allocation_figure(bits: Mapping[str, Mapping[str, Sequence[float]]], *, title: str) -> "Figure":
    """A panel a method: bits per element of the keys and of the values in each layer.

    Args:
        bits: by method, then ``keys`` and ``values``: a number a layer.
        title: of the figure.

    Raises:
        InvalidArgumentError: there is no method.
        SpectralError: matplotlib is not installed.
    """
    if not bits:
        raise InvalidArgumentError("an allocation figure needs a method with bits by layer, got none")
    figure, grid = panels(len(bits), 3, 3.9, 2.4)
    from matplotlib.ticker import MaxNLocator

    for axes, (method, sides) in zip(grid, bits.items(), strict=True):
        means = []
        for side, row in sides.items():
            axes.step(range(len(row)), row, where="mid", color=_COLORS[side], linewidth=1.8, gid=side,
                      linestyle="-" if side == "keys" else (0, (5, 1.5)))  # fmt: skip
            means.append(f"{side} {sum(row) / len(row):.2f}")
        axes.set_title(short(method, 36), fontsize=TICK, color=INK, fontweight="bold", parse_math=False)
        axes.text(0.99, 0.04, "mean: " + ", ".join(means), transform=axes.transAxes, ha="right", fontsize=TICK - 2,
                  color=GREY)  # fmt: skip
        tidy(axes)
        axes.tick_params(labelsize=TICK - 1)
        axes.grid(color=GREY, alpha=0.18, linewidth=0.8, axis="y")
    grid[0].set_ylim(0, 1.1 * max(max(row) for sides in bits.values() for row in sides.values()))
    grid[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    for x, (side, color) in zip((0.02, 0.19), _COLORS.items(), strict=True):
        dash = "—" if side == "keys" else "- -"
        grid[0].text(x, 0.04, f"{dash} {side}", transform=grid[0].transAxes, color=color, fontsize=TICK - 1)
    figure.supxlabel("layer", fontsize=LABEL, color=INK)
    figure.supylabel("bits per element", fontsize=LABEL, color=INK)
    figure.suptitle(title, fontsize=TITLE + 1, color=INK, parse_math=False)
    return figure
