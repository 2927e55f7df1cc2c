"""Tasks by their names on the command line."""

from collections.abc import Callable

from unsloth_spectral.eval.tasks.base import Task
from unsloth_spectral.eval.tasks.drift import Drift
from unsloth_spectral.eval.tasks.fidelity import Fidelity
from unsloth_spectral.eval.tasks.lengths import Lengths
from unsloth_spectral.eval.tasks.needle import NeedleDepth, Needles
from unsloth_spectral.eval.tasks.ruler import Ruler

# Factories: a task caches the dense cache's results, so every run needs its own.
TASKS: dict[str, Callable[..., Task]] = {
    "fidelity": Fidelity,
    "needle": Needles,
    "needle-depth": NeedleDepth,
    "ruler": Ruler,
    "drift": Drift,
    "lengths": Lengths,
}
