"""What the evaluation asks of a task."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from unsloth_spectral.eval.methods.base import Footprint, Method
from unsloth_spectral.eval.progress import OnProgress
from unsloth_spectral.integrations.models import LoadedModel


@dataclass(frozen=True, slots=True)
class Outcome:
    """One method on one case of one task.

    Attributes:
        metrics: figures by name; a report takes their means over cases.
        footprint: of the cache after the prefill.
        predictions: what the model wrote and what was wanted, for people to read; each ready for JSON.
        series: longer rows of numbers by name, for pictures (KL along a generation ...).
    """

    metrics: dict[str, float]
    footprint: Footprint
    predictions: list[dict[str, Any]] = field(default_factory=list)
    series: dict[str, list[float]] = field(default_factory=dict)


class Task(Protocol):
    """A task is a number of cases, each run with every method. The runner runs all methods on a case before the next,
    the dense cache first, so a task may keep what the dense cache did on the case at hand."""

    @property
    def name(self) -> str: ...

    def cases(self, loaded: LoadedModel) -> Sequence[str]:
        """Names of the cases, in order; equal for equal settings and models, so that a killed run can go on."""
        ...

    def run(self, loaded: LoadedModel, method: Method, case: str, on_progress: OnProgress | None = None) -> Outcome:
        """One method on one case, under ``torch.inference_mode``."""
        ...
