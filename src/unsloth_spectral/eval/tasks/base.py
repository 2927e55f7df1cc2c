"""The interface of a task."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from unsloth_spectral.eval.methods.base import Footprint, Method
from unsloth_spectral.eval.progress import OnProgress
from unsloth_spectral.integrations.models import LoadedModel


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one method on one case of one task.

    Attributes:
        metrics: figures by name; a report shows their means over cases.
        footprint: of the cache after the prefill.
        predictions: the model's texts and the right answers, for people to read; each ready for JSON.
        series: rows of numbers by name, for pictures (KL along a generation ...).
    """

    metrics: dict[str, float]
    footprint: Footprint
    predictions: list[dict[str, Any]] = field(default_factory=list)
    series: dict[str, list[float]] = field(default_factory=dict)


class Task(Protocol):
    """A list of cases, each of which runs with every method.

    The runner runs all methods on one case before the next case, the dense cache first. So a task may cache the dense
    cache's results on the current case.
    """

    @property
    def name(self) -> str: ...

    def cases(self, loaded: LoadedModel) -> Sequence[str]:
        """Names of the cases in order. Equal settings and models give equal names, so a killed run can continue."""
        ...

    def run(self, loaded: LoadedModel, method: Method, case: str, on_progress: OnProgress | None = None) -> Outcome:
        """Run one method on one case, under ``torch.inference_mode``."""
        ...
