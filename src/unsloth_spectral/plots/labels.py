"""Direct labels: each text beside its point, without overlaps."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from unsloth_spectral.plots.style import PAPER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox
    from numpy.typing import NDArray

_POINT = 7.0  # half the width of a marker and a text's white rim, in pixels


@dataclass(frozen=True, slots=True)
class Label:
    """A text for the point ``(x, y)`` of the data; earlier labels get the better places."""

    text: str
    x: float
    y: float
    color: str
    size: float
    bold: bool = False


def place_labels(axes: "Axes", labels: Sequence[Label], lines: "Sequence[NDArray[np.float64]]") -> None:
    """Write each label near its point, where it covers no other label, no point, and little of ``lines``.

    Args:
        axes: its limits must be set: places are chosen in pixels, for this size of the figure.
        labels: in order of importance. A text without a free place is left out.
        lines: ``[points, 2]`` each, in data coordinates; their points are kept clear.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.patheffects import withStroke

    figure = axes.get_figure()
    assert figure is not None
    canvas = FigureCanvasAgg(figure)  # type: ignore[arg-type]
    canvas.draw()
    renderer = canvas.get_renderer()
    pixels = [axes.transData.transform(line) for line in lines]
    points = np.concatenate(pixels) if pixels else np.empty((0, 2))
    along = np.concatenate([_walk(line) for line in pixels]) if pixels else points
    boxes: list[Bbox] = [text.get_window_extent(renderer) for text in axes.texts]
    inside = axes.get_window_extent(renderer)
    per_point = figure.dpi / 72
    for label in labels:
        text = axes.annotate(
            label.text,
            (label.x, label.y),
            xytext=(0, 0),
            textcoords="offset points",
            ha="left",
            va="bottom",
            color=label.color,
            fontsize=label.size,
            fontweight="bold" if label.bold else "normal",
            parse_math=False,
            path_effects=[withStroke(linewidth=2.5, foreground=PAPER)],
            zorder=5,
        )
        start = text.get_window_extent(renderer)
        anchor = axes.transData.transform((label.x, label.y))
        best, cost = None, math.inf
        for left, bottom, price in _places(start.width, start.height):
            box = start.translated(anchor[0] + left - start.x0, anchor[1] + bottom - start.y0)
            free = not any(box.padded(3).overlaps(other) for other in boxes) and _within(box, inside)
            if free and not _count(points, box.padded(_POINT)):
                total = price + 8 * _count(along, box)
                if total < cost:
                    best, cost = (left, bottom, box), total
        if best is None:
            text.remove()
            continue
        left, bottom, box = best
        text.set_position(((anchor[0] + left - start.x0) / per_point, (anchor[1] + bottom - start.y0) / per_point))
        boxes.append(box)
        _lead(axes, anchor, box, label.color)


def _places(width: float, height: float) -> Iterator[tuple[float, float, float]]:
    """Candidate corners of a text of this size, in pixels from its point, each with a cost."""
    for distance in (11.0, 17.0, 26.0, 40.0, 58.0, 80.0, 105.0):
        for step in range(16):
            angle = 2 * math.pi * step / 16
            cos, sin = math.cos(angle), math.sin(angle)
            # The text's nearest edge, not its centre, is `distance` away, in whichever direction it lies.
            left = distance * cos - width * (1 - cos) / 2
            bottom = distance * sin - height * (1 - sin) / 2
            # Right of the point reads best, then above.
            yield left, bottom, distance + 3 * (1 - cos) + 2 * (1 - sin)


def _walk(line: "NDArray[np.float64]") -> "NDArray[np.float64]":
    """Points every five pixels along a line."""
    points = [line[:1]]
    for start, stop in pairwise(line):
        steps = max(1, int(np.hypot(*(stop - start)) / 5))
        points.append(start + (stop - start) * np.arange(1, steps + 1)[:, None] / steps)
    return np.concatenate(points)


def _count(points: "NDArray[np.float64]", box: "Bbox") -> int:
    x, y = points[:, 0], points[:, 1]
    return int(((x > box.x0) & (x < box.x1) & (y > box.y0) & (y < box.y1)).sum())


def _within(box: "Bbox", outer: "Bbox") -> bool:
    return bool(box.x0 >= outer.x0 and box.x1 <= outer.x1 and box.y0 >= outer.y0 and box.y1 <= outer.y1)


def _lead(axes: "Axes", anchor: "NDArray[np.float64]", box: "Bbox", color: str) -> None:
    """A thin line from a point to a text that is not right beside it."""
    nearest = np.array([np.clip(anchor[0], box.x0, box.x1), np.clip(anchor[1], box.y0, box.y1)])
    if np.hypot(*(nearest - anchor)) > 16:
        ends = axes.transData.inverted().transform([anchor, nearest])
        axes.plot(ends[:, 0], ends[:, 1], color=color, linewidth=0.8, alpha=0.7, zorder=1)
