"""Cache of the dense run's result on the current case, for the methods that follow."""

from collections.abc import Callable
from typing import Generic, TypeVar

from unsloth_spectral.integrations.models import LoadedModel

T = TypeVar("T")


class DenseReference(Generic[T]):
    """Holds the result of one model and case; another model or case replaces it."""

    def __init__(self) -> None:
        self._entry: tuple[LoadedModel, str, T] | None = None

    def get(self, loaded: LoadedModel, case: str, make: Callable[[], T], *, anew: bool) -> T:
        """The result of this model and case. ``make`` computes it if it is missing, or if ``anew``."""
        entry = self._entry
        if anew or entry is None or entry[0] is not loaded or entry[1] != case:
            # Release the old result first: logits are large.
            self._entry = None
            entry = self._entry = (loaded, case, make())
        return entry[2]
