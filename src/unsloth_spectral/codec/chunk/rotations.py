"""The rotations of a chunk's tokens."""

from functools import lru_cache

import torch
from torch import Tensor

from unsloth_spectral.rope import Rotation

# Radians from one token to the next, of each rotary pair; the halves of a head are the parts of its pairs.
Steps = tuple[float, ...]


@lru_cache(maxsize=8)
def steps_of(head_dim: int, rope_theta: float) -> Steps:
    """The steps of a rotary embedding of this base, which is not scaled."""
    half = head_dim // 2
    return tuple(float(rope_theta) ** (-pair / half) for pair in range(half))


@lru_cache(maxsize=64)
def rotation_at(steps: Steps, num_tokens: int, place: int = 0) -> Rotation:
    """The rotation of ``num_tokens`` from the place ``place`` on."""
    pairs, step = len(steps), _tensor_of(steps)
    start = torch.polar(torch.ones_like(step), step * place)[None, None].to(torch.complex64)
    return Rotation(slice(0, pairs), slice(pairs, 2 * pairs), start, step, num_tokens)


@lru_cache(maxsize=8)
def _tensor_of(steps: Steps) -> Tensor:
    """``[P]`` float64, one tensor for equal steps."""
    return torch.tensor(steps, dtype=torch.float64, device="cpu")
