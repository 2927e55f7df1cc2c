"""A figure as inline SVG, in the colours of the page around it."""

import io
import re
from typing import TYPE_CHECKING

from unsloth_spectral.plots.style import GREY, INK, PALETTE, PAPER

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Each colour of the style becomes a variable of the page, so that its dark scheme can lighten it.
_VARIABLES = {INK: "ink", "#000000": "ink", PAPER: "paper", GREY: "muted"}
_VARIABLES |= {color: f"series-{index}" for index, color in enumerate(PALETTE)}


def inline_svg(figure: "Figure", prefix: str) -> str:
    """The self-contained ``<svg>`` element of a figure, without a fixed size.

    Colours of ``style`` are written ``var(--plot-ink, #1f2328)``, ``--plot-paper``, ``--plot-muted`` and
    ``--plot-series-0`` to ``-9``: a page may set these; the defaults are the figure's own colours.

    Args:
        figure: any of this package's.
        prefix: of all ids; it must differ between the figures of a page.
    """
    import matplotlib

    buffer = io.StringIO()
    # Text as outlines: labels were placed by the widths of one font, and those of another could overlap. Without date
    # and with a fixed salt for ids, equal figures give equal bytes.
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": prefix}):
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, body = svg.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    # Black is SVG's default fill, so matplotlib does not write it out.
    head += f' style="fill: var(--plot-ink, {INK})"'
    # Unused ids are dropped; the others must differ from those of the page's other figures.
    used = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', body))
    body = re.sub(r'\sid="([^"]*)"', lambda match: f' id="{prefix}-{match[1]}"' if match[1] in used else "", body)
    body = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{prefix}-", body)
    for color, name in _VARIABLES.items():
        body = re.sub(rf"(?<=: ){color}\b", f"var(--plot-{name}, {color})", body)
    return f"{head}>{body}"
