"""Checked addresses of tensors for the compiled kernel, which reads and writes without checks."""

import torch
from torch import Tensor

from unsloth_spectral.errors import InvalidArgumentError


def address(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], *, strided: bool = False) -> int:
    """The address of ``tensor``, after a check that it is what the kernel expects.

    The address is valid as long as the caller keeps the tensor.

    Args:
        name: the tensor's name in the error.
        tensor: on the CPU, of ``dtype`` and ``shape``, and contiguous.
        strided: being contiguous along the last dimension is enough, because the kernel gets the other strides.

    Raises:
        InvalidArgumentError: the tensor is on another device, has another dtype or shape, or is not contiguous.
    """
    is_dense = tensor.stride(-1) == 1 if strided else tensor.is_contiguous()
    if is_dense and tensor.dtype is dtype and tensor.shape == shape and tensor.is_cpu:
        return tensor.data_ptr()
    gaps = "" if is_dense else ", not contiguous"
    wanted = f"a contiguous {dtype} tensor of shape {tuple(shape)} on the CPU"
    raise refusal(name, wanted, f"a {tensor.dtype} one of shape {tuple(tensor.shape)} on {tensor.device}{gaps}")


def require(holds: bool, name: str, wanted: object, actual: object) -> None:
    """Raise InvalidArgumentError unless the condition ``holds``; the message says that ``name`` must be ``wanted``."""
    if not holds:
        raise refusal(name, wanted, actual)


def refusal(name: str, wanted: object, actual: object) -> InvalidArgumentError:
    """The error that ``require`` raises."""
    return InvalidArgumentError(f"{name} must be {wanted} for the compiled kernel, got {actual}")
