"""Two small helpers every stored thing shares."""

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

TensorFunction: TypeAlias = Callable[[Tensor], Tensor]


def storage_bytes(*tensors: Tensor) -> int:
    """Bytes of the storages behind ``tensors``, each storage once: a view that pins a larger tensor is seen."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
