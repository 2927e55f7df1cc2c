"""Coded keys and values as bytes, one layer behind another, and back: what a record of a chunk is made of.

A record starts with a header: a magic word, a checksum of all that both sides must agree on, a checksum of what
follows, and the width of the values. Nothing else is needed: each layer's widths tell the sizes of what follows them.
"""

import struct
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from unsloth_spectral.codec.spectral.keys import KeyCodes, Widths
from unsloth_spectral.codec.spectral.packing import PLANE_BYTES, TILE_TOKENS, num_tiles
from unsloth_spectral.codec.spectral.scales import ZERO
from unsloth_spectral.codec.spectral.values import ValueCodes
from unsloth_spectral.errors import LoadError
from unsloth_spectral.rope import Rotation

_MAGIC = b"USC1"
_HEADER = struct.Struct("<4sIIB3x")
HEADER_BYTES = _HEADER.size


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One layer of a chunk: heads, coded tokens, exact tokens, numbers of a key and of a value, and the dtype."""

    num_heads: int
    num_tokens: int
    num_exact: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def component_bytes(self) -> int:
        """What a component of the keys takes beside its codes: a row of the basis, its scale, the groups' scales."""
        return self.key_dim + 4 + num_tiles(self.num_tokens)

    @property
    def bit_bytes(self) -> int:
        """What one more bit for a component takes."""
        return num_tiles(self.num_tokens) * PLANE_BYTES

    def fixed_bytes(self, value_nbits: int) -> int:
        """What goes whatever the keys' widths: those themselves, the mean, the values and the exact tokens."""
        keys, values = self.num_heads * self.key_dim, self.num_heads * self.value_dim
        exact = self.num_exact * (keys + values) * self.dtype.itemsize
        coded_values = values * value_nbits * self.bit_bytes + self.num_heads * (self.num_tokens + 4)
        return -(-keys // 2) + 2 * keys + coded_values + exact


def write_layer(keys: KeyCodes, values: ValueCodes, exact_keys: Tensor, exact_values: Tensor) -> list[Tensor]:
    """The bytes of one layer, in pieces; the exact keys and values ``[H, num_exact, dim]`` are the first tokens'."""
    widths = torch.zeros(keys.num_key_value_heads, keys.vectors.shape[-1], dtype=torch.uint8, device="cpu")
    for head, own in enumerate(keys.widths):
        widths[head, : len(own)] = torch.tensor(own, dtype=torch.uint8, device="cpu")
    flat = torch.nn.functional.pad(widths.flatten(), (0, widths.numel() % 2))
    parts = [flat[0::2] | flat[1::2] << 4, keys.planes, keys.scales, keys.vectors, keys.vector_scales, keys.mean]
    parts += [values.planes, values.scales[..., : values.num_tokens], values.largest, exact_keys, exact_values]
    return [part.contiguous().view(torch.uint8).flatten() for part in parts]


class Reader:
    """The layers of a record, one after another."""

    def __init__(self, record: Tensor) -> None:
        self._bytes, self._place = record, HEADER_BYTES

    def layer(
        self, shape: LayerShape, value_nbits: int, rotation: Rotation | None
    ) -> tuple[KeyCodes, ValueCodes, Tensor, Tensor]:
        """What ``write_layer`` was given.

        Raises:
            LoadError: the record ends too early.
        """
        heads, tiles = shape.num_heads, num_tiles(shape.num_tokens)
        widths = self._widths(heads, shape.key_dim)
        count = sum(map(len, widths))
        error = torch.zeros(1, heads, dtype=torch.float16, device="cpu")
        keys = KeyCodes(
            planes=self._take(torch.uint8, 1, tiles, sum(map(sum, widths)), PLANE_BYTES),
            scales=self._take(torch.uint8, 1, tiles, count),
            vectors=self._take(torch.int8, 1, count, shape.key_dim),
            vector_scales=self._take(torch.float32, 1, count, 1),
            mean=self._take(torch.float16, 1, heads, shape.key_dim),
            relative_error=error,
            widths=widths,
            num_tokens=shape.num_tokens,
            rotation=rotation,
            is_rotated=rotation is None,
        )
        planes = self._take(torch.uint8, 1, tiles, heads * shape.value_dim * value_nbits, PLANE_BYTES)
        scales = self._take(torch.uint8, 1, heads, shape.num_tokens)
        scales = torch.nn.functional.pad(scales, (0, -shape.num_tokens % TILE_TOKENS), value=ZERO)
        largest = self._take(torch.float32, 1, heads, 1)
        values = ValueCodes(planes, scales, largest, error, shape.value_dim, value_nbits, shape.num_tokens)
        exact_keys = self._take(shape.dtype, heads, shape.num_exact, shape.key_dim)
        return keys, values, exact_keys, self._take(shape.dtype, heads, shape.num_exact, shape.value_dim)

    def _widths(self, heads: int, dim: int) -> Widths:
        packed = self._take(torch.uint8, -(-heads * dim // 2))
        flat = torch.stack([packed & 15, packed >> 4], -1).flatten()[: heads * dim]
        return tuple(tuple(width for width in own if width) for own in flat.view(heads, dim).tolist())

    def _take(self, dtype: torch.dtype, *shape: int) -> Tensor:
        end = self._place + torch.Size(shape).numel() * dtype.itemsize
        if end > len(self._bytes):
            raise LoadError(f"a record of {len(self._bytes)} bytes ends too early: it needs {end}")
        # A copy, since what follows a run of bytes need not lie where its dtype wants it.
        piece, self._place = self._bytes[self._place : end].clone(), end
        return piece.view(dtype).view(shape)


def write_header(record: Tensor, agreement: bytes, value_nbits: int) -> None:
    """Fill in the first bytes of a ``record`` that is otherwise complete."""
    body = _checksum(record)
    header = bytearray(_HEADER.pack(_MAGIC, zlib.crc32(agreement), body, value_nbits))
    record[:HEADER_BYTES] = torch.frombuffer(header, dtype=torch.uint8)


def _checksum(record: Tensor) -> int:
    return zlib.crc32(record[HEADER_BYTES:].numpy().tobytes())


def read_header(record: Tensor, agreement: bytes) -> int:
    """The width of the values.

    Raises:
        LoadError: this is no record, an altered one, or one that was made with other options.
    """
    if len(record) < HEADER_BYTES:
        raise LoadError(f"not a spectral record: {len(record)} bytes are less than its header")
    magic, agreed, body, value_nbits = _HEADER.unpack(record[:HEADER_BYTES].numpy().tobytes())
    if magic != _MAGIC:
        raise LoadError(f"not a spectral record: it starts with {magic!r}, not {_MAGIC!r}")
    if agreed != zlib.crc32(agreement):
        raise LoadError(f"a record made with other options than {agreement.decode()}")
    if body != _checksum(record):
        raise LoadError("a record was altered: its checksum differs")
    return int(value_nbits)
