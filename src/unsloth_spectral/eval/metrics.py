"""What the numbers of the tasks mean to a table: which way is better, and how they are written."""

import math
from collections.abc import Iterable

from unsloth_spectral.eval.results import Mean

_LOWER_IS_BETTER = frozenset(["kl", "perplexity", "loss", "error", "errors", "seconds", "bytes", "bits", "distance"])


def lower_is_better(name: str) -> bool:
    """Whether less of a metric is better, told from the words of its name; of one unheard of, more is."""
    return not _LOWER_IS_BETTER.isdisjoint(name.lower().replace("-", "_").split("_"))


def primary_metric(means: Iterable[Mean]) -> str | None:
    """The metric that stands for a task: ``kl`` where there is one, else the first; None where there is none."""
    names = list(dict.fromkeys(name for mean in means for name in mean.metrics))
    return "kl" if "kl" in names else next(iter(names), None)


def best_of(means: list[Mean]) -> dict[str, set[str]]:
    """The methods that are best in each metric, as far as a table's digits tell; the dense cache does not compete."""
    best: dict[str, set[str]] = {}
    rivals = [mean for mean in means if mean.cold_bits_per_element is not None and mean.complete]
    for name in dict.fromkeys(name for mean in rivals for name in mean.metrics):
        values = {m.method: m.metrics[name] for m in rivals if math.isfinite(m.metrics.get(name, math.nan))}
        if values:
            top = (min if lower_is_better(name) else max)(values.values())
            best[name] = {method for method, value in values.items() if figure_text(value) == figure_text(top)}
    return best


def figure_text(value: float) -> str:
    """Three digits, without an exponent where one can do without: ``0.00213``, ``14.3``, ``12,345``."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-5:
        return f"{value:.1e}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
