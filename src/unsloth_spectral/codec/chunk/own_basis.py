"""Chunks in bases of their own: a mean and an 8-bit basis for each layer of each record.

- Keys are un-rotated by their places within the chunk. The place of the chunk itself rotates all of them alike, which
  the mean and the basis absorb.
- The metric is the identity, and one water level serves the keys of all layers. It falls until the record is full; a
  remainder smaller than a component stays empty.
- The first token is kept exact: the first token of a text draws much attention, and a chunk may have it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unsloth_spectral.codec.chunk.layout import ChunkLayout
from unsloth_spectral.codec.chunk.record import (
    HEADER_BYTES,
    LARGEST_NUMBER,
    OWN_BASIS,
    LayerShape,
    Reader,
    narrowed,
    write_layer,
)
from unsloth_spectral.codec.chunk.rotations import rotation_at, steps_of
from unsloth_spectral.codec.spectral import keys as key_codec
from unsloth_spectral.codec.spectral import values as value_codec
from unsloth_spectral.codec.spectral.allocate import uniform_value_width, widths_at
from unsloth_spectral.codec.spectral.packing import MAX_NBITS
from unsloth_spectral.codec.spectral.statistics import Basis, KeyStatistics
from unsloth_spectral.errors import InvalidArgumentError, LoadError
from unsloth_spectral.rope import Rotation, own_anchors

_NUM_EXACT = 1
_OCTAVES = 100  # the range of levels, below the largest variance
_HALVINGS = 40


@dataclass(frozen=True, slots=True)
class OwnBasis:
    """Attributes as in ``ChunkCodec``."""

    bits_per_element: float
    layout: ChunkLayout
    rope_theta: float | None

    magic: ClassVar[bytes] = OWN_BASIS

    @property
    def agreed(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def obstacle(self, shape: Sequence[int]) -> str | None:
        """Why chunks of this shape cannot be coded: any that has the layout can."""
        return None

    def least_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Bytes that a record takes before any key is coded."""
        layer = self._layer(shape, dtype)
        return HEADER_BYTES + shape[-3] * layer.fixed_bytes(self._value_nbits(layer))

    def encode(self, keys: Tensor, values: Tensor, shape: Sequence[int], nbytes: int) -> tuple[list[Tensor], int]:
        """What follows the header, at most ``nbytes`` of it, and the header's number: the values' width."""
        layer_shape = self._layer(shape, keys.dtype)
        value_nbits = self._value_nbits(layer_shape)
        rotation = self._rotation(layer_shape.num_tokens)
        metric = torch.eye(self.layout.key_dim, dtype=torch.float32, device="cpu").expand(1, keys.shape[1], -1, -1)
        runs = [
            KeyStatistics.of(layer_keys[None, :, _NUM_EXACT:], metric, rotation, own_anchors(rotation))
            for layer_keys in keys
        ]
        if not all(bool(torch.isfinite(run.mean).all()) for run in runs):
            raise InvalidArgumentError(f"the keys of a chunk must have means up to {LARGEST_NUMBER:g}")
        bases = [run.basis() for run in runs]
        level, widths = self._widths(bases, layer_shape, value_nbits, nbytes)
        fields = []
        for layer, run in enumerate(runs):
            coded, _ = key_codec.encode(run, key_codec.plan(bases[layer], widths[layer], level))
            coded_values = value_codec.encode(values[layer][None, :, _NUM_EXACT:], value_nbits)
            fields += write_layer(coded, coded_values, keys[layer, :, :_NUM_EXACT], values[layer, :, :_NUM_EXACT])
        return fields, value_nbits

    def decode(self, reader: Reader, number: int, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The keys and values that ``encode`` was given."""
        layer = self._layer(shape, dtype)
        if number != self._value_nbits(layer):
            raise LoadError(f"a record has values of {number} bits, not {self._value_nbits(layer)}")
        rotation = self._rotation(layer.num_tokens)
        size = (shape[-3], layer.num_heads, shape[-2])
        keys = torch.empty((*size, layer.key_dim), dtype=dtype, device="cpu")
        values = torch.empty((*size, layer.value_dim), dtype=dtype, device="cpu")
        for layer_keys, layer_values in zip(keys, values, strict=True):
            coded, coded_values, exact_keys, exact_values = reader.layer(layer, number, rotation)
            layer_keys[:, :_NUM_EXACT], layer_values[:, :_NUM_EXACT] = exact_keys, exact_values
            layer_keys[:, _NUM_EXACT:] = narrowed(coded.reconstruct()[0], dtype)
            layer_values[:, _NUM_EXACT:] = narrowed(coded_values.reconstruct()[0], dtype)
        return keys, values

    def _value_nbits(self, layer: LayerShape) -> int:
        if layer.value_dim == layer.key_dim:
            return uniform_value_width(self.bits_per_element)
        # The values are most of a latent: they take the largest width that leaves every component of the key as many
        # bits.
        for nbits in range(MAX_NBITS, 1, -1):
            key_bytes = layer.num_heads * layer.key_dim * (layer.component_bytes + nbits * layer.bit_bytes)
            elements = layer.num_heads * (layer.num_tokens + layer.num_exact) * (layer.key_dim + layer.value_dim)
            if 8 * (layer.fixed_bytes(nbits) + key_bytes) <= self.bits_per_element * elements:
                return nbits
        return 1

    def _layer(self, shape: Sequence[int], dtype: torch.dtype) -> LayerShape:
        dims = (self.layout.key_dim, self.layout.value_dim)
        return LayerShape(self.layout.num_heads(shape), shape[-2] - _NUM_EXACT, _NUM_EXACT, *dims, dtype)

    def _rotation(self, num_tokens: int) -> Rotation | None:
        if self.rope_theta is None:
            return None
        return rotation_at(steps_of(self.layout.key_dim, self.rope_theta), num_tokens)

    def _widths(self, bases: list[Basis], layer: LayerShape, value_nbits: int, nbytes: int) -> tuple[float, Tensor]:
        """The level at which the record is full, and the widths ``[layers, H, D]`` there."""
        variances = torch.cat([basis.variances for basis in bases])
        first_bit_cost = 1 + layer.component_bytes / layer.bit_bytes
        available = nbytes - HEADER_BYTES - len(bases) * layer.fixed_bytes(value_nbits)
        high = math.log2(max(float(variances.max()), 1e-30)) + 1
        low = high - _OCTAVES
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            widths = widths_at(2.0**middle, variances, first_bit_cost)
            needed = int(widths.sum()) * layer.bit_bytes + int((widths > 0).sum()) * layer.component_bytes
            low, high = (middle, high) if needed > available else (low, middle)
        return 2.0**high, widths_at(2.0**high, variances, first_bit_cost)
