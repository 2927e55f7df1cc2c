"""Figures of results."""

from unsloth_spectral.plots.allocation import allocation_figure
from unsloth_spectral.plots.comparison import comparison_figure
from unsloth_spectral.plots.drift import drift_figure
from unsloth_spectral.plots.frontier import frontier_figure
from unsloth_spectral.plots.heatmap import heatmap_figure, place_of
from unsloth_spectral.plots.inline import inline_svg
from unsloth_spectral.plots.lengths import length_of, lengths_figure
from unsloth_spectral.plots.spectrum import spectrum_figure
from unsloth_spectral.plots.style import FORMATS, check_figure_target, save_figure

__all__ = [
    "FORMATS",
    "allocation_figure",
    "check_figure_target",
    "comparison_figure",
    "drift_figure",
    "frontier_figure",
    "heatmap_figure",
    "inline_svg",
    "length_of",
    "lengths_figure",
    "place_of",
    "save_figure",
    "spectrum_figure",
]
