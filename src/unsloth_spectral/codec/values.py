"""Values as codes of their randomly rotated, normalized selves, unbiased token by token (DESIGN section 3)."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from unsloth_spectral.codec.logscale import ZERO, decode_scales, encode_scales
from unsloth_spectral.codec.packing import TILE_TOKENS, num_tiles, pack, unpack
from unsloth_spectral.codec.tensors import TensorFunction, joint_error, storage_bytes

STEPS_PER_OCTAVE = 20
# Steps of the uniform quantizer of least squared error on a unit Gaussian, 1 to 8 bits (Max, 1960).
_STEPS = (1.596, 0.9957, 0.586, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)
_SEED = 0


@dataclass(frozen=True, slots=True, eq=False)
class ValueCodes:
    """Values of one run of tokens, logical shape ``[B, H, num_tokens, D]``.

    Attributes:
        planes: ``[B, tiles, H * D * nbits, 16]`` uint8, see ``packing``.
        scales: ``[B, H, tiles * 128]`` uint8, one a token, see ``logscale``.
        largest: ``[B, H, 1]`` float32, the scale of code 0.
        relative_error: ``[B, H]`` float16, relative error.
        head_dim, nbits, num_tokens: D, the width of every code, and the tokens held.
    """

    planes: Tensor
    scales: Tensor
    largest: Tensor
    relative_error: Tensor
    head_dim: int
    nbits: int
    num_tokens: int

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor, as torch reports their storages."""
        return storage_bytes(self.planes, self.scales, self.largest, self.relative_error)

    def combine(self, weights: Tensor) -> Tensor:
        """Sum of the values under ``weights [B, H, rows, num_tokens]``; rotated back once, ``[B, H, rows, D]``."""
        scaled = weights * self._token_scales().to(weights.dtype)[:, :, None]
        turned = scaled @ self._rotated().to(weights.dtype).mT
        return turned @ hadamard(self.head_dim).to(weights)

    def reconstruct(self) -> Tensor:
        """The dense values, ``[B, H, num_tokens, D]`` float32."""
        turned = self._rotated().mT * self._token_scales()[..., None]
        return turned @ hadamard(self.head_dim).to(turned)

    def slice(self, start: int, stop: int) -> "ValueCodes":
        """Tokens ``start`` to ``stop`` as views; ``start`` is a multiple of 128."""
        return replace(
            self,
            planes=self.planes[:, start // TILE_TOKENS : num_tiles(stop)],
            scales=self.scales[..., start : num_tiles(stop) * TILE_TOKENS],
            num_tokens=stop - start,
        )

    def map(self, function: TensorFunction) -> "ValueCodes":
        """``function`` applied along the batch dimension of each tensor."""
        names = ("planes", "scales", "largest", "relative_error")
        mapped: dict[str, Any] = {name: function(getattr(self, name)) for name in names}
        return replace(self, **mapped)

    def append(self, other: "ValueCodes") -> "ValueCodes":
        """These values followed by ``other``'s, of the same width; these fill whole tiles."""
        return replace(
            self,
            planes=torch.cat([self.planes, other.planes], 1),
            scales=torch.cat([self.scales, other.scales], -1),
            relative_error=joint_error(self, other),
            num_tokens=self.num_tokens + other.num_tokens,
        )

    def _token_scales(self) -> Tensor:
        return decode_scales(self.scales[..., : self.num_tokens], STEPS_PER_OCTAVE) * self.largest

    def _rotated(self) -> Tensor:
        """Rotated values before their tokens' scales, ``[B, H, D, num_tokens]``."""
        widths = (self.nbits,) * (self.planes.shape[2] // self.nbits)
        codes = unpack(self.planes, widths)[..., : self.num_tokens]
        centred = codes.float() - ((1 << (self.nbits - 1)) - 0.5)
        return centred.unflatten(1, (-1, self.head_dim))


def encode(values: Tensor, nbits: int, largest: Tensor | None = None) -> ValueCodes:
    """Code ``values [B, H, n, D]`` (finite, any float dtype) with ``nbits`` bits each, 1 to 8.

    ``largest [B, H, 1]``, where later tokens join earlier ones, is the scale that the earlier ones' are relative to;
    it is not used where the later ones exceed it.
    """
    x = values.float()
    turned = x @ hadamard(x.shape[-1]).to(x).mT
    energy = turned.square().sum(-1, keepdim=True)
    rms = (energy / x.shape[-1]).sqrt().clamp_min(torch.finfo(x.dtype).tiny)
    half = 1 << (nbits - 1)
    codes = ((turned / (rms * _STEPS[nbits - 1])).floor() + 0.5).clamp(0.5 - half, half - 0.5)
    # The scale for which the token's error is orthogonal to the token: such errors average out under attention.
    overlap = (codes * turned).sum(-1, keepdim=True)
    scales = (energy / overlap.clamp_min(torch.finfo(x.dtype).tiny))[..., 0]
    scales = torch.where(energy[..., 0] > 0, scales, 0.0)
    if largest is None or bool((scales.amax(-1, keepdim=True) > largest).any()):
        largest = 2 * scales.amax(-1, keepdim=True)  # room for later tokens
    scale_codes, _ = encode_scales(scales, STEPS_PER_OCTAVE, largest)
    planes = pack((codes + (half - 0.5)).to(torch.uint8).mT.flatten(1, 2), (nbits,) * (x.shape[1] * x.shape[-1]))
    hat = codes * (decode_scales(scale_codes, STEPS_PER_OCTAVE) * largest)[..., None]
    lost = (hat - turned).square().sum((-2, -1))
    whole = energy.sum((-2, -1)).clamp_min(torch.finfo(x.dtype).tiny)
    error = (lost / whole).sqrt().half()
    scale_codes = torch.nn.functional.pad(scale_codes, (0, -x.shape[-2] % TILE_TOKENS), value=ZERO)
    return ValueCodes(planes, scale_codes, largest, error, x.shape[-1], nbits, x.shape[-2])


@lru_cache
def hadamard(dim: int) -> Tensor:
    """A fixed orthogonal matrix ``[dim, dim]``: a Hadamard matrix with random signs, or a random one if there is none.

    Sylvester's construction for the power of two in ``dim``, a seeded QR factor for the odd rest.
    """
    generator = torch.Generator().manual_seed(_SEED)
    odd, matrix = dim, torch.ones(1, 1)
    while odd % 2 == 0:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
        odd //= 2
    if odd > 1:
        matrix = torch.kron(matrix, torch.linalg.qr(torch.randn(odd, odd, generator=generator)).Q.contiguous())
    signs = torch.randint(0, 2, (dim,), generator=generator) * 2 - 1
    return matrix * signs / math.sqrt(dim // odd)
