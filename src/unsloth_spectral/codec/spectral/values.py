"""Values as codes of their normalized Hadamard transform, unbiased for each token."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated

import torch
from torch import Tensor

from unsloth_spectral.codec.spectral import kernel
from unsloth_spectral.codec.spectral.packing import MAX_NBITS, PLANE_BYTES, TILE_TOKENS, num_tiles, pack, unpack
from unsloth_spectral.codec.spectral.scales import ZERO, decode_scales, encode_scales
from unsloth_spectral.codec.stored_tensors import Stored, StoredTensors
from unsloth_spectral.codec.tensors import TensorFunction, TokenShape, joint_error
from unsloth_spectral.fields import Field, Fields

STEPS_PER_OCTAVE = 20
# Steps of the uniform quantizer of least squared error on a unit Gaussian, 1 to 8 bits (Max, 1960).
_STEPS = (1.596, 0.9957, 0.586, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)
_SEED = 0


@dataclass(frozen=True, slots=True, eq=False)
class ValueCodes(StoredTensors):
    """Values of one run of tokens, logical shape ``[B, H, num_tokens, D]``.

    Attributes:
        planes: ``[B, tiles, H * D * nbits, 16]`` uint8, see ``packing``.
        scales: ``[B, H, tiles * 128]`` uint8, one per token, see ``scales``.
        largest: ``[B, H, 1]`` float32, the scale of code 0.
        relative_error: ``[B, H]`` float16, in the Frobenius norm.
        head_dim, nbits, num_tokens: D, the width of every code, and the number of tokens.
    """

    planes: Annotated[Tensor, Stored(torch.uint8, ("batch", "tiles", "planes", PLANE_BYTES))]
    scales: Annotated[Tensor, Stored(torch.uint8, ("batch", "heads", "padded_tokens"), filling=ZERO)]
    largest: Annotated[Tensor, Stored(torch.float32, ("batch", "heads", 1))]
    relative_error: Annotated[Tensor, Stored(torch.float16, ("batch", "heads"), is_statistic=True)]
    head_dim: int
    nbits: int
    num_tokens: int

    def combine(self, weights: Tensor) -> Tensor:
        """Sum of the values under ``weights [B, H, rows, num_tokens]``; rotated back once, ``[B, H, rows, D]``."""
        scaled = weights * self._token_scales().to(weights.dtype)[:, :, None]
        rotated = scaled @ self._rotated().to(weights.dtype).mT
        return rotated @ hadamard(self.head_dim).to(weights)

    def reconstruct(self) -> Tensor:
        """The dense values, ``[B, H, num_tokens, D]`` float32."""
        rotated = self._rotated().mT * self._token_scales()[..., None]
        return rotated @ hadamard(self.head_dim).to(rotated)

    def slice(self, start: int, stop: int) -> "ValueCodes":
        """Tokens ``start`` to ``stop`` as views; ``start`` is a multiple of 128."""
        return replace(self.slice_tensors(start, stop), num_tokens=stop - start)

    def map(self, function: TensorFunction) -> "ValueCodes":
        """``function`` applied along the batch dimension of each tensor."""
        return self.map_tensors(function)

    def append(self, other: "ValueCodes") -> "ValueCodes":
        """These values followed by ``other``'s, of the same width; these fill whole tiles."""
        num_tokens = self.num_tokens + other.num_tokens
        return replace(self.append_tensors(other), relative_error=joint_error(self, other), num_tokens=num_tokens)

    def to_fields(self) -> dict[str, Field]:
        return {**self.tensors_to_fields(), "nbits": self.nbits, "num_tokens": self.num_tokens}

    @classmethod
    def from_fields(cls, fields: Fields, shape: TokenShape) -> "ValueCodes":
        nbits, num_tokens, head_dim = fields.integer("nbits", 1), fields.integer("num_tokens", 1), shape.value_dim
        fields.require(nbits <= MAX_NBITS, f"at most {MAX_NBITS} bits")
        tensors = cls.tensors_from_fields(fields, value_sizes(shape.batch, shape.heads, head_dim, nbits, num_tokens))
        return cls(**tensors, head_dim=head_dim, nbits=nbits, num_tokens=num_tokens)

    def _token_scales(self) -> Tensor:
        return decode_scales(self.scales[..., : self.num_tokens], STEPS_PER_OCTAVE) * self.largest

    def _rotated(self) -> Tensor:
        """Rotated values before their tokens' scales, ``[B, H, D, num_tokens]``."""
        widths = (self.nbits,) * (self.planes.shape[2] // self.nbits)
        codes = unpack(self.planes, widths)[..., : self.num_tokens]
        centred = codes.float() - ((1 << (self.nbits - 1)) - 0.5)
        return centred.unflatten(1, (-1, self.head_dim))


def value_sizes(batch: int, heads: int, head_dim: int, nbits: int, num_tokens: int) -> dict[str, int]:
    """The sizes that the declarations of ``ValueCodes`` name."""
    tiles = num_tiles(num_tokens)
    planes = heads * head_dim * nbits
    return {"batch": batch, "heads": heads, "tiles": tiles, "padded_tokens": tiles * TILE_TOKENS, "planes": planes}


def encode(values: Tensor, nbits: int, largest: Tensor | None = None) -> ValueCodes:
    """Code ``values [B, H, n, D]`` (finite, any float dtype) with ``nbits`` bits each, 1 to 8.

    ``largest [B, H, 1]`` is that of earlier codes which these are to join; it is not used if a scale exceeds it.
    """
    rotated = hadamard(values.shape[-1]).to(values.device) @ values.float().mT
    step, tiny = _STEPS[nbits - 1], torch.finfo(rotated.dtype).tiny
    quantized = kernel.encode_values(rotated, nbits, step) if kernel.serves(rotated) else quantize(rotated, nbits, step)
    planes, energy, overlap, squares = quantized
    # At this scale the token's error is orthogonal to the token: such errors average out under attention.
    scales = torch.where(energy > 0, energy / overlap.clamp_min(tiny), 0.0)
    if largest is None or bool((scales.amax(-1, keepdim=True) > largest).any()):
        largest = 2 * scales.amax(-1, keepdim=True)  # room for later tokens
    scale_codes, _ = encode_scales(scales, STEPS_PER_OCTAVE, largest)
    stored = decode_scales(scale_codes, STEPS_PER_OCTAVE) * largest
    # |stored * codes - token|^2, written without squares of tiny numbers.
    ratio = torch.where(energy > 0, stored / scales.clamp_min(tiny), 0.0)
    spread = scales * squares / overlap.clamp_min(tiny)
    lost = (energy * (ratio.square() * spread - 2 * ratio + 1)).sum(-1).clamp_min(0)
    error = (lost / energy.sum(-1).clamp_min(tiny)).sqrt().half()
    num_tokens = values.shape[-2]
    scale_codes = torch.nn.functional.pad(scale_codes, (0, -num_tokens % TILE_TOKENS), value=ZERO)
    return ValueCodes(
        planes=planes,
        scales=scale_codes,
        largest=largest,
        relative_error=error,
        head_dim=values.shape[-1],
        nbits=nbits,
        num_tokens=num_tokens,
    )


def quantize(rotated: Tensor, nbits: int, step: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Planes of Hadamard-rotated values ``rotated [B, H, D, n]``; and for each token, ``[B, H, n]`` float32: its
    squared length, its product with its codes around zero, and the squared length of these codes."""
    energy = rotated.square().sum(-2)
    rms = (energy / rotated.shape[-2]).sqrt().clamp_min(torch.finfo(rotated.dtype).tiny)
    half = 1 << (nbits - 1)
    codes = ((rotated / (rms * step)[:, :, None]).floor() + 0.5).clamp(0.5 - half, half - 0.5)
    planes = pack(
        (codes + (half - 0.5)).to(torch.uint8).flatten(1, 2), (nbits,) * (rotated.shape[1] * rotated.shape[2])
    )
    return planes, energy, (codes * rotated).sum(-2), codes.square().sum(-2)


@lru_cache
def hadamard(dim: int) -> Tensor:
    """A fixed orthogonal matrix ``[dim, dim]``: a Hadamard matrix with random signs.

    Sylvester's construction gives the power of two in ``dim``; an odd factor takes a seeded random orthogonal matrix.
    """
    generator = torch.Generator().manual_seed(_SEED)
    odd, matrix = dim, torch.ones(1, 1, dtype=torch.float32, device="cpu")
    while odd % 2 == 0:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
        odd //= 2
    if odd > 1:
        drawn = torch.randn(odd, odd, generator=generator, dtype=torch.float32, device="cpu")
        matrix = torch.kron(matrix, torch.linalg.qr(drawn).Q.contiguous())
    signs = torch.randint(0, 2, (dim,), generator=generator, dtype=torch.int64, device="cpu") * 2 - 1
    return matrix * signs / math.sqrt(dim // odd)
