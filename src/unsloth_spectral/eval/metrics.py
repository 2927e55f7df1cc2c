"""How tables treat metrics: which direction is better, and how numbers are written."""

import math
from collections.abc import Iterable

from unsloth_spectral.eval.results import Mean

_LOWER_IS_BETTER = frozenset(["kl", "perplexity", "loss", "error", "errors", "seconds", "bytes", "bits", "distance"])


def lower_is_better(name: str) -> bool:
    """True if a lower value is better, by the words of the metric's name; an unknown name means higher is better."""
    return not _LOWER_IS_BETTER.isdisjoint(name.lower().replace("-", "_").split("_"))


def primary_metric(means: Iterable[Mean]) -> str | None:
    """The metric that represents a task: ``kl`` if it has one, else its first; None if it has none."""
    names = list(dict.fromkeys(name for mean in means for name in mean.metrics))
    return "kl" if "kl" in names else next(iter(names), None)


def best_of(means: list[Mean]) -> dict[str, set[str]]:
    """The best methods in each metric, compared by the digits that a table shows. The dense cache is left out."""
    best: dict[str, set[str]] = {}
    rivals = [mean for mean in means if mean.cold_bits_per_element is not None and mean.complete]
    for name in dict.fromkeys(name for mean in rivals for name in mean.metrics):
        values = {m.method: m.metrics[name] for m in rivals if math.isfinite(m.metrics.get(name, math.nan))}
        if values:
            top = (min if lower_is_better(name) else max)(values.values())
            best[name] = {method for method, value in values.items() if figure_text(value) == figure_text(top)}
    return best


def figure_text(value: float) -> str:
    """Three digits, without an exponent where possible: ``0.00213``, ``14.3``, ``12,345``."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-5:
        return f"{value:.1e}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
