"""Random rotation and an optimal scalar quantizer, as TurboQuant's for squared error (Zandieh et al. 2025)."""

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from unsloth_spectral.errors import InvalidArgumentError

_NORM_BITS = 16  # of a token's vector: its norm, float16
_FLOAT16_MAX = torch.finfo(torch.float16).max
_MAX_NBITS = 6  # the iteration takes seconds beyond
_TOLERANCE = 1e-12
_MAX_ITERATIONS = 20_000


@dataclass(frozen=True, slots=True)
class LloydMax:
    """Each vector ``[head_dim]`` as a norm and a rotated direction, whose coordinates take ``nbits`` each.

    A random rotation makes the coordinates of any direction nearly Gaussian with variance ``1 / head_dim``, so one
    codebook, optimal for the Gaussian, serves all (arXiv:2504.19874, algorithm 1). The rotation comes from ``seed`` and
    is not counted. Keys are taken as cached, rotated by RoPE. A reference implementation: nothing is packed, the bits
    are counted.
    """

    nbits: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.nbits <= _MAX_NBITS:
            raise InvalidArgumentError(f"nbits must be from 1 to {_MAX_NBITS}, got {self.nbits}")

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, int]:
        """Keys and values ``[..., tokens, head_dim]`` as decoding returns them, and the bits of both."""
        keys_hat, key_bits = self._round_trip(keys)
        values_hat, value_bits = self._round_trip(values)
        return keys_hat, values_hat, key_bits + value_bits

    def _round_trip(self, x: Tensor) -> tuple[Tensor, int]:
        head_dim = x.shape[-1]
        rotation_matrix = rotation(head_dim, self.seed).to(x.device)
        codebook = torch.tensor(gaussian_codebook(self.nbits), dtype=torch.float32, device=x.device)
        boundaries = (codebook[1:] + codebook[:-1]) / 2
        norms = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True)
        # A vector of zeros gets arbitrary codes; its norm of zero cancels them.
        directions = x.float() / norms.clamp_min(torch.finfo(torch.float32).tiny) @ rotation_matrix
        codes = torch.bucketize(directions * math.sqrt(head_dim), boundaries)
        stored_norms = norms.clamp_max(_FLOAT16_MAX).half().float()
        decoded = codebook[codes] @ rotation_matrix.mT * (stored_norms / math.sqrt(head_dim))
        return decoded.to(x.dtype), x.numel() * self.nbits + norms.numel() * _NORM_BITS


@lru_cache(maxsize=16)
def rotation(head_dim: int, seed: int) -> Tensor:
    """A random orthogonal matrix ``[head_dim, head_dim]`` in float32 on the CPU, the same for equal arguments."""
    with torch.inference_mode(False):  # cached: later callers may run outside inference mode
        generator = torch.Generator().manual_seed(seed)
        q, r = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=generator, dtype=torch.float64, device="cpu"))
        # With the signs of a positive diagonal of r, q is uniform over all rotations (Mezzadri 2007).
        return (q * r.diagonal().sign()).float()


@lru_cache(maxsize=8)
def gaussian_codebook(nbits: int) -> tuple[float, ...]:
    """The ``2**nbits`` levels of least mean squared error for a standard Gaussian, ascending.

    By the iteration of Lloyd (1982) and Max (1960): each level is the mean of its cell, each cell ends midway between
    levels.
    """
    count = 2**nbits
    levels = [4 * (2 * index + 1) / count - 4 for index in range(count)]
    for _ in range(_MAX_ITERATIONS):
        middles = [(low + high) / 2 for low, high in pairwise(levels)]
        edges = [-math.inf, *middles, math.inf]
        moved = [_cell_mean(low, high) for low, high in pairwise(edges)]
        change = max(abs(new - old) for new, old in zip(moved, levels, strict=True))
        levels = moved
        if change < _TOLERANCE:
            break
    return tuple(levels)


def _cell_mean(low: float, high: float) -> float:
    """The mean of a standard Gaussian between two bounds, computed on the left by symmetry, where erfc loses no
    digits."""
    if low + high > 0:
        return -_cell_mean(-high, -low)
    probability = (math.erfc(-high / math.sqrt(2)) - math.erfc(-low / math.sqrt(2))) / 2
    density = math.exp(-low * low / 2) - math.exp(-high * high / 2)
    return density / math.sqrt(2 * math.pi) / probability
