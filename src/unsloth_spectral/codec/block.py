"""What a cache layer is made of: runs of tokens, exact or as spectral factors, that attention can read.

Both kinds answer the same calls, so attention never asks which one it holds: ``scores`` and ``combine`` for the direct
path, ``reconstruct`` and ``tiles`` for the paths that rebuild. Shapes are
``(batch, num_key_value_heads, seq_len, head_dim)`` throughout.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.codec.rank import factors as rank_codec
from unsloth_spectral.codec.rank.factors import RankFactors
from unsloth_spectral.codec.tensors import TensorFunction, TokenShape, storage_bytes
from unsloth_spectral.fields import Field, Fields


class Block(Protocol):
    """A run of consecutive tokens of one layer.

    ``kind`` is the name it is stored under, see ``stored``.
    """

    kind: ClassVar[str]

    @property
    def num_key_value_heads(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def value_dim(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def scores(self, query: Tensor) -> Tensor:
        """Dot products of ``query [B, H, rows, head_dim]`` with every key, ``[B, H, rows, num_tokens]``."""
        ...

    def combine(self, weights: Tensor) -> Tensor:
        """Sum of the values under ``weights [B, H, rows, num_tokens]``, ``[B, H, rows, head_dim]``."""
        ...

    def reconstruct(self) -> tuple[Tensor, Tensor]:
        """Dense keys and values, ``[B, H, num_tokens, head_dim]``."""
        ...

    def tiles(self, num_tokens: int) -> Iterator["Block"]:
        """The block in pieces of about ``num_tokens`` tokens, as views."""
        ...

    def map_batch(self, function: TensorFunction) -> "Block":
        """The block with ``function`` applied along the batch dimension of each tensor."""
        ...

    def first_tokens(self, num_tokens: int) -> list["Block"]:
        """Blocks that together hold the first ``num_tokens`` tokens, 1 to ``self.num_tokens``."""
        ...

    def to_fields(self) -> dict[str, Field]: ...


@dataclass(frozen=True, slots=True, eq=False)
class ExactBlock:
    """Keys and values as they came, ``[B, H, tokens, head_dim]`` in the model's dtype, or in two under autocast."""

    kind: ClassVar[str] = "exact"
    keys: Tensor
    values: Tensor

    @property
    def num_key_value_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[-2]

    @property
    def value_dim(self) -> int:
        return self.values.shape[-1]

    @property
    def nbytes(self) -> int:
        return storage_bytes(self.keys, self.values)

    def slice(self, start: int, stop: int) -> "ExactBlock":
        """Tokens ``start`` to ``stop`` as views."""
        return ExactBlock(self.keys[..., start:stop, :], self.values[..., start:stop, :])

    def scores(self, query: Tensor) -> Tensor:
        return query @ self.keys.to(query.dtype).mT

    def combine(self, weights: Tensor) -> Tensor:
        return weights @ self.values.to(weights.dtype)

    def reconstruct(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values

    def tiles(self, num_tokens: int) -> Iterator[Block]:
        for keys, values in zip(self.keys.split(num_tokens, -2), self.values.split(num_tokens, -2), strict=True):
            yield ExactBlock(keys, values)

    def map_batch(self, function: TensorFunction) -> "ExactBlock":
        return ExactBlock(function(self.keys), function(self.values))

    def first_tokens(self, num_tokens: int) -> list[Block]:
        # Cloned: a view would keep the bytes of the tokens that are gone.
        return [self.slice(0, num_tokens).map_batch(torch.clone)]

    def to_fields(self) -> dict[str, Field]:
        return {"keys": self.keys, "values": self.values}

    @classmethod
    def from_fields(cls, fields: Fields, shape: TokenShape) -> "ExactBlock":
        keys = fields.tensor("keys", shape.dtype, (shape.batch, shape.heads, None, shape.key_dim))
        size = (shape.batch, shape.heads, keys.shape[-2], shape.value_dim)
        return cls(keys, fields.tensor("values", shape.value_dtype, size))


@dataclass(frozen=True, slots=True, eq=False)
class RankBlock:
    """One or more consecutive sealed blocks of equal length, stacked so that one batched product serves them all.

    Immutable: sealing more tokens, cropping or reordering makes a new object, and no token is ever encoded twice.

    Attributes:
        keys, values: factors with leading dimensions ``(batch, num_key_value_heads, num_blocks)``.
        dtype: the model's dtype, in which ``reconstruct`` answers.
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
        whole, rest = divmod(num_tokens, self.block_length)
        pieces: list[Block] = []
        if whole:
            pieces.append(self._blocks(0, whole).map_batch(torch.clone))
        if rest:
            cut = self._blocks(whole, whole + 1).map_batch(torch.clone)
            pieces.append(RankBlock(cut.keys.first_tokens(rest), cut.values.first_tokens(rest), self.dtype))
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
        rank_codec.encode(keys.unflatten(2, shape), config.rank_keys),
        rank_codec.encode(values.unflatten(2, shape), config.rank_values),
        keys.dtype,
    )
