"""Values as codes of their normalized Hadamard transform, unbiased for each token."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated

import torch
from torch import Tensor

from unsloth_spectral.codec.spectral import kernel, trellis
from unsloth_spectral.codec.spectral.packing import (
    MAX_NBITS,
    ROW_BYTES,
    TILE_TOKENS,
    filled,
    last_bytes,
    num_tiles,
    pack,
    unpack,
)
from unsloth_spectral.codec.spectral.scales import ZERO, decode_scales, encode_scales, squared_errors, unbiased_scales
from unsloth_spectral.codec.stored_tensors import Sizes, Stored, StoredTensors
from unsloth_spectral.codec.tensors import TensorFunction, TokenShape, joint_error
from unsloth_spectral.fields import Field, Fields

STEPS_PER_OCTAVE = 20
# For later tokens' scales, relative to the largest one. At 1 bit the first tokens of a run that goes on from another
# have few paths to choose from, which raises their scales up to threefold.
_ROOM = 4.0
_SEED = 0


@dataclass(frozen=True, slots=True, eq=False)
class ValueCodes(StoredTensors):
    """Values of one run of tokens, logical shape ``[B, H, num_tokens, D]``.

    Attributes:
        streams: ``[B, tiles, H * D * nbits, 16]`` uint8, see ``packing``; a component is a dimension of a head.
        carries: ``[B, H, D]`` uint8, the bytes that the streams go on from.
        scales: ``[B, H, tiles * 128]`` uint8, one a token, see ``scales``.
        largest: ``[B, H, 1]`` float32, the scale of code 0.
        relative_error: ``[B, H]`` float16, in the Frobenius norm.
        head_dim, nbits, num_tokens: D, the width of every code, and the number of tokens.
    """

    streams: Annotated[Tensor, Stored(torch.uint8, ("batch", "tiles", "rows", ROW_BYTES))]
    carries: Annotated[Tensor, Stored(torch.uint8, ("batch", "heads", "value_dim"))]
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

    @property
    def is_even(self) -> bool:
        """True if half of the tokens' scales lie in the upper part of the range that can be stored: the largest one is
        no rare exception."""
        return float(self.scales[..., : self.num_tokens].float().median()) < (ZERO - 1) / 2

    def slice(self, start: int, stop: int) -> "ValueCodes":
        """Tokens ``start`` to ``stop`` as views; ``start`` is a multiple of 128."""
        return replace(self.slice_tensors(start, stop), carries=self.carries_at(start), num_tokens=stop - start)

    def carries_at(self, token: int) -> Tensor:
        """The bytes ``[B, H, D]`` uint8 that streams go on from at ``token``, a multiple of 8."""
        carries = last_bytes(self.streams, self.carries.flatten(1), self._widths, token)
        return carries.unflatten(1, (-1, self.head_dim))

    def map(self, function: TensorFunction) -> "ValueCodes":
        """``function`` applied along the batch dimension of each tensor."""
        return self.map_tensors(function)

    def append(self, other: "ValueCodes") -> "ValueCodes":
        """These values followed by ``other``'s, of the same width and going on from these; these fill whole tiles."""
        num_tokens = self.num_tokens + other.num_tokens
        return replace(self.append_tensors(other), relative_error=joint_error(self, other), num_tokens=num_tokens)

    def fill(self, other: "ValueCodes") -> "ValueCodes":
        """These values followed by ``other``'s, of the same width and scale, which have room in the last tile."""
        start, num_tokens = self.num_tokens % TILE_TOKENS, self.num_tokens + other.num_tokens
        scales = self.scales.clone()
        scales[..., self.num_tokens : num_tokens] = other.scales[..., : other.num_tokens]
        streams = filled(self.streams, other.streams, self._widths, start, other.num_tokens)
        error = joint_error(self, other)
        return replace(self, streams=streams, scales=scales, relative_error=error, num_tokens=num_tokens)

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
        windows = unpack(self.streams, self.carries.flatten(1), self._widths)[..., : self.num_tokens]
        entries = trellis.entries_on(windows.device)[self.nbits - 1][windows.long()]
        return entries.unflatten(1, (-1, self.head_dim))

    @property
    def _widths(self) -> tuple[int, ...]:
        return (self.nbits,) * (self.streams.shape[2] // self.nbits)


def value_sizes(batch: int, heads: int, head_dim: int, nbits: int, num_tokens: int) -> dict[str, int]:
    """The sizes that the declarations of ``ValueCodes`` name."""
    tiles = num_tiles(num_tokens)
    return {
        "batch": batch,
        "heads": heads,
        "value_dim": head_dim,
        "tiles": tiles,
        "padded_tokens": tiles * TILE_TOKENS,
        "rows": heads * head_dim * nbits,
    }


def fixed_bytes(sizes: Sizes) -> int:
    """Bytes of the values' codes that do not depend on their width, without statistics."""
    return ValueCodes.bytes_without(("rows",), sizes)


def encode(values: Tensor, nbits: int, largest: Tensor | None = None, carries: Tensor | None = None) -> ValueCodes:
    """Code ``values [B, H, n, D]`` (finite, any float dtype) with ``nbits`` bits each, 1 to 8.

    ``largest [B, H, 1]``, where later tokens join earlier ones, is the scale that the earlier ones' are relative to;
    it is not used where the later ones exceed it. ``carries [B, H, D]`` uint8 is what their streams go on from.
    """
    rotated = hadamard(values.shape[-1]).to(values.device) @ values.float().mT
    tiny = torch.finfo(rotated.dtype).tiny
    encoded = (kernel.encode_values if kernel.is_available() else quantize)(rotated, nbits, carries)
    sums = encoded.energies, encoded.overlaps, encoded.squares
    scales = unbiased_scales(*sums)
    if largest is None or bool((scales.amax(-1, keepdim=True) > largest).any()):
        largest = _ROOM * scales.amax(-1, keepdim=True)
    scale_codes, _ = encode_scales(scales, STEPS_PER_OCTAVE, largest)
    stored = decode_scales(scale_codes, STEPS_PER_OCTAVE) * largest
    lost = squared_errors(*sums, stored).sum(-1).clamp_min(0)
    error = (lost / encoded.energies.sum(-1).clamp_min(tiny)).sqrt().half()
    num_tokens = values.shape[-2]
    scale_codes = torch.nn.functional.pad(scale_codes, (0, -num_tokens % TILE_TOKENS), value=ZERO)
    return ValueCodes(
        streams=encoded.streams,
        carries=encoded.carries,
        scales=scale_codes,
        largest=largest,
        relative_error=error,
        head_dim=values.shape[-1],
        nbits=nbits,
        num_tokens=num_tokens,
    )


def quantize(rotated: Tensor, nbits: int, carries: Tensor | None = None) -> kernel.Encoded:
    """``kernel.encode_values`` in torch, plain and slow."""
    batch, heads, head_dim, _ = rotated.shape
    energies = rotated.double().square().sum(-2)
    deviations = (energies / head_dim).sqrt().float().clamp_min(torch.finfo(torch.float32).tiny)
    inverse = (trellis.tables().units[nbits - 1] / deviations).clamp_max(trellis.LARGEST_INVERSE)[:, :, None]
    if nbits > trellis.MAX_TRELLIS_NBITS:
        windows = trellis.uniform_codes(rotated, inverse, nbits) << (MAX_NBITS - nbits)
        before = rotated.new_zeros(batch, heads, head_dim, dtype=torch.uint8) if carries is None else carries
    else:
        inputs = trellis.inputs_of(rotated, inverse).flatten(0, 2)
        given = None if carries is None else carries.flatten()
        windows, before = trellis.search(inputs, trellis.distances(nbits), nbits, given)
        windows, before = windows.view(rotated.shape), before.view(batch, heads, head_dim)
    reconstructed = trellis.entries_on(rotated.device)[nbits - 1][windows.long()].double()
    streams = pack((windows >> (MAX_NBITS - nbits)).flatten(1, 2), (nbits,) * (heads * head_dim))
    overlaps, squares = (reconstructed * rotated).sum(-2), reconstructed.square().sum(-2)
    return kernel.Encoded(streams, before, energies.float(), overlaps.float(), squares.float())


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
