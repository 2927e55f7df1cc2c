"""Chunks of tokens as records of a size known beforehand."""

import pytest
import torch
from torch import Tensor

from unsloth_spectral.codec.chunk import ChunkCodec
from unsloth_spectral.codec.record import HEADER_BYTES
from unsloth_spectral.errors import InvalidArgumentError, LoadError

THETA = 10_000.0


def cached(layers: int, tokens: int, heads: int, head_dim: int, start: int = 0, seed: int = 0) -> Tensor:
    """A chunk ``[2, layers, tokens, heads * head_dim]`` as models cache them: keys with a mean and falling spectra."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, head_dim + 1) ** -0.7
    mix = torch.linalg.qr(torch.randn(layers, heads, head_dim, head_dim, generator=generator)).Q
    keys = (torch.randn(layers, heads, tokens, head_dim, generator=generator) * scale) @ mix
    keys = keys + 2 * torch.randn(layers, heads, 1, head_dim, generator=generator)
    half = head_dim // 2
    angles = torch.arange(start, start + tokens)[:, None] * THETA ** (-torch.arange(half) / half)
    real, imaginary = keys.split(half, -1)
    cos, sin = angles.cos(), angles.sin()
    keys = torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)
    values = torch.randn(layers, heads, tokens, head_dim, generator=generator)
    return torch.stack([keys, values]).transpose(2, 3).flatten(3)


def relative_error(chunk: Tensor, back: Tensor) -> float:
    return float((back.float() - chunk.float()).norm() / chunk.float().norm())


@pytest.mark.parametrize(
    ("layers", "tokens", "heads", "head_dim"), [(1, 256, 1, 64), (3, 256, 2, 64), (2, 500, 3, 80), (2, 1024, 1, 128)]
)
@pytest.mark.parametrize("bits", [2.5, 4.0, 8.0])
def test_a_record_has_its_size_and_is_nearly_full(
    layers: int, tokens: int, heads: int, head_dim: int, bits: float
) -> None:
    chunk = cached(layers, tokens, heads, head_dim)
    codec = ChunkCodec(bits, head_dim, THETA)
    record = codec.encode(chunk)
    assert record.dtype == torch.uint8
    assert len(record) == codec.nbytes(chunk.shape) == int(bits * chunk.numel() / 8)
    if bits < 8:  # at eight bits all components may have all there are
        used = len(record) - int((record.flip(0) != 0).nonzero()[0])
        assert used > 0.97 * len(record)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_round_trip_in_every_dtype(dtype: torch.dtype) -> None:
    chunk = cached(4, 256, 2, 64).to(dtype)
    codec = ChunkCodec(4.0, 64, THETA)
    back = codec.decode(codec.encode(chunk), chunk.shape, dtype)
    assert back.dtype == dtype
    assert back.shape == chunk.shape
    assert relative_error(chunk, back) < 0.08
    assert torch.equal(back[:, :, 0].float(), chunk[:, :, 0].float())  # the first token is exact


def test_more_bits_lose_less_and_eight_beat_fp8() -> None:
    chunk = cached(4, 256, 2, 64)
    errors = []
    for bits in (1.5, 2.5, 4.0, 8.0):
        codec = ChunkCodec(bits, 64, THETA)
        errors.append(relative_error(chunk, codec.decode(codec.encode(chunk), chunk.shape, chunk.dtype)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < relative_error(chunk, chunk.to(torch.float8_e4m3fn))


def test_both_layouts_hold_the_same() -> None:
    chunk = cached(3, 256, 2, 64)
    fused = chunk.unflatten(-1, (2, 64)).permute(1, 2, 3, 0, 4).flatten(2)
    assert fused.shape == (3, 256, 256)
    codec = ChunkCodec(3.0, 64, THETA)
    back = codec.decode(codec.encode(chunk), chunk.shape, chunk.dtype)
    fused_back = codec.decode(codec.encode(fused.contiguous()), fused.shape, fused.dtype)
    torch.testing.assert_close(
        fused_back, back.unflatten(-1, (2, 64)).permute(1, 2, 3, 0, 4).flatten(2), rtol=0, atol=0
    )


def test_blocks_of_transposed_keys_hold_the_same() -> None:
    """As vLLM's CPU kernels keep them: in each block of 128 tokens a head's keys ``[64, 128]``, then its values."""
    chunk = cached(3, 256, 2, 64)
    packed = torch.empty(3, 256, 2, 128)
    for layer in range(3):
        for head in range(2):
            for block in range(2):
                own = chunk[:, layer, 128 * block : 128 * (block + 1), 64 * head : 64 * (head + 1)]
                both = torch.cat([own[0].mT.flatten(), own[1].flatten()])
                packed[layer, 128 * block : 128 * (block + 1), head] = both.view(128, 128)
    packed = packed.flatten(2)
    plain, blocked = ChunkCodec(3.0, 64, THETA), ChunkCodec(3.0, 64, THETA, block_tokens=128)
    back = plain.decode(plain.encode(chunk), chunk.shape, chunk.dtype)
    record = blocked.encode(packed)
    packed_back = blocked.decode(record, packed.shape, packed.dtype)
    keys, values = blocked._split(packed_back)
    expected = back.unflatten(-1, (2, 64)).transpose(2, 3)
    torch.testing.assert_close(torch.stack([keys, values]), expected, rtol=0, atol=0)
    with pytest.raises(LoadError, match="other options"):
        plain.decode(record, packed.shape, packed.dtype)


def test_where_the_chunk_stands_makes_no_difference() -> None:
    """Keys are turned back by their places within the chunk: what is left turns all of them alike."""
    codec, errors = ChunkCodec(2.5, 64, THETA), []
    for start in (0, 256, 100_000):
        keys = cached(2, 256, 2, 64, start=start)
        back = codec.decode(codec.encode(keys), keys.shape, keys.dtype)
        errors.append(relative_error(keys[0], back[0]))
    assert max(errors) < 1.1 * min(errors)


def test_turning_keys_back_pays() -> None:
    chunk, errors = cached(4, 256, 2, 64, start=4096), []
    for theta in (THETA, None):
        codec = ChunkCodec(2.5, 64, theta)
        errors.append(relative_error(chunk[0], codec.decode(codec.encode(chunk), chunk.shape, chunk.dtype)[0]))
    assert errors[0] < 0.8 * errors[1]


def test_constant_and_empty_chunks() -> None:
    codec = ChunkCodec(2.5, 64, None)
    for chunk in (torch.zeros(2, 2, 256, 128), torch.full((2, 2, 256, 128), 3.0)):
        back = codec.decode(codec.encode(chunk), chunk.shape, chunk.dtype)
        torch.testing.assert_close(back[0], chunk[0], rtol=1e-3, atol=1e-6)
        assert bool(torch.isfinite(back).all())


def test_altered_cut_and_foreign_records_are_refused() -> None:
    chunk = cached(2, 256, 1, 64)
    codec = ChunkCodec(2.5, 64, THETA)
    record = codec.encode(chunk)

    def decode(changed: Tensor, by: ChunkCodec = codec) -> Tensor:
        return by.decode(changed, chunk.shape, chunk.dtype)

    for place in (0, 5, 9, HEADER_BYTES, len(record) // 2, len(record) - 1):
        altered = record.clone()
        altered[place] ^= 1
        with pytest.raises(LoadError):
            decode(altered)
    with pytest.raises(LoadError, match="bytes"):
        decode(record[:-1])
    with pytest.raises(LoadError, match="other options"):
        decode(record, ChunkCodec(2.5, 64, 500_000.0))
    with pytest.raises(LoadError, match="other options"):
        codec.decode(record, chunk.shape, torch.float16)
    decode(record, ChunkCodec(2.5, 64, int(THETA)))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_chunk_that_is_not_finite_is_refused(number: float) -> None:
    chunk = cached(1, 256, 1, 64)
    chunk[0, 0, 17, 3] = number
    with pytest.raises(InvalidArgumentError, match="finite"):
        ChunkCodec(2.5, 64, THETA).encode(chunk)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2, 4, 255, 128), torch.float16, "256 tokens"),
        ((2, 4, 16, 128), torch.float16, "256 tokens"),
        ((1, 4, 256, 128), torch.float16, r"\[2, layers"),
        ((256, 128), torch.float16, r"\[2, layers"),
        ((2, 4, 256, 100), torch.float16, "head_dim=64"),
        ((4, 256, 192), torch.float16, "head_dim=64"),
        ((2, 4, 256, 128), torch.uint8, "floating dtype"),
    ],
)
def test_layouts_that_cannot_be_coded(shape: tuple[int, ...], dtype: torch.dtype, message: str) -> None:
    codec = ChunkCodec(2.5, 64, THETA)
    obstacle = codec.obstacle(shape, dtype)
    assert obstacle is not None
    with pytest.raises(InvalidArgumentError, match=message):
        codec.encode(torch.zeros(shape).to(dtype))


def test_too_few_bits_for_a_layout_are_refused() -> None:
    """Few dimensions: a byte a token and the exact token already take more than is there."""
    obstacle = ChunkCodec(1.2, 8, THETA).obstacle((2, 1, 256, 8), torch.float32)
    assert obstacle is not None
    assert "raise bits_per_element" in obstacle


@pytest.mark.parametrize(
    ("bits", "head_dim", "theta", "message"),
    [
        (1.0, 64, THETA, "bits_per_element"),
        (9, 64, THETA, "bits_per_element"),
        ("2.5", 64, THETA, "bits_per_element"),
        (2.5, 63, THETA, "head_dim"),
        (2.5, 0, THETA, "head_dim"),
        (2.5, 64.0, THETA, "head_dim"),
        (2.5, 64, 0.5, "rope_theta"),
        (2.5, 64, "10000", "rope_theta"),
    ],
)
def test_options_are_checked(bits: float, head_dim: int, theta: float, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        ChunkCodec(bits, head_dim, theta)
