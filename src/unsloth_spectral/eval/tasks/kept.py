"""What the dense cache did on the case at hand, kept for the methods that come after it."""

from collections.abc import Callable
from typing import Generic, TypeVar

from unsloth_spectral.integrations.models import LoadedModel

T = TypeVar("T")


class Kept(Generic[T]):
    """One thing at most: what is kept of one model and case never serves another."""

    def __init__(self) -> None:
        self._tiers: tuple[LoadedModel, str, T] | None = None

    def get(self, loaded: LoadedModel, case: str, make: Callable[[], T], *, anew: bool) -> T:
        """What is kept of this case; where that is nothing, or ``anew`` asks, ``make`` makes it first."""
        held = self._tiers
        if anew or held is None or held[0] is not loaded or held[1] != case:
            # Let go of the old before there is a new one: logits are large.
            self._tiers = None
            held = self._tiers = (loaded, case, make())
        return held[2]
