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
    # Clamped so that a group of zeros divides by something; it gets codes 0.
    peak = x.abs().amax(dims, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
    scale = peak / _INT8_MAX
    # The peak comes out as 127 within rounding, so nothing needs clamping.
    return (x / scale).round_().to(torch.int8), scale


def dequantize_int8(codes: Tensor, scale: Tensor) -> Tensor:
    """``codes * scale`` in float32."""
    return codes.float() * scale
