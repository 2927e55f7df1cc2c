"""Addresses of tensors for the compiled kernel, which reads and writes wherever it is told."""

import torch
from torch import Tensor

from unsloth_spectral.errors import InvalidArgumentError


def address(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], *, strided: bool = False) -> int:
    """Where ``tensor`` begins, once it is known to be what the kernel takes it for.

    The address is good for as long as the caller keeps the tensor.

    Args:
        name: what it is called in the error.
        tensor: on the CPU, of ``dtype`` and ``shape``, and contiguous.
        strided: contiguous along the last dimension is enough, as the kernel is given the other strides.

    Raises:
        InvalidArgumentError: it is on another device, of another dtype or shape, or has gaps.
    """
    is_dense = tensor.stride(-1) == 1 if strided else tensor.is_contiguous()
    if is_dense and tensor.dtype is dtype and tensor.shape == shape and tensor.is_cpu:
        return tensor.data_ptr()
    gaps = "" if is_dense else ", not contiguous"
    wanted = f"a contiguous {dtype} tensor of shape {tuple(shape)} on the CPU"
    raise refusal(name, wanted, f"a {tensor.dtype} one of shape {tuple(tensor.shape)} on {tensor.device}{gaps}")


def require(holds: bool, name: str, wanted: object, got: object) -> None:
    """Raise InvalidArgumentError, which says that ``name`` must be ``wanted``, unless that ``holds``."""
    if not holds:
        raise refusal(name, wanted, got)


def refusal(name: str, wanted: object, got: object) -> InvalidArgumentError:
    """The error that ``require`` raises."""
    return InvalidArgumentError(f"{name} must be {wanted} for the compiled kernel, got {got}")
