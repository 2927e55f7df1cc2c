"""The tasks by the names that the command line takes."""

from collections.abc import Callable

from unsloth_spectral.eval.tasks.base import Task
from unsloth_spectral.eval.tasks.drift import Drift
from unsloth_spectral.eval.tasks.fidelity import Fidelity
from unsloth_spectral.eval.tasks.lengths import Lengths
from unsloth_spectral.eval.tasks.needle import NeedleDepth, Needles
from unsloth_spectral.eval.tasks.ruler import Ruler

# Factories, as a task keeps what the dense cache did: every run has its own.
TASKS: dict[str, Callable[..., Task]] = {
    "fidelity": Fidelity,
    "needle": Needles,
    "needle-depth": NeedleDepth,
    "ruler": Ruler,
    "drift": Drift,
    "lengths": Lengths,
}
