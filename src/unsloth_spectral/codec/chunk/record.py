"""Coded keys and values as bytes, one layer behind another, and back: what a record of a chunk is made of.

A record starts with a header: a magic word, a checksum of all that both sides must agree on, a checksum of what
follows, and a small number, whose meaning is the coding's. Nothing else is needed: each layer's widths tell the sizes
of what follows them.
"""

import struct
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unsloth_spectral.codec.spectral.keys import KeyCodes, Widths, fixed_bytes, key_sizes
from unsloth_spectral.codec.spectral.packing import MAX_NBITS, TILE_TOKENS
from unsloth_spectral.codec.spectral.values import ValueCodes, value_sizes
from unsloth_spectral.codec.stored_tensors import Sizes, StoredTensors
from unsloth_spectral.codec.tensors import raw_bytes
from unsloth_spectral.errors import LoadError
from unsloth_spectral.rope import Rotation, own_anchors

# The last letter counts versions.
OWN_BASIS, MODEL_BASIS = b"USC4", b"USC5"
_HEADER = struct.Struct("<4sIIB3x")
_CHECKED = 12  # the checksum is of what follows it: the number, and all behind the header
# Means are of float16, and sums of squares of float32.
LARGEST_NUMBER = torch.finfo(torch.float16).max
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
        return KeyCodes.bytes_per("components", self._key_sizes) + KeyCodes.bytes_per("vectors", self._key_sizes)

    @property
    def bit_bytes(self) -> int:
        """What one more bit for a component takes."""
        return KeyCodes.bytes_per("rows", self._key_sizes)

    def fixed_bytes(self, value_nbits: int) -> int:
        """What goes whatever the keys' widths: those themselves, the mean, the values and the exact tokens."""
        numbers = self.num_heads * (self.key_dim + self.value_dim)
        values = self.value_sizes(value_nbits)
        coded_values = ValueCodes.bytes_without((), values)
        widths = -(-self.num_heads * self.key_dim // 2)
        coded_keys = fixed_bytes(self._key_sizes)
        return widths + coded_keys + coded_values + self.num_exact * numbers * self.dtype.itemsize

    def key_sizes(self, widths: Widths) -> dict[str, int]:
        """The sizes of the coded keys."""
        return key_sizes(1, self.key_dim, widths, self.num_tokens)

    def value_sizes(self, value_nbits: int) -> dict[str, int]:
        """The sizes of the coded values. What fills up the last tile is not written."""
        sizes = value_sizes(1, self.num_heads, self.value_dim, value_nbits, self.num_tokens)
        return {**sizes, "padded_tokens": self.num_tokens}

    @property
    def _key_sizes(self) -> dict[str, int]:
        return self.key_sizes(((),) * self.num_heads)


def write_layer(keys: KeyCodes, values: ValueCodes, exact_keys: Tensor, exact_values: Tensor) -> list[Tensor]:
    """The bytes of one layer, in pieces; the exact keys and values ``[H, num_exact, dim]`` are the first tokens'."""
    widths = torch.zeros(keys.num_key_value_heads, keys.vectors.shape[-1], dtype=torch.uint8, device="cpu")
    for head, head_widths in enumerate(keys.widths):
        widths[head, : len(head_widths)] = torch.tensor(head_widths, dtype=torch.uint8, device="cpu")
    parts = [pack_nibbles(widths), *parts_of(keys), *parts_of(values), exact_keys, exact_values]
    return list(map(bytes_of, parts))


def parts_of(codes: KeyCodes | ValueCodes) -> list[Tensor]:
    """The tensors of ``codes`` that tokens are rebuilt from, without what fills up the last tile."""
    content = ((getattr(codes, name), stored) for name, stored in codes.content().items())
    return [
        tensor[..., : codes.num_tokens] if "padded_tokens" in stored.shape else tensor for tensor, stored in content
    ]


def pack_nibbles(numbers: Tensor) -> Tensor:
    """``numbers``, uint8 below 16, two in a byte."""
    flat = torch.nn.functional.pad(numbers.flatten(), (0, numbers.numel() % 2))
    return flat[0::2] | flat[1::2] << 4


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` float32, which may be changed, in ``dtype``; what is beyond its numbers becomes the outermost of them."""
    limits = torch.finfo(dtype)
    return (x.clamp_(limits.min, limits.max) if limits.max <= LARGEST_NUMBER else x).to(dtype)


def bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of ``tensor``, ``[n]`` uint8."""
    # A tensor of one element counts as contiguous with any strides; a view of its bytes wants a stride of 1.
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8).flatten()


class Reader:
    """What a record holds behind its header, one after another.

    Each method raises LoadError if the record ends too early, or has widths that no encoder writes.
    """

    def __init__(self, record: Tensor) -> None:
        self._bytes, self._place = record, HEADER_BYTES

    def layer(
        self, shape: LayerShape, value_nbits: int, rotation: Rotation | None
    ) -> tuple[KeyCodes, ValueCodes, Tensor, Tensor]:
        """What ``write_layer`` was given; ``value_nbits`` is 1 to 8."""
        widths = self._widths(shape.num_heads, shape.key_dim)
        error = torch.zeros(1, shape.num_heads, dtype=torch.float16, device="cpu")
        keys = KeyCodes(
            **self.tensors(KeyCodes, shape.key_sizes(widths)),
            relative_error=error,
            widths=widths,
            num_tokens=shape.num_tokens,
            rotation=rotation,
            spans=own_anchors(rotation),
        )
        values = ValueCodes(
            **self.tensors(ValueCodes, shape.value_sizes(value_nbits)),
            relative_error=error,
            head_dim=shape.value_dim,
            nbits=value_nbits,
            num_tokens=shape.num_tokens,
        )
        exact_keys = self.take(shape.dtype, shape.num_heads, shape.num_exact, shape.key_dim)
        exact_values = self.take(shape.dtype, shape.num_heads, shape.num_exact, shape.value_dim)
        return keys, values, exact_keys, exact_values

    def tensors(self, codes: type[StoredTensors], sizes: Sizes) -> dict[str, Any]:
        """What ``parts_of`` such codes gave, the last tile filled up, by name."""
        tensors = {}
        for name, stored in codes.content().items():
            tensor = self.take(stored.dtype, *stored.sizes(sizes))
            if "padded_tokens" in stored.shape:
                tensor = torch.nn.functional.pad(tensor, (0, -tensor.shape[-1] % TILE_TOKENS), value=stored.filling)
            tensors[name] = tensor
        return tensors

    def _widths(self, heads: int, dim: int) -> Widths:
        rows = self.nibbles(heads, dim).tolist()
        return tuple(tuple(width for width in row if width) for row in rows)

    def nibbles(self, *shape: int) -> Tensor:
        """Widths of 0 to 8 that ``pack_nibbles`` packed."""
        count = torch.Size(shape).numel()
        packed = self.take(torch.uint8, -(-count // 2))
        widths = torch.stack([packed & 15, packed >> 4], -1).flatten()[:count].view(shape)
        if int(widths.max()) > MAX_NBITS:
            raise LoadError(f"a record has codes of {int(widths.max())} bits, more than {MAX_NBITS}")
        return widths

    def take(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """The next tensor."""
        end = self._place + torch.Size(shape).numel() * dtype.itemsize
        if end > len(self._bytes):
            raise LoadError(f"a record of {len(self._bytes)} bytes ends too early: it needs {end}")
        # A copy, since what follows a run of bytes need not lie where its dtype wants it.
        piece, self._place = self._bytes[self._place : end].clone(), end
        return piece.view(dtype).view(shape)


def write_header(record: Tensor, agreement: bytes, number: int, magic: bytes = OWN_BASIS) -> None:
    """Fill in the first bytes of a ``record`` that is otherwise complete; ``number`` is below 256."""
    agreed = zlib.crc32(agreement)
    record[:HEADER_BYTES] = _header(magic, agreed, 0, number)
    record[:HEADER_BYTES] = _header(magic, agreed, _checksum(record), number)


def _header(magic: bytes, agreed: int, checksum: int, number: int) -> Tensor:
    return torch.frombuffer(bytearray(_HEADER.pack(magic, agreed, checksum, number)), dtype=torch.uint8)


def _checksum(record: Tensor) -> int:
    return zlib.crc32(raw_bytes(record[_CHECKED:]))


def read_header(record: Tensor, agreement: bytes, magic: bytes = OWN_BASIS) -> int:
    """The number in the header.

    Raises:
        LoadError: this is no record, an altered one, or one that was made with other options.
    """
    if len(record) < HEADER_BYTES:
        raise LoadError(f"not a spectral record: {len(record)} bytes are less than its header")
    found, agreed, body, number = _HEADER.unpack(record[:HEADER_BYTES].numpy().tobytes())
    if found != magic:
        what = "a spectral record of another version" if found[:3] == magic[:3] else "not a spectral record"
        raise LoadError(f"{what}: it starts with {found!r}, not {magic!r}")
    if agreed != zlib.crc32(agreement):
        raise LoadError(f"a record made with other options than {agreement.decode()}")
    if body != _checksum(record):
        raise LoadError("a record was altered: its checksum differs")
    return int(number)
