"""A chunk of consecutive tokens of all layers, encoded into one record of a size known in advance.

A chunk has less information than a cache: it comes without queries and positions, with its keys already rotated, and
its record must stand alone. ``own_basis`` and ``of_model`` are two ways of coding it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from unsloth_spectral.codec.chunk.layout import ChunkLayout
from unsloth_spectral.codec.chunk.of_model import OfModel
from unsloth_spectral.codec.chunk.own_basis import OwnBasis
from unsloth_spectral.codec.chunk.record import HEADER_BYTES, LARGEST_NUMBER, Reader, read_header, write_header
from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.errors import InvalidArgumentError, LoadError

MIN_TOKENS = 256


class Coding(Protocol):
    """A way to code the keys and values of a chunk.

    Attributes:
        magic: the first bytes of its records.
    """

    magic: ClassVar[bytes]

    @property
    def agreed(self) -> tuple[str, ...]:
        """What both sides must agree on besides the options."""

    def obstacle(self, shape: Sequence[int]) -> str | None:
        """Why chunks of this shape, which has the layout, cannot be coded; None if they can."""

    def least_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Bytes that a record takes before any key is coded."""

    def encode(self, keys: Tensor, values: Tensor, shape: Sequence[int], nbytes: int) -> tuple[list[Tensor], int]:
        """What follows the header in a record of at most ``nbytes``, as tensors of bytes, and the header's number.

        ``keys`` and ``values`` are those of a chunk of ``shape``, as ``ChunkLayout.split`` gives them.
        """

    def decode(self, reader: Reader, number: int, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The keys and values of a chunk of ``shape``."""


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
        profile: of the model, with bases; None gives each record bases of its own.

    Raises:
        InvalidArgumentError: an option is out of its range, or the profile has no bases.
    """

    bits_per_element: float
    layout: ChunkLayout
    rope_theta: float | None = None
    profile: ModelProfile | None = field(default=None, repr=False)
    _coding: Coding = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.bits_per_element is None:
            raise InvalidArgumentError("bits_per_element must be a number, got None")
        SpectralConfig(bits_per_element=self.bits_per_element)
        theta = self.rope_theta
        if theta is not None and (isinstance(theta, bool) or not isinstance(theta, (int, float)) or not theta > 1):
            raise InvalidArgumentError(f"rope_theta must be a number above 1, or left out; got {theta!r}")
        coding: Coding
        if self.profile is None:
            coding = OwnBasis(self.bits_per_element, self.layout, theta)
        else:
            coding = OfModel(self.layout, theta, self.profile)
        object.__setattr__(self, "_coding", coding)

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
        obstacle = self._coding.obstacle(shape)
        if obstacle is not None:
            return obstacle
        least = self._coding.least_bytes(shape, dtype)
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
            InvalidArgumentError: the chunk's shape or dtype does not fit, or a number in it is not finite or is beyond
                those of float16.
        """
        self._check(chunk.shape, chunk.dtype)
        low, high = map(float, torch.aminmax(chunk.float()))
        if not -LARGEST_NUMBER <= low <= high <= LARGEST_NUMBER:  # NaN is neither less nor more
            rule = f"a chunk must be finite, with numbers from {-LARGEST_NUMBER:g} to {LARGEST_NUMBER:g}"
            raise InvalidArgumentError(f"{rule}, got {low:g} to {high:g}")
        keys, values = self.layout.split(chunk)
        nbytes = self.nbytes(chunk.shape)
        fields, number = self._coding.encode(keys, values, chunk.shape, nbytes)
        body = torch.cat(fields)
        assert HEADER_BYTES + len(body) <= nbytes, "padding would cut the record off"
        record = torch.nn.functional.pad(body, (HEADER_BYTES, nbytes - HEADER_BYTES - len(body)))
        write_header(record, self._agreement(chunk.shape, chunk.dtype), number, self._coding.magic)
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
        number = read_header(record, self._agreement(shape, dtype), self._coding.magic)
        keys, values = self._coding.decode(Reader(record), number, shape, dtype)
        return self.layout.join(keys, values, shape)

    def _check(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        obstacle = self.obstacle(shape, dtype)
        if obstacle is not None:
            raise InvalidArgumentError(obstacle)

    def _agreement(self, shape: Sequence[int], dtype: torch.dtype) -> bytes:
        # As floats: 8 and 8.0 in two servers' configurations are equal.
        theta = None if self.rope_theta is None else float(self.rope_theta)
        agreed = (float(self.bits_per_element), self.layout, theta, tuple(shape), str(dtype))
        return repr((*agreed, *self._coding.agreed)).encode()
