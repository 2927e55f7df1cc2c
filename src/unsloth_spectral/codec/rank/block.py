"""Tokens sealed by the rank codec: blocks of equal length, stacked."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unsloth_spectral.codec.block import Amounts, Block
from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.codec.rank import factors
from unsloth_spectral.codec.rank.factors import RankFactors
from unsloth_spectral.codec.tensors import TensorFunction, TokenShape
from unsloth_spectral.fields import Field, Fields


@dataclass(frozen=True, slots=True, eq=False)
class RankBlock:
    """One or more consecutive sealed blocks of equal length, stacked so that one batched product serves them all.

    Immutable: sealing more tokens, cropping or reordering makes a new object; no token is encoded twice.

    Attributes:
        keys, values: factors with leading dimensions ``(batch, num_key_value_heads, num_blocks)``.
        dtype: the model's dtype, the dtype of ``reconstruct``.
    """

    kind: ClassVar[str] = "rank"
    keys: RankFactors
    values: RankFactors
    dtype: torch.dtype

    @property
    def num_key_value_heads(self) -> int:
        return self.keys.codes.shape[1]

    @property
    def num_blocks(self) -> int:
        return self.keys.codes.shape[2]

    @property
    def block_length(self) -> int:
        return self.keys.num_tokens

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_length

    @property
    def value_dim(self) -> int:
        return self.values.basis.shape[-1]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    @property
    def num_fallbacks(self) -> int:
        return self.keys.num_fallbacks + self.values.num_fallbacks

    @property
    def is_finite(self) -> bool:
        return self.keys.is_finite and self.values.is_finite

    @property
    def errors(self) -> tuple[Tensor, Tensor]:
        return self.keys.relative_error, self.values.relative_error

    @property
    def amounts(self) -> Amounts:
        return Amounts(rank_keys=self.keys.rank, rank_values=self.values.rank)

    @property
    def shared_tensors(self) -> tuple[Tensor, ...]:
        return ()

    def scores(self, query: Tensor) -> Tensor:
        per_block = self.keys.scores(query.unsqueeze(2))
        return per_block.transpose(2, 3).flatten(-2)

    def combine(self, weights: Tensor) -> Tensor:
        per_block = weights.unflatten(-1, (self.num_blocks, self.block_length)).transpose(2, 3)
        return self.values.combine(per_block).sum(2)

    def reconstruct(self) -> tuple[Tensor, Tensor]:
        keys, values = self.keys.reconstruct().flatten(2, 3), self.values.reconstruct().flatten(2, 3)
        return keys.to(self.dtype), values.to(self.dtype)

    def tiles(self, num_tokens: int) -> Iterator[Block]:
        step = max(1, num_tokens // self.block_length)
        for start in range(0, self.num_blocks, step):
            yield self._blocks(start, start + step)

    def map_batch(self, function: TensorFunction) -> "RankBlock":
        return RankBlock(self.keys.map(function), self.values.map(function), self.dtype)

    def first_tokens(self, num_tokens: int) -> list[Block]:
        num_whole, rest = divmod(num_tokens, self.block_length)
        pieces: list[Block] = []
        if num_whole:
            pieces.append(self._blocks(0, num_whole).map_batch(torch.clone))
        if rest:
            last = self._blocks(num_whole, num_whole + 1).map_batch(torch.clone)
            pieces.append(RankBlock(last.keys.first_tokens(rest), last.values.first_tokens(rest), self.dtype))
        return pieces

    def stack(self, other: "RankBlock") -> "RankBlock":
        """This block followed by ``other``, which has the same block length; codes are copied, not encoded again."""
        return RankBlock(
            self.keys.concatenate(other.keys, dim=2), self.values.concatenate(other.values, dim=2), self.dtype
        )

    def to_fields(self) -> dict[str, Field]:
        return {"keys": self.keys.to_fields(), "values": self.values.to_fields()}

    @classmethod
    def from_fields(cls, fields: Fields, shape: TokenShape) -> "RankBlock":
        leading = (shape.batch, shape.heads)
        keys = RankFactors.from_fields(fields.sub("keys"), leading, shape.key_dim)
        values = RankFactors.from_fields(fields.sub("values"), leading, shape.value_dim)
        fields.require(keys.codes.shape[2::2] == values.codes.shape[2::2], "keys and values of the same tokens")
        return cls(keys, values, shape.dtype)

    def _blocks(self, start: int, stop: int) -> "RankBlock":
        return self.map_batch(lambda tensor: tensor[:, :, start:stop])


def seal(keys: Tensor, values: Tensor, config: SpectralConfig) -> RankBlock:
    """Encode ``[B, H, num_blocks * block_size, head_dim]`` keys and values, all heads and blocks in one batch.

    Raises:
        InvalidArgumentError: a rank exceeds ``head_dim``, or a value is not finite.
    """
    shape = (-1, config.block_size)
    assert config.rank_keys is not None, "not a config of the rank codec"
    assert config.rank_values is not None
    return RankBlock(
        factors.encode(keys.unflatten(2, shape), config.rank_keys),
        factors.encode(values.unflatten(2, shape), config.rank_values),
        keys.dtype,
    )
