"""Rotating pairs of dimensions by a table of rotations, and un-rotating them."""

import torch
from torch import Tensor

from unsloth_spectral.rope.rotation import Rotation


def rotate(x: Tensor, table: Tensor, rotation: Rotation) -> Tensor:
    """``x [..., tokens, head_dim]`` with every pair rotated by the complex ``table``, which broadcasts to
    ``[..., tokens, P]``."""
    # Views of a complex table skip every other number, which takes several times as long.
    return _rotated(x, table.real.contiguous(), table.imag.contiguous(), rotation)


def unrotate(x: Tensor, table: Tensor, rotation: Rotation) -> Tensor:
    """The inverse of ``rotate``, also if entries of the table are not of size 1."""
    return _rotated(x, *_inverse(table), rotation)


def unrotated_sum(x: Tensor, table: Tensor, rotation: Rotation) -> Tensor:
    """``unrotate(x, table, rotation).sum(-2)``, without building the un-rotated tokens."""
    cos, sin = _inverse(table)
    real, imaginary = x[..., rotation.first], x[..., rotation.second]
    out = x.sum(-2)
    out[..., rotation.first] = torch.addcmul(real * cos, imaginary, sin, value=-1).sum(-2)
    out[..., rotation.second] = torch.addcmul(real * sin, imaginary, cos).sum(-2)
    return out


def minus_rotated(x: Tensor, fixed: Tensor, table: Tensor, rotation: Rotation) -> Tensor:
    """``x - rotate(fixed, table, rotation)``, where ``fixed [..., 1, head_dim]`` is the same for all tokens."""
    cos, sin = table.real.contiguous(), table.imag.contiguous()
    real, imaginary = fixed[..., rotation.first], fixed[..., rotation.second]
    out = x - fixed
    out[..., rotation.first] = torch.addcmul(torch.addcmul(x[..., rotation.first], cos, -real), sin, imaginary)
    out[..., rotation.second] = torch.addcmul(torch.addcmul(x[..., rotation.second], sin, -real), cos, -imaginary)
    return out


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, rotation: Rotation) -> Tensor:
    real, imaginary = x[..., rotation.first], x[..., rotation.second]
    out = torch.empty_like(x) if 2 * rotation.num_pairs == x.shape[-1] else x.clone()
    out[..., rotation.first] = torch.addcmul(real * cos, imaginary, sin, value=-1)
    out[..., rotation.second] = torch.addcmul(real * sin, imaginary, cos)
    return out


def _inverse(table: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary parts of one over ``table``, contiguous."""
    cos, sin = table.real.contiguous(), table.imag.contiguous()
    squares = torch.addcmul(cos.square(), sin, sin)
    return cos / squares, -sin / squares
