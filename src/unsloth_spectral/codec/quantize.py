"""Symmetric integer quantization."""

import torch
from torch import Tensor

_INT8_MAX = 127


def quantize_int8(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Round ``x`` to int8 with one scale for all elements along ``dims``, in one broadcast operation.

    Returns:
        codes: int8, the shape of ``x``, within [-127, 127]: symmetric, so negation is exact.
        scale: float32, the shape of ``x`` with ``dims`` reduced to 1; ``x`` is about ``codes * scale``.
    """
    x = x.float()
    # A group of zeros keeps scale 0 and codes 0; tiny only guards the division.
    scale = x.abs().amax(dims, keepdim=True) / _INT8_MAX
    codes = (x / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(-_INT8_MAX, _INT8_MAX)
    return codes.to(torch.int8), scale


def dequantize_int8(codes: Tensor, scale: Tensor) -> Tensor:
    """``codes * scale`` in float32."""
    return codes.float() * scale
