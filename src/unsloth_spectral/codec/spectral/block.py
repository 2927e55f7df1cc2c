"""A run of tokens sealed by the spectral codec: coded keys beside coded values."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from unsloth_spectral.codec.block import Amounts, Block
from unsloth_spectral.codec.config import GROUP_SIZE
from unsloth_spectral.codec.spectral.keys import KeyCodes
from unsloth_spectral.codec.spectral.values import ValueCodes
from unsloth_spectral.codec.tensors import TensorFunction, TokenShape
from unsloth_spectral.fields import Field, Fields

_REBUILT_TOKENS = 2048  # tokens rebuilt at a time, for scores of many rows


class Memo(dict[str, Any]):
    """Results that attention paths cache with a block. A copy of the block has other tensors, so it starts empty."""

    def __deepcopy__(self, memo: object) -> "Memo":
        return Memo()

    def __reduce__(self) -> Any:
        return Memo, ()


@dataclass(frozen=True, slots=True, eq=False)
class SpectralBlock:
    """Consecutive sealed tokens, ``[B, H, num_tokens, D]``. Immutable; no token is encoded twice.

    Attributes:
        keys, values: the codes.
        dtype: the model's dtype, the dtype of ``reconstruct``.
        memo: results that attention paths cache for the block, by the path's name; they are freed with the block.
    """

    kind: ClassVar[str] = "coded"
    keys: KeyCodes
    values: ValueCodes
    dtype: torch.dtype
    memo: Memo = field(default_factory=Memo, init=False, repr=False)

    @property
    def num_key_value_heads(self) -> int:
        return self.keys.num_key_value_heads

    @property
    def num_tokens(self) -> int:
        return self.keys.num_tokens

    @property
    def value_dim(self) -> int:
        return self.values.head_dim

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    @property
    def is_finite(self) -> bool:
        return all(
            bool(torch.isfinite(x).all()) for x in (self.keys.vector_scales, self.keys.mean, self.values.largest)
        )

    @property
    def errors(self) -> tuple[Tensor, Tensor]:
        return self.keys.relative_error, self.values.relative_error

    @property
    def amounts(self) -> Amounts:
        elements = self.num_key_value_heads * self.keys.mean.shape[-1]
        amounts = Amounts(bits_keys=self.keys.num_bits / elements, bits_values=float(self.values.nbits))
        if self.keys.rows is None:
            return amounts
        basis = self.keys.rows.basis
        return replace(amounts, basis=basis.digest, basis_bytes=basis.nbytes)

    @property
    def num_fallbacks(self) -> int:
        return 0

    @property
    def shared_tensors(self) -> tuple[Tensor, ...]:
        return () if self.keys.rotation is None else self.keys.rotation.tensors

    def scores(self, query: Tensor) -> Tensor:
        if self.num_tokens <= _REBUILT_TOKENS or not self.keys.rebuilds(query.shape[2]):
            return self.keys.scores(query)
        return torch.cat([tile.keys.scores(query) for tile in self._split(_REBUILT_TOKENS)], dim=-1)

    def combine(self, weights: Tensor) -> Tensor:
        return self.values.combine(weights)

    def reconstruct(self) -> tuple[Tensor, Tensor]:
        return self.keys.reconstruct().to(self.dtype), self.values.reconstruct().to(self.dtype)

    def tiles(self, num_tokens: int) -> Iterator[Block]:
        yield from self._split(max(GROUP_SIZE, num_tokens // GROUP_SIZE * GROUP_SIZE))

    def map_batch(self, function: TensorFunction) -> "SpectralBlock":
        return SpectralBlock(self.keys.map(function), self.values.map(function), self.dtype)

    def first_tokens(self, num_tokens: int) -> list[Block]:
        # Cloned: a view would keep the bytes of the tokens that are cut off.
        return [self._slice(0, num_tokens).map_batch(torch.clone)]

    def append(self, other: "SpectralBlock") -> "SpectralBlock":
        """These tokens followed by ``other``'s, coded in the same basis; codes are copied, not encoded again."""
        return SpectralBlock(self.keys.append(other.keys), self.values.append(other.values), self.dtype)

    def carries_at(self, token: int) -> tuple[Tensor, Tensor]:
        """The carries of the keys' and of the values' streams at ``token``, a multiple of 8; see ``packing``."""
        return self.keys.carries_at(token), self.values.carries_at(token)

    def fill(self, other: "SpectralBlock") -> "SpectralBlock":
        """As ``append``, for tokens that have room in the last tile and were coded at its scales."""
        return SpectralBlock(self.keys.fill(other.keys), self.values.fill(other.values), self.dtype)

    def to_fields(self) -> dict[str, Field]:
        return {"keys": self.keys.to_fields(), "values": self.values.to_fields()}

    @classmethod
    def from_fields(cls, fields: Fields, shape: TokenShape) -> "SpectralBlock":
        keys = KeyCodes.from_fields(fields.sub("keys"), shape)
        values = ValueCodes.from_fields(fields.sub("values"), shape)
        fields.require(keys.num_tokens == values.num_tokens, "as many keys as values")
        return cls(keys, values, shape.dtype)

    def _split(self, num_tokens: int) -> Iterator["SpectralBlock"]:
        for start in range(0, self.num_tokens, num_tokens):
            yield self._slice(start, min(start + num_tokens, self.num_tokens))

    def _slice(self, start: int, stop: int) -> "SpectralBlock":
        return SpectralBlock(self.keys.slice(start, stop), self.values.slice(start, stop), self.dtype)
