"""The rotations of a chunk's tokens, from the base of a model's rotary embedding."""

from functools import lru_cache

import torch
from torch import Tensor

from unsloth_spectral.rope import Rotation


@lru_cache(maxsize=64)
def rotation_at(head_dim: int, rope_theta: float, num_tokens: int, place: int = 0) -> Rotation:
    """The rotation of ``num_tokens`` from the place ``place`` on; the halves of a head are the parts of its pairs."""
    half, step = head_dim // 2, _step(head_dim, rope_theta)
    start = torch.polar(torch.ones_like(step), step * place)[None, None].to(torch.complex64)
    return Rotation(slice(0, half), slice(half, head_dim), start, step, num_tokens)


@lru_cache(maxsize=8)
def _step(head_dim: int, rope_theta: float) -> Tensor:
    """``[P]`` float64, one tensor for equal arguments."""
    half = head_dim // 2
    return float(rope_theta) ** (-torch.arange(half, dtype=torch.float64, device="cpu") / half)
