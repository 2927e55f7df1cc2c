"""Statistics of a cache: tokens, bytes, ranks, bits and errors."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class LayerStats:
    """One layer's cache. Bytes are those of the storages torch has allocated, metadata included. Tensors that all
    layers share, such as the tokens' positions, are counted in the first.

    Attributes:
        kind: ``"spectral"``, or the class name of transformers' own layer (sliding window ...).
        num_tokens: tokens in the layer; ``sealed_tokens`` of them are compressed.
        sink_bytes, cold_bytes, residual_bytes: bytes of the three tiers.
        dense_bytes: bytes a dense cache of the same dtype takes for the same tokens.
        elements: numbers a dense cache would hold, for ``bits_per_element``.
        cold_elements: numbers a dense cache would hold for the tokens of the cold tier.
        rank_keys, rank_values: ranks of the rank codec's blocks; None while there are none.
        bits_keys, bits_values: bits per element of the spectral codec's codes, without metadata; None while there are
            none.
        basis: a hash of the model's basis, if the sealed keys are coded in it.
        basis_bytes: its bytes. All caches of the model share it, so ``cold_bytes`` does not have them.
        room_bytes: those of the tiers' bytes that wait for tokens still to come.
        error_keys, error_values: mean relative error of the sealed blocks; None while nothing is sealed. The
            norm is Frobenius, and that of the queries for the spectral codec's keys.
        exact_blocks: blocks kept exact because they held NaN or infinity, or could not be factorized.
        svd_fallbacks: matrices for which the randomized SVD gave way to the exact one.
        seal_seconds: time that sealing has taken on the host.
    """

    kind: str
    num_tokens: int
    sealed_tokens: int = 0
    sink_bytes: int = 0
    cold_bytes: int = 0
    residual_bytes: int = 0
    dense_bytes: int = 0
    elements: int = 0
    cold_elements: int = 0
    rank_keys: int | None = None
    rank_values: int | None = None
    bits_keys: float | None = None
    bits_values: float | None = None
    basis: str | None = None
    basis_bytes: int = 0
    room_bytes: int = 0
    error_keys: float | None = None
    error_values: float | None = None
    exact_blocks: int = 0
    svd_fallbacks: int = 0
    seal_seconds: float = 0.0

    @property
    def stored_bytes(self) -> int:
        return self.sink_bytes + self.cold_bytes + self.residual_bytes


@dataclass(frozen=True, slots=True)
class CacheStats:
    """The whole cache: the sums of its layers, and the layers.

    ``cold_bits_per_element`` covers the cold tier alone, metadata included; None while the tier is empty.
    ``room_bytes`` are those of ``stored_bytes`` that wait for tokens still to come. ``basis_bytes`` are kept once for
    all caches of the model, beside ``stored_bytes``.
    """

    layers: tuple[LayerStats, ...] = field(repr=False)
    num_tokens: int
    stored_bytes: int
    room_bytes: int
    dense_bytes: int
    compression_factor: float
    bits_per_element: float
    exact_blocks: int
    svd_fallbacks: int
    seal_seconds: float
    cold_bits_per_element: float | None
    basis_bytes: int

    @classmethod
    def of(cls, layers: list[LayerStats]) -> "CacheStats":
        """Sum up ``layers``. An empty cache has factor 1 and 0 bits per element."""
        stored = sum(layer.stored_bytes for layer in layers)
        dense = sum(layer.dense_bytes for layer in layers)
        elements = sum(layer.elements for layer in layers)
        return cls(
            layers=tuple(layers),
            num_tokens=max((layer.num_tokens for layer in layers), default=0),
            stored_bytes=stored,
            room_bytes=sum(layer.room_bytes for layer in layers),
            dense_bytes=dense,
            compression_factor=dense / stored if stored else 1.0,
            bits_per_element=8 * stored / elements if elements else 0.0,
            cold_bits_per_element=_ratio(
                8 * sum(layer.cold_bytes for layer in layers), sum(layer.cold_elements for layer in layers)
            ),
            basis_bytes=sum(layer.basis_bytes for layer in layers),
            exact_blocks=sum(layer.exact_blocks for layer in layers),
            svd_fallbacks=sum(layer.svd_fallbacks for layer in layers),
            seal_seconds=sum(layer.seal_seconds for layer in layers),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return asdict(self)


def _ratio(amount: float, count: float) -> float | None:
    return amount / count if count else None
