"""Small helpers that stored things share."""

from collections.abc import Callable
from typing import Protocol, TypeAlias

from torch import Tensor

TensorFunction: TypeAlias = Callable[[Tensor], Tensor]


def storage_bytes(*tensors: Tensor) -> int:
    """Bytes of the storages behind ``tensors``, each storage once: a view that pins a larger tensor is seen."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


class Coded(Protocol):
    """Tokens in codes, with their relative error ``[B, H]``."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def relative_error(self) -> Tensor: ...


def joint_error(first: Coded, second: Coded) -> Tensor:
    """Relative error of both together, ``[B, H]`` float16: the root of the mean square over their tokens."""
    share = second.num_tokens / (first.num_tokens + second.num_tokens)
    squares = first.relative_error.float().square() * (1 - share) + second.relative_error.float().square() * share
    return squares.sqrt().half()
