"""Positive scales as one byte each: logarithmic steps below the largest of their row."""

import torch
from torch import Tensor

ZERO = 255  # the code of a scale of 0
_MOST_GAIN = 2.0  # of unbiased scales over those of least squares, which is 1.6 for Gaussians coded with one bit


def encode_scales(scales: Tensor, steps_per_octave: int, top: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``scales [..., n]``, non-negative, as codes ``[..., n]`` uint8, and their ``top [..., 1]`` float32, which has
    code 0.

    ``top`` is the largest scale unless it is given; larger scales are lowered to it.

    A step is ``2 ** (-1 / steps_per_octave)``, so the error is at most ``0.35 / steps_per_octave``, relative. Scales
    more than ``254 / steps_per_octave`` octaves below ``top`` are raised to that; zeros stay zero.
    """
    if top is None:
        top = scales.amax(-1, keepdim=True)
    octaves = -(scales / top.clamp_min(torch.finfo(top.dtype).tiny)).log2()
    codes = (octaves * steps_per_octave).round().clamp(0, ZERO - 1)
    return torch.where(scales > 0, codes, float(ZERO)).to(torch.uint8), top


def decode_scales(codes: Tensor, steps_per_octave: int) -> Tensor:
    """Scales relative to ``top``, float32."""
    relative = torch.exp2(codes.float() * (-1 / steps_per_octave))
    return relative.masked_fill_(codes == ZERO, 0.0)


def unbiased_scales(energies: Tensor, overlaps: Tensor, squares: Tensor) -> Tensor:
    """The scales at which codes project exactly onto what they stand for.

    A least-squares quantizer shrinks: shrunken keys flatten the softmax, and the errors of shrunken values do not
    average out. Few numbers behind others in their streams may be met so badly that this scale would be huge or
    negative: it is at most twice the scale of least squares.

    Args:
        energies: squared lengths of what is coded, any shape.
        overlaps: its products with the codes, likewise.
        squares: squared lengths of the codes, likewise.
    """
    tiny = torch.finfo(energies.dtype).tiny
    least_squares = overlaps.clamp_min(0) / squares.clamp_min(tiny)
    return torch.minimum(energies / overlaps.clamp_min(tiny), _MOST_GAIN * least_squares)


def squared_errors(energies: Tensor, overlaps: Tensor, squares: Tensor, scales: Tensor) -> Tensor:
    """Squared distances of codes at ``scales`` from what they stand for; the others as in ``unbiased_scales``."""
    return energies + scales * (scales * squares - 2 * overlaps)
