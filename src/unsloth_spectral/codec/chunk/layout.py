"""The arrangement of keys and values in a chunk: engines use one shape for different arrangements.

A chunk is ``[planes, layers, tokens, width]``; the first dimension may be missing if it is 1. Its shape does not show
the arrangement within ``width``, so the user names it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from unsloth_spectral.errors import InvalidArgumentError


class ChunkLayout(Protocol):
    """Splits chunks into keys ``[layers, heads, tokens, key_dim]`` and values ``[..., value_dim]``, and joins them."""

    @property
    def key_dim(self) -> int:
        """The head dimension of the keys."""

    @property
    def value_dim(self) -> int:
        """The head dimension of the values."""

    def obstacle(self, shape: Sequence[int]) -> str | None:
        """Why chunks of this shape, of three or four dimensions, cannot have this layout; None if they can."""

    def num_heads(self, shape: Sequence[int]) -> int:
        """Key-value heads of a layer."""

    def split(self, chunk: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and the values of ``chunk``."""

    def join(self, keys: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of ``split``: a chunk of ``shape``."""


@dataclass(frozen=True, slots=True)
class _KeysLikeValues:
    """Keys and values of one size, ``head_dim``."""

    head_dim: int

    def __post_init__(self) -> None:
        _check_even("head_dim", self.head_dim)

    @property
    def key_dim(self) -> int:
        return self.head_dim

    @property
    def value_dim(self) -> int:
        return self.head_dim


@dataclass(frozen=True, slots=True)
class Heads(_KeysLikeValues):
    """Each head's keys beside its values: ``[layers, tokens, heads * 2 * head_dim]``, as vLLM does since 0.26.

    Attributes:
        head_dim: the model's; even.

    Raises:
        InvalidArgumentError: an attribute is out of its range.
    """

    def obstacle(self, shape: Sequence[int]) -> str | None:
        if not _has_one_plane(shape):
            return (
                f"chunks must be of one plane, [1, layers, tokens, width], got {tuple(shape)}: if these are keys and "
                'values, write "layout": "planes"'
            )
        if shape[-1] % (2 * self.head_dim):
            return (
                f"the last size of {tuple(shape)} must be a multiple of 2 * head_dim={2 * self.head_dim}: correct "
                'head_dim, or write "layout": "latent" for multi-head latent attention'
            )
        return None

    def num_heads(self, shape: Sequence[int]) -> int:
        return int(shape[-1]) // (2 * self.head_dim)

    def split(self, chunk: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = _one_plane(chunk).unflatten(-1, (-1, 2, self.head_dim)).unbind(-2)
        return keys.transpose(1, 2), values.transpose(1, 2)

    def join(self, keys: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
        return torch.stack([keys, values], -2).transpose(1, 2).reshape(tuple(shape))


@dataclass(frozen=True, slots=True)
class Blocks(Heads):
    """Blocks of tokens: within a block, each head's transposed keys before its values, as vLLM's CPU kernels do in
    float32. The shape is that of ``Heads``.

    Attributes:
        block_tokens: tokens of a block, 128 unless vLLM was told otherwise.
    """

    block_tokens: int

    def __post_init__(self) -> None:
        Heads.__post_init__(self)
        if not _is_integer(self.block_tokens, 1):
            raise InvalidArgumentError(f"block_tokens must be an integer of 1 or more, got {self.block_tokens!r}")

    def obstacle(self, shape: Sequence[int]) -> str | None:
        if _has_one_plane(shape) and shape[-2] % self.block_tokens:
            return f"chunks must be whole blocks of block_tokens={self.block_tokens}, got {shape[-2]} tokens"
        return Heads.obstacle(self, shape)

    def split(self, chunk: Tensor) -> tuple[Tensor, Tensor]:
        by_head = _one_plane(chunk).unflatten(-1, (-1, 2 * self.head_dim)).transpose(1, 2)
        layers, heads, tokens = by_head.shape[:3]
        blocks = by_head.reshape(layers, heads, -1, 2, self.block_tokens * self.head_dim)
        keys = blocks[:, :, :, 0].unflatten(-1, (self.head_dim, self.block_tokens)).mT
        values = blocks[:, :, :, 1].unflatten(-1, (self.block_tokens, self.head_dim))
        return keys.reshape(layers, heads, tokens, -1), values.reshape(layers, heads, tokens, -1)

    def join(self, keys: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
        packed = [
            keys.unflatten(2, (-1, self.block_tokens)).mT.flatten(3),
            values.unflatten(2, (-1, self.block_tokens)).flatten(3),
        ]
        by_head = torch.stack(packed, 3).reshape(*keys.shape[:3], 2 * self.head_dim)
        return by_head.transpose(1, 2).reshape(tuple(shape))


@dataclass(frozen=True, slots=True)
class Planes(_KeysLikeValues):
    """All heads' keys before all heads' values: ``[2, layers, tokens, heads * head_dim]``, as SGLang and vLLM before
    0.26 do, or ``[layers, tokens, 2 * heads * head_dim]``.

    Attributes:
        head_dim: the model's; even.

    Raises:
        InvalidArgumentError: ``head_dim`` is out of its range.
    """

    def obstacle(self, shape: Sequence[int]) -> str | None:
        one_plane = _has_one_plane(shape)
        if not one_plane and shape[0] != 2:
            return f"chunks must be of one plane or two, [2, layers, tokens, width], got {tuple(shape)}"
        unit = self.head_dim * (2 if one_plane else 1)
        if shape[-1] % unit:
            return f"the last size of {tuple(shape)} must be a multiple of {unit}: correct head_dim={self.head_dim}"
        return None

    def num_heads(self, shape: Sequence[int]) -> int:
        return int(shape[-1]) // (self.head_dim * (2 if _has_one_plane(shape) else 1))

    def split(self, chunk: Tensor) -> tuple[Tensor, Tensor]:
        if _has_one_plane(chunk.shape):
            keys, values = _one_plane(chunk).unflatten(-1, (2, -1, self.head_dim)).unbind(2)
        else:
            keys, values = chunk.unflatten(-1, (-1, self.head_dim)).unbind(0)
        return keys.transpose(1, 2), values.transpose(1, 2)

    def join(self, keys: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
        planes = torch.stack([keys, values], 2 if _has_one_plane(shape) else 0)
        if _has_one_plane(shape):
            return planes.permute(0, 3, 2, 1, 4).reshape(tuple(shape))
        return planes.transpose(2, 3).reshape(tuple(shape))


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention: ``[layers, tokens, kv_lora_rank + qk_rope_head_dim]``.

    The latent is coded as the value of a single head, and the rotated part beside it, which all heads share, as its
    key. Pairs of the rotated part are neighbours in the chunk.

    Attributes:
        kv_lora_rank, qk_rope_head_dim: the model's; the latter even.

    Raises:
        InvalidArgumentError: an attribute is out of its range.
    """

    kv_lora_rank: int
    qk_rope_head_dim: int

    def __post_init__(self) -> None:
        if not _is_integer(self.kv_lora_rank, 1):
            raise InvalidArgumentError(f"kv_lora_rank must be an integer of 1 or more, got {self.kv_lora_rank!r}")
        _check_even("qk_rope_head_dim", self.qk_rope_head_dim)

    @property
    def key_dim(self) -> int:
        return self.qk_rope_head_dim

    @property
    def value_dim(self) -> int:
        return self.kv_lora_rank

    def obstacle(self, shape: Sequence[int]) -> str | None:
        width = self.kv_lora_rank + self.qk_rope_head_dim
        if not _has_one_plane(shape) or shape[-1] != width:
            return (
                f"chunks must be [1, layers, tokens, {width}], the last size kv_lora_rank + qk_rope_head_dim, got "
                f"{tuple(shape)}: correct these two"
            )
        return None

    def num_heads(self, shape: Sequence[int]) -> int:
        return 1

    def split(self, chunk: Tensor) -> tuple[Tensor, Tensor]:
        latent, rotated = _one_plane(chunk)[:, None].split([self.kv_lora_rank, self.qk_rope_head_dim], -1)
        return torch.cat([rotated[..., 0::2], rotated[..., 1::2]], -1), latent

    def join(self, keys: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
        rotated = torch.stack(keys.chunk(2, -1), -1).flatten(-2)
        return torch.cat([values, rotated], -1).reshape(tuple(shape))


def _has_one_plane(shape: Sequence[int]) -> bool:
    return len(shape) == 3 or shape[0] == 1


def _one_plane(chunk: Tensor) -> Tensor:
    return chunk.reshape(chunk.shape[-3:])


def _check_even(name: str, number: int) -> None:
    if not _is_integer(number, 2) or number % 2:
        raise InvalidArgumentError(f"{name} must be an even integer of 2 or more, got {number!r}")


def _is_integer(number: object, least: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= least
