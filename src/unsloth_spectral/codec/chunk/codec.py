"""A chunk of consecutive tokens of all layers, encoded into one record of a size known in advance.

A chunk has less information than a cache: it comes without queries and positions, with its keys already rotated, and
its record must stand alone. So

- keys are un-rotated by their places within the chunk. The place of the chunk itself rotates all of them alike, which
  the mean and the basis absorb;
- the metric is the identity, and one water level serves the keys of all layers;
- each record pays for its own mean and basis;
- the first token is kept exact: the first token of a text draws much attention, and a chunk may have it.

The level falls until the record is full; a remainder smaller than a component stays empty.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from unsloth_spectral.codec.chunk.layout import ChunkLayout
from unsloth_spectral.codec.chunk.record import HEADER_BYTES, LayerShape, Reader, read_header, write_header, write_layer
from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.codec.spectral import keys as key_codec
from unsloth_spectral.codec.spectral import values as value_codec
from unsloth_spectral.codec.spectral.allocate import uniform_value_width, widths_at
from unsloth_spectral.codec.spectral.packing import MAX_NBITS
from unsloth_spectral.codec.spectral.statistics import Basis, KeyStatistics
from unsloth_spectral.errors import InvalidArgumentError, LoadError
from unsloth_spectral.rope import Rotation, own_anchors

MIN_TOKENS = 256
_NUM_EXACT = 1
_OCTAVES = 100  # the range of levels, below the largest variance
_HALVINGS = 40


@dataclass(frozen=True, slots=True)
class ChunkCodec:
    """Encodes chunks into records and decodes them; both sides need the same options.

    A chunk is ``[layers, tokens, width]`` with one or two planes in front, of any floating dtype and 256 tokens or
    more; ``layout`` says where its keys and values lie.

    Attributes:
        bits_per_element: bits of the record for each number of the chunk, 1 to 8.
        layout: where the keys and values lie.
        rope_theta: base of the model's rotary embedding; None leaves keys rotated. A wrong value costs fidelity and
            nothing else: decoding rotates keys by the same angles.

    Raises:
        InvalidArgumentError: an option is out of its range.
    """

    bits_per_element: float
    layout: ChunkLayout
    rope_theta: float | None = None

    def __post_init__(self) -> None:
        if self.bits_per_element is None:
            raise InvalidArgumentError("bits_per_element must be a number, got None")
        SpectralConfig(bits_per_element=self.bits_per_element)
        theta = self.rope_theta
        if theta is not None and (isinstance(theta, bool) or not isinstance(theta, (int, float)) or not theta > 1):
            raise InvalidArgumentError(f"rope_theta must be a number above 1, or left out; got {theta!r}")

    def obstacle(self, shape: Sequence[int], dtype: torch.dtype) -> str | None:
        """Why chunks of this shape cannot be coded; None if they can."""
        if not dtype.is_floating_point:
            return f"chunks must be of a floating dtype, got {dtype}"
        if len(shape) not in (3, 4):
            return f"chunks must be [layers, tokens, width], with or without planes in front, got {tuple(shape)}"
        obstacle = self.layout.obstacle(shape)
        if obstacle is not None:
            return obstacle
        if shape[-2] < MIN_TOKENS:
            return f"chunks must have {MIN_TOKENS} tokens or more, got {shape[-2]}: raise the chunk size"
        layer = self._layer(shape, dtype)
        least = HEADER_BYTES + shape[-3] * layer.fixed_bytes(self._value_nbits(layer))
        if least > self.nbytes(shape):
            return (
                f"{self.bits_per_element} bits per element are {self.nbytes(shape)} bytes for {tuple(shape)}, of which "
                f"{least} are taken before any key is coded: raise bits_per_element"
            )
        return None

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of the record of a chunk of this shape."""
        return math.floor(self.bits_per_element * math.prod(shape) / 8)

    def encode(self, chunk: Tensor) -> Tensor:
        """The record of ``chunk``, ``[nbytes]`` uint8.

        Raises:
            InvalidArgumentError: the chunk's shape or dtype does not fit, or a number in it is not finite.
        """
        self._check(chunk.shape, chunk.dtype)
        if not bool(torch.isfinite(chunk.float()).all()):
            raise InvalidArgumentError("a chunk must be finite, got one with infinities or NaNs")
        keys, values = self.layout.split(chunk)
        layer_shape = self._layer(chunk.shape, chunk.dtype)
        value_nbits = self._value_nbits(layer_shape)
        rotation = self._rotation(keys.shape[-2] - _NUM_EXACT)
        metric = torch.eye(self.layout.key_dim, dtype=torch.float32, device="cpu").expand(1, keys.shape[1], -1, -1)
        runs = [
            KeyStatistics.of(layer_keys[None, :, _NUM_EXACT:], metric, rotation, own_anchors(rotation))
            for layer_keys in keys
        ]
        bases = [run.basis() for run in runs]
        record = torch.zeros(self.nbytes(chunk.shape), dtype=torch.uint8, device="cpu")
        level, widths = self._widths(bases, layer_shape, value_nbits, len(record))
        place = HEADER_BYTES
        for layer, run in enumerate(runs):
            coded, _ = key_codec.encode(run, key_codec.plan(bases[layer], widths[layer], level))
            coded_values = value_codec.encode(values[layer][None, :, _NUM_EXACT:], value_nbits)
            exact_keys, exact_values = keys[layer, :, :_NUM_EXACT], values[layer, :, :_NUM_EXACT]
            for field in write_layer(coded, coded_values, exact_keys, exact_values):
                record[place : place + len(field)] = field
                place += len(field)
        write_header(record, self._agreement(chunk.shape, chunk.dtype), value_nbits)
        return record

    def decode(self, record: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The chunk of a ``record [nbytes]`` uint8, with the ``shape`` and ``dtype`` it was encoded from.

        Raises:
            InvalidArgumentError: the shape or dtype does not fit.
            LoadError: the record is altered, cut short, or was made with other options or of another shape.
        """
        self._check(shape, dtype)
        if len(record) != self.nbytes(shape):
            raise LoadError(f"a record of {tuple(shape)} has {self.nbytes(shape)} bytes, got {len(record)}")
        value_nbits = read_header(record, self._agreement(shape, dtype))
        layer, reader = self._layer(shape, dtype), Reader(record)
        rotation = self._rotation(layer.num_tokens)
        size = (shape[-3], layer.num_heads, shape[-2])
        keys = torch.empty((*size, layer.key_dim), dtype=dtype, device="cpu")
        values = torch.empty((*size, layer.value_dim), dtype=dtype, device="cpu")
        for layer_keys, layer_values in zip(keys, values, strict=True):
            coded, coded_values, exact_keys, exact_values = reader.layer(layer, value_nbits, rotation)
            layer_keys[:, :_NUM_EXACT], layer_values[:, :_NUM_EXACT] = exact_keys, exact_values
            layer_keys[:, _NUM_EXACT:] = coded.reconstruct()[0].to(dtype)
            layer_values[:, _NUM_EXACT:] = coded_values.reconstruct()[0].to(dtype)
        return self.layout.join(keys, values, shape)

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

    def _check(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        obstacle = self.obstacle(shape, dtype)
        if obstacle is not None:
            raise InvalidArgumentError(obstacle)

    def _agreement(self, shape: Sequence[int], dtype: torch.dtype) -> bytes:
        # As floats: 8 and 8.0 in two servers' configurations are equal.
        theta = None if self.rope_theta is None else float(self.rope_theta)
        return repr((float(self.bits_per_element), self.layout, theta, tuple(shape), str(dtype))).encode()

    def _layer(self, shape: Sequence[int], dtype: torch.dtype) -> LayerShape:
        dims = (self.layout.key_dim, self.layout.value_dim)
        return LayerShape(self.layout.num_heads(shape), shape[-2] - _NUM_EXACT, _NUM_EXACT, *dims, dtype)

    def _rotation(self, num_tokens: int) -> Rotation | None:
        return None if self.rope_theta is None else _local_rotation(self.layout.key_dim, self.rope_theta, num_tokens)

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


@lru_cache(maxsize=8)
def _local_rotation(head_dim: int, rope_theta: float, num_tokens: int) -> Rotation:
    half = head_dim // 2
    step = float(rope_theta) ** (-torch.arange(half, dtype=torch.float64, device="cpu") / half)
    start = torch.ones(1, 1, half, dtype=torch.complex64, device="cpu")
    return Rotation(slice(0, half), slice(half, head_dim), start, step, num_tokens)
