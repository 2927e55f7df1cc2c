"""Quality against bytes: all methods in one picture."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.eval.results import Point
from unsloth_spectral.plots.labels import Label, place_labels
from unsloth_spectral.plots.style import (
    GREY,
    INK,
    LABEL,
    TICK,
    TITLE,
    blank_figure,
    family_colors,
    family_markers,
    log_values,
    setting_of,
    short,
    tidy,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

_TICKS = (0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def frontier_figure(
    points: Sequence[Point],
    *,
    title: str,
    metric: str,
    lower_is_better: bool,
    dense: float | None = None,
    dense_bits: int = 16,
) -> "Figure":
    """Cold bits per element against a metric: one line per family, each point labelled with its setting.

    Args:
        points: of ``eval.results.frontier``.
        title: of the figure.
        metric: the label of the vertical axis, which is logarithmic if lower is better and all values are positive.
        lower_is_better: which end of the axis is good; an arrow in a corner shows it.
        dense: the dense cache's value, drawn as a line; None draws a note instead, as for 0 on a logarithmic axis.
        dense_bits: bits per element of the dense cache.

    Raises:
        InvalidArgumentError: there is no point.
        SpectralError: matplotlib is not installed.
    """
    if not points:
        raise InvalidArgumentError("a frontier needs at least one method that compresses, got none")
    figure = blank_figure(11, 7.5)
    axes = figure.subplots()
    families: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: (point.bits, -point.value)):
        families.setdefault(point.family, []).append(point)
    colors, markers = family_colors(point.family for point in points), family_markers(p.family for p in points)
    is_log = lower_is_better and any(point.value > 0 for point in points)
    floor = min((point.value for point in points if point.value > 0), default=1.0) / 2
    lines = {}
    for family, members in families.items():
        # A logarithmic axis has no 0: such a point lies on its floor.
        line = np.array([(point.bits, max(point.value, floor) if is_log else point.value) for point in members])
        axes.plot(
            *line.T, color=colors[family], marker=markers[family], markersize=7, linewidth=1.8, gid=family, zorder=3
        )
        lines[family] = line
    _set_scales(axes, np.concatenate(list(lines.values())), is_log, None if is_log and not dense else dense)
    axes.set_xlabel("bits per element of the compressed tokens, metadata included", fontsize=LABEL, color=INK)
    axes.set_ylabel(metric, fontsize=LABEL, color=INK, parse_math=False)
    axes.set_title(title, fontsize=TITLE + 1, color=INK, parse_math=False, loc="left")
    _draw_dense(axes, dense, dense_bits, lower_is_better)
    tidy(axes)
    axes.grid(color=GREY, alpha=0.18, linewidth=0.8)
    place_labels(axes, _labels(axes, families, lines, colors), list(lines.values()))
    return figure


def _set_scales(axes: "Axes", points: "NDArray[np.float64]", is_log: bool,
                dense: float | None) -> None:  # fmt: skip
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    low, high = points[:, 0].min() / 1.25, points[:, 0].max() * 1.5
    axes.set_xlim(low, high)
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    values = points[:, 1] if dense is None else np.append(points[:, 1], dense)
    if is_log:
        log_values(axes, values.min(), values.max())
    else:
        room = (values.max() - values.min() or 1.0) * 0.12
        axes.set_ylim(values.min() - room, values.max() + room)


def _draw_dense(axes: "Axes", dense: float | None, bits: int, lower_is_better: bool) -> None:
    """Draw the dense cache as a line or a note, and mark the good corner."""
    low, high = axes.get_ylim()
    text = f"dense, {bits} bits"
    if dense is not None and low <= dense <= high:
        axes.axhline(dense, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)), zorder=2)
        axes.annotate(
            f"{text}: {dense:.3g} ",
            (1, dense),
            xycoords=("axes fraction", "data"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
            color=GREY,
            fontsize=TICK,
        )
    else:
        note = f"{text}: {0 if dense is None else dense:.3g}  ↘"
        axes.annotate(note, (0.995, 0.015), xycoords="axes fraction", ha="right", color=GREY, fontsize=TICK)
    axes.annotate(
        "better ↙" if lower_is_better else "better ↖",
        (0.01, 0.015 if lower_is_better else 0.985),
        xycoords="axes fraction",
        va="bottom" if lower_is_better else "top",
        color=GREY,
        fontsize=TICK,
        style="italic",
    )


def _labels(
    axes: "Axes",
    families: dict[str, list[Point]],
    lines: "dict[str, NDArray[np.float64]]",
    colors: dict[str, str],
) -> list[Label]:
    """Labels: each family at the less crowded end of its line, then the setting of each point."""
    names, settings = [], []
    all_points = axes.transData.transform(np.concatenate(list(lines.values())))
    for family, members in families.items():
        line, color = lines[family], colors[family]
        alone = len(members) == 1
        ends = axes.transData.transform(line[[0, -1]])
        # The nearest point is the end itself; the distance of the next two measures how crowded it is.
        room = [np.sort(np.hypot(*(all_points - end).T))[:3].sum() for end in ends]
        end = line[0] if room[0] > room[1] else line[-1]
        names.append(
            Label(short(members[0].method if alone else family), float(end[0]), float(end[1]), color, LABEL, bold=True)
        )
        for point, (x, y) in zip(members, line, strict=True):
            setting = setting_of(point.method, family)
            if setting and not alone:
                settings.append(Label(short(setting, 20), x, y, color, TICK - 2))
    return names + settings
