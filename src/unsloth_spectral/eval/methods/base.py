"""The interface of a method: a way to store the cache, with its footprint."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from unsloth_spectral.cache.stats import CacheStats

# The name of the reference that every run measures first.
DENSE = "dense"


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one cache after a prefill, all layers and all metadata.

    Attributes:
        stored_bytes: of the whole cache, exact tiers included. For a reference implementation that only simulates its
            storage: the bytes that its codes, scales and tables would take when packed.
        dense_bytes: of a dense cache in the model's dtype for the same tokens.
        cold_bits_per_element: stored bits of the compressed tokens alone, metadata included, per number that a dense
            cache keeps for them; None if nothing is compressed.
    """

    stored_bytes: int
    dense_bytes: int
    cold_bits_per_element: float | None

    @classmethod
    def counted(cls, cache: Any) -> "Footprint":
        """The footprint of a cache that has ``stats()``: this library's own caches and its stand-ins for peers."""
        stats: CacheStats = cache.stats()
        return cls(stats.stored_bytes, stats.dense_bytes, stats.cold_bits_per_element)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return asdict(self)


def nothing_by_layer(cache: Any) -> dict[str, list[float]]:
    """``Method.by_layer`` of a method that treats all layers alike."""
    return {}


@dataclass(frozen=True, slots=True)
class Method:
    """A way to store the cache, under its name in results.

    Attributes:
        name: for the command line and tables, for example ``dense``, ``kivi 2`` or ``spectral balanced``.
        family: shared by methods that differ only in a setting; a picture joins them by a line.
        make_cache: a fresh transformers ``Cache`` for a model.
        footprint: of a cache that ``make_cache`` made and a prefill filled.
        by_layer: figures of such a cache by name, such as ``bits_keys``, one number per layer; NaN where a layer has
            none.
    """

    name: str
    family: str
    make_cache: Callable[[Any], Any]
    footprint: Callable[[Any], Footprint]
    by_layer: Callable[[Any], dict[str, list[float]]] = nothing_by_layer
