"""Symmetric integer quantization."""

import torch
from torch import Tensor

_INT8_MAX = 127
_TINY = torch.finfo(torch.float32).tiny


def quantize_int8(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Round ``x`` to int8 with one scale for all elements along ``dims``, in one broadcast operation.

    Returns:
        codes: int8, the shape of ``x``, within [-127, 127]: symmetric, so negation is exact.
        scale: float32, the shape of ``x`` with ``dims`` reduced to 1; ``x`` is about ``codes * scale``.
    """
    x = x.float()
    work = x.abs()  # one buffer for all steps: allocating a new one costs as much as the arithmetic
    # Clamped to avoid division by zero: a group of zeros gets codes 0.
    scale = work.amax(dims, keepdim=True).clamp_min_(_TINY).div_(_INT8_MAX)
    # The peak becomes 127 within rounding, so no code needs clamping.
    return torch.div(x, scale, out=work).round_().to(torch.int8), scale


def dequantize_int8(codes: Tensor, scale: Tensor) -> Tensor:
    """``codes * scale`` in float32."""
    return codes.float() * scale
