"""Statistics of one layer, computed from its tiers."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import cast

import torch
from torch import Tensor

from unsloth_spectral.cache.positions import PositionLog
from unsloth_spectral.cache.residual import ResidualBuffer
from unsloth_spectral.cache.sink_tokens import SinkTokens
from unsloth_spectral.cache.stats import LayerStats
from unsloth_spectral.codec.block import Amounts, Block, ExactBlock, SealedBlock
from unsloth_spectral.fields import Field, Fields


@dataclass(frozen=True, slots=True)
class Tally:
    """Running totals over the sealings of a layer: see ``LayerStats``."""

    exact_blocks: int = 0
    svd_fallbacks: int = 0
    seal_seconds: float = 0.0

    def add(self, blocks: Sequence[Block], block_size: int, seconds: float) -> "Tally":
        """The totals after one more sealing, of ``blocks``; exact blocks are counted in units of ``block_size``."""
        exact = [block for block in blocks if isinstance(block, ExactBlock)]
        return Tally(
            self.exact_blocks + sum(-(-block.num_tokens // block_size) for block in exact),
            self.svd_fallbacks + sum(block.num_fallbacks for block in sealed_of(blocks)),
            self.seal_seconds + seconds,
        )

    def to_fields(self) -> dict[str, Field]:
        return asdict(self)

    @classmethod
    def from_fields(cls, fields: Fields) -> "Tally":
        return cls(fields.integer("exact_blocks"), fields.integer("svd_fallbacks"), fields.number("seal_seconds"))


class SharedBytes:
    """Bytes of storages that layers share, each counted for the first layer that has it."""

    def __init__(self) -> None:
        self._counted: set[tuple[torch.device, int]] = set()

    def of(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of the storages behind ``tensors`` that were not counted before."""
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            place = tensor.device, storage.data_ptr()
            total += 0 if place in self._counted else storage.nbytes()
            self._counted.add(place)
        return total


def count(
    sinks: SinkTokens | None,
    cold: Sequence[Block],
    residual: ResidualBuffer,
    positions: PositionLog,
    codec_bytes: int,
    noted_bytes: int,
    tally: Tally,
    shared: SharedBytes,
) -> LayerStats:
    """A layer's statistics. ``codec_bytes`` are added to the cold tier's, ``noted_bytes`` to the residual's."""
    sealed = sealed_of(cold)
    amounts = sealed[0].amounts if sealed else Amounts()
    in_basis = [block.amounts for block in sealed if block.amounts.basis is not None]
    if in_basis:
        amounts = replace(amounts, basis=in_basis[0].basis, basis_bytes=in_basis[0].basis_bytes)
    tail = residual.block
    heads = tail.keys.shape[0] * tail.keys.shape[1]
    elements_per_token = heads * (tail.keys.shape[-1] + tail.values.shape[-1])
    dense_per_token = sum(heads * side.shape[-1] * side.element_size() for side in (tail.keys, tail.values))
    num_cold = sum(block.num_tokens for block in cold)
    cold_bytes = sum(block.nbytes for block in cold) + codec_bytes
    cold_bytes += shared.of(tensor for block in sealed for tensor in block.shared_tensors)
    num_tokens = (0 if sinks is None else sinks.num_leading) + num_cold + residual.num_tokens
    return LayerStats(
        kind="spectral",
        num_tokens=num_tokens,
        sealed_tokens=sum(block.num_tokens for block in sealed),
        sink_bytes=0 if sinks is None else sinks.nbytes,
        cold_bytes=cold_bytes,
        residual_bytes=residual.nbytes + noted_bytes + shared.of(positions.tensors),
        room_bytes=max(0, residual.nbytes - residual.num_tokens * dense_per_token),
        dense_bytes=num_tokens * dense_per_token,
        elements=num_tokens * elements_per_token,
        cold_elements=num_cold * elements_per_token,
        **asdict(amounts),
        error_keys=_mean([block.errors[0] for block in sealed]),
        error_values=_mean([block.errors[1] for block in sealed]),
        exact_blocks=tally.exact_blocks,
        svd_fallbacks=tally.svd_fallbacks,
        seal_seconds=tally.seal_seconds,
    )


def sealed_of(blocks: Iterable[Block]) -> list[SealedBlock]:
    """The blocks that a codec made: all except exact ones."""
    return [cast(SealedBlock, block) for block in blocks if not isinstance(block, ExactBlock)]


def _mean(errors: list[Tensor]) -> float | None:
    return float(torch.cat([error.float().flatten() for error in errors]).mean()) if errors else None
