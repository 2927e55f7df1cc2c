"""Damaged records and chunks of extreme numbers, in either way of coding: an error, or numbers near the chunk's."""

import pytest
import torch
from known_model import THETA, chunk_of, known_profile
from torch import Tensor

from unsloth_spectral.codec.chunk.codec import ChunkCodec
from unsloth_spectral.codec.chunk.layout import Latent, Planes
from unsloth_spectral.codec.chunk.record import HEADER_BYTES, write_header
from unsloth_spectral.errors import InvalidArgumentError, LoadError

PROFILE = known_profile(2, 2, 64)
both = pytest.mark.parametrize(
    "codec", [ChunkCodec(2.5, Planes(64), THETA), ChunkCodec(2.5, Planes(64), THETA, PROFILE)], ids=["own", "model"]
)
# Where the values' widths stand with a profile: behind the number of the chunk, and the widths of 256 components.
VALUES = HEADER_BYTES + 4 + 256 // 2


@pytest.fixture
def chunk() -> Tensor:
    return chunk_of(PROFILE, 256, 0)


def signed(codec: ChunkCodec, record: Tensor, chunk: Tensor, number: int | None = None) -> Tensor:
    """The ``record`` with a header that fits it."""
    number = int(record[12]) if number is None else number
    write_header(record, codec._agreement(chunk.shape, chunk.dtype), number, codec._coding.magic)
    return record


@both
def test_no_byte_of_the_header_may_change(codec: ChunkCodec, chunk: Tensor) -> None:
    record = codec.encode(chunk)
    for place in range(HEADER_BYTES):
        for bit in (1, 2, 128):
            altered = record.clone()
            altered[place] ^= bit
            with pytest.raises(LoadError):
                codec.decode(altered, chunk.shape, chunk.dtype)


@both
def test_widths_that_no_encoder_writes_are_refused(codec: ChunkCodec, chunk: Tensor) -> None:
    record = codec.encode(chunk)
    record[HEADER_BYTES + (4 if codec.profile else 0)] = 0x39
    with pytest.raises(LoadError, match="codes of 9 bits"):
        codec.decode(signed(codec, record, chunk), chunk.shape, chunk.dtype)


@both
def test_numbers_that_no_encoder_writes_are_refused(codec: ChunkCodec, chunk: Tensor) -> None:
    for number in (3, 9, 255) if codec.profile else (0, 3, 9, 255):
        record = signed(codec, codec.encode(chunk), chunk, number)
        with pytest.raises(LoadError, match="a record has values of"):
            codec.decode(record, chunk.shape, chunk.dtype)


@pytest.mark.parametrize("width", [0, 9, 255])
def test_values_of_no_width_are_refused(chunk: Tensor, width: int) -> None:
    codec = ChunkCodec(2.5, Planes(64), THETA, PROFILE)
    record = codec.encode(chunk)
    assert 1 <= int(record[VALUES]) <= 8
    record[VALUES] = width
    with pytest.raises(LoadError, match=rf"values of \[{width}, "):
        codec.decode(signed(codec, record, chunk), chunk.shape, chunk.dtype)


@both
@pytest.mark.parametrize("number", [1e5, 1e20, 3e38])
def test_numbers_beyond_those_of_float16_are_refused(codec: ChunkCodec, chunk: Tensor, number: float) -> None:
    for place in ((0, 0, 17, 3), (1, 1, 99, 4)):
        large = chunk.clone()
        large[place] = -number
        with pytest.raises(InvalidArgumentError, match="from -65504 to 65504, got -"):
            codec.encode(large)


@both
def test_large_numbers_come_back(codec: ChunkCodec, chunk: Tensor) -> None:
    large = chunk / chunk.abs().amax() * 65504
    back = codec.decode(codec.encode(large), large.shape, large.dtype)
    assert float((back - large).norm() / large.norm()) < 0.4


def test_a_mean_beyond_the_numbers_of_float16_is_refused() -> None:
    """Un-rotating equal parts of a pair makes one of them larger."""
    with pytest.raises(InvalidArgumentError, match="must have means up to 65504"):
        ChunkCodec(2.5, Planes(64), THETA).encode(torch.full((2, 2, 256, 128), 65504.0))


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e5m2])
def test_errors_do_not_lead_beyond_the_numbers_of_a_narrow_dtype(codec: ChunkCodec, dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    chunk = chunk_of(PROFILE, 256, 3)
    chunk[1] *= most / 3  # values of which some are clamped
    chunk = chunk.clamp(-most, most).to(dtype)
    back = codec.decode(codec.encode(chunk), chunk.shape, dtype)
    assert bool(torch.isfinite(back.float()).all())


def test_a_latent_takes_no_profile() -> None:
    codec = ChunkCodec(2.5, Latent(512, 64), THETA, known_profile(2, 1, 64))
    chunk = torch.randn(1, 2, 256, 576, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InvalidArgumentError, match="leave profile out"):
        codec.encode(chunk)
