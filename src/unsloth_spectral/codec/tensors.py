"""Small helpers for stored tensors: bytes, shapes and errors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

TensorFunction: TypeAlias = Callable[[Tensor], Tensor]


def storage_bytes(*tensors: Tensor) -> int:
    """Bytes of the storages behind ``tensors``, each storage once: a view counts all that it keeps alive."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def raw_bytes(tensor: Tensor) -> Any:
    """The bytes of a contiguous tensor on the CPU, as a flat numpy array that shares them."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def rounded_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``rows [..., D]`` float32 as int8, and the scale of each row, ``[..., 1]`` float32."""
    peak = rows.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    return (rows * (127 / peak)).round().to(torch.int8), peak / 127


@dataclass(frozen=True, slots=True)
class TokenShape:
    """The common shape of one layer's tokens: keys ``[batch, heads, tokens, key_dim]`` of ``dtype``, values
    ``[batch, heads, tokens, value_dim]`` of ``value_dtype``, which differs under autocast."""

    batch: int
    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    value_dtype: torch.dtype


class Coded(Protocol):
    """Coded tokens, with their relative error ``[B, H]``."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def relative_error(self) -> Tensor: ...


def joint_error(first: Coded, second: Coded) -> Tensor:
    """Relative error of both together, ``[B, H]`` float16: the root of the mean square over their tokens."""
    share = second.num_tokens / (first.num_tokens + second.num_tokens)
    squares = first.relative_error.float().square() * (1 - share) + second.relative_error.float().square() * share
    return squares.sqrt().half()
