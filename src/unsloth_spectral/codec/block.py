"""Blocks: runs of tokens of a cache layer, exact or sealed by a codec, that attention can read.

All kinds have the same methods, so attention does not distinguish them: ``scores`` and ``combine`` for the direct path,
``reconstruct`` and ``tiles`` for the paths that rebuild. Shapes are ``(batch, num_key_value_heads, seq_len, head_dim)``
throughout.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from unsloth_spectral.codec.tensors import TensorFunction, TokenShape, storage_bytes
from unsloth_spectral.fields import Field, Fields


class Block(Protocol):
    """A run of consecutive tokens of one layer.

    ``kind`` is the name under which snapshots store it, see ``registry``.
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


@dataclass(frozen=True, slots=True)
class Amounts:
    """Ranks or bits of a sealed block, as its codec has them, and the model's basis; see ``LayerStats``."""

    rank_keys: int | None = None
    rank_values: int | None = None
    bits_keys: float | None = None
    bits_values: float | None = None
    basis: str | None = None
    basis_bytes: int = 0


class SealedBlock(Block, Protocol):
    """A block that a codec made. It is immutable; no token is encoded twice."""

    @property
    def is_finite(self) -> bool:
        """False if numbers overflowed: the block is then unusable."""
        ...

    @property
    def errors(self) -> tuple[Tensor, Tensor]:
        """Relative errors of the keys and of the values, each a tensor of any shape."""
        ...

    @property
    def amounts(self) -> Amounts: ...

    @property
    def num_fallbacks(self) -> int:
        """Matrices for which a fast factorization gave way to the exact one."""
        ...

    @property
    def shared_tensors(self) -> tuple[Tensor, ...]:
        """Tensors that layers share; ``nbytes`` does not count them."""
        ...

    @classmethod
    def from_fields(cls, fields: Fields, shape: TokenShape) -> "SealedBlock":
        """The block that ``to_fields`` stored, with tokens of ``shape``.

        Raises:
            LoadError: a field is missing or does not fit the others.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ExactBlock:
    """Keys and values as the model made them, ``[B, H, tokens, head_dim]``; under autocast they have two dtypes."""

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
        # Cloned: a view would keep the bytes of the tokens that are cut off.
        return [self.slice(0, num_tokens).map_batch(torch.clone)]

    def to_fields(self) -> dict[str, Field]:
        return {"keys": self.keys, "values": self.values}

    @classmethod
    def from_fields(cls, fields: Fields, shape: TokenShape) -> "ExactBlock":
        keys = fields.tensor("keys", shape.dtype, (shape.batch, shape.heads, None, shape.key_dim))
        size = (shape.batch, shape.heads, keys.shape[-2], shape.value_dim)
        return cls(keys, fields.tensor("values", shape.value_dtype, size))
