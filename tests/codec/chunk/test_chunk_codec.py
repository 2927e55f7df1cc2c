"""Chunks of tokens as records of a fixed size."""

import pytest
import torch
from torch import Tensor

from unsloth_spectral.codec.chunk.codec import ChunkCodec
from unsloth_spectral.codec.chunk.layout import Blocks, Heads, Latent, Planes
from unsloth_spectral.codec.chunk.record import HEADER_BYTES
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
    codec = ChunkCodec(bits, Planes(head_dim), THETA)
    record = codec.encode(chunk)
    assert record.dtype == torch.uint8
    assert len(record) == codec.nbytes(chunk.shape) == int(bits * chunk.numel() / 8)
    if bits < 8:  # at eight bits every component may get the largest width
        used = len(record) - int((record.flip(0) != 0).nonzero()[0])
        assert used > 0.97 * len(record)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_round_trip_in_every_dtype(dtype: torch.dtype) -> None:
    chunk = cached(4, 256, 2, 64).to(dtype)
    codec = ChunkCodec(4.0, Planes(64), THETA)
    back = codec.decode(codec.encode(chunk), chunk.shape, dtype)
    assert back.dtype == dtype
    assert back.shape == chunk.shape
    assert relative_error(chunk, back) < 0.08
    assert torch.equal(back[:, :, 0].float(), chunk[:, :, 0].float())  # the first token is exact


def test_more_bits_lose_less_and_eight_beat_fp8() -> None:
    chunk = cached(4, 256, 2, 64)
    errors = []
    for bits in (1.5, 2.5, 4.0, 8.0):
        codec = ChunkCodec(bits, Planes(64), THETA)
        errors.append(relative_error(chunk, codec.decode(codec.encode(chunk), chunk.shape, chunk.dtype)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < relative_error(chunk, chunk.to(torch.float8_e4m3fn))


def test_few_components_are_kept_where_their_basis_takes_most_of_the_bits() -> None:
    """Components cost more than their codes: were their first bits charged as others, the error would be 0.032."""
    chunk = cached(2, 1024, 2, 64)
    codec = ChunkCodec(1.5, Planes(64), THETA)
    back = codec.decode(codec.encode(chunk), chunk.shape, chunk.dtype)
    assert relative_error(chunk[0], back[0]) < 0.03


def test_the_layout_changes_no_number() -> None:
    """Keys and values are coded alike, wherever they lie in the chunk."""
    chunk = cached(3, 256, 2, 64)
    plain = ChunkCodec(3.0, Planes(64), THETA)
    expected = Planes(64).split(plain.decode(plain.encode(chunk), chunk.shape, chunk.dtype))
    keys, values = Planes(64).split(chunk)
    for layout in (Heads(64), Blocks(64, 128), Planes(64)):
        for shape in ((3, 256, 256), (1, 3, 256, 256)):
            codec, fused = ChunkCodec(3.0, layout, THETA), layout.join(keys, values, shape)
            record = codec.encode(fused)
            back = layout.split(codec.decode(record, shape, fused.dtype))
            torch.testing.assert_close(back, expected, rtol=0, atol=0)
            with pytest.raises(LoadError, match="other options"):
                ChunkCodec(3.0, Heads(32), THETA).decode(record, shape, fused.dtype)


def latents(layers: int, tokens: int, rank: int, rope: int) -> Tensor:
    """A chunk ``[1, layers, tokens, rank + rope]``: latents of normalized length with some loud channels, and rotated
    keys whose rotation pairs are neighbouring numbers."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(layers, tokens, rank, generator=generator) * torch.arange(1, rank + 1) ** -0.3
    latent = latent / latent.square().mean(-1, keepdim=True).sqrt()
    halves = cached(layers, tokens, 1, rope, start=5000)[0]
    pairs = torch.stack(halves.chunk(2, -1), -1).flatten(-2)
    return torch.cat([latent, pairs], -1)[None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("bits", "latent_error", "key_error"),
    [(2.5, 0.375, 0.01), (3.5, 0.2, 0.006), (4.5, 0.11, 0.003), (8.0, 0.02, 0.001)],
)
def test_latents_come_back(bits: float, latent_error: float, key_error: float, dtype: torch.dtype) -> None:
    chunk = latents(2, 256, 512, 64).to(dtype)
    codec = ChunkCodec(bits, Latent(512, 64), THETA)
    record = codec.encode(chunk)
    assert len(record) == int(bits * chunk.numel() / 8)
    back = codec.decode(record, chunk.shape, dtype)
    assert back.dtype == dtype
    assert relative_error(chunk[..., :512], back[..., :512]) < latent_error
    assert relative_error(chunk[..., 512:], back[..., 512:]) < key_error
    assert torch.equal(back[:, :, 0], chunk[:, :, 0])


def test_rotated_parts_of_latents_are_unrotated_in_neighbouring_pairs() -> None:
    chunk, errors = latents(4, 256, 512, 64), []
    for theta in (THETA, None):
        codec = ChunkCodec(1.3, Latent(512, 64), theta)
        back = codec.decode(codec.encode(chunk), chunk.shape, chunk.dtype)
        errors.append(relative_error(chunk[..., 512:], back[..., 512:]))
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("tokens", [256, 257, 1000])
@pytest.mark.parametrize(("rank", "rope"), [(512, 64), (256, 32), (96, 2), (60, 60)])
def test_latents_of_awkward_sizes(tokens: int, rank: int, rope: int) -> None:
    chunk = latents(1, tokens, rank, rope)[0]
    codec = ChunkCodec(6.0, Latent(rank, rope), THETA)
    assert relative_error(chunk, codec.decode(codec.encode(chunk), chunk.shape, chunk.dtype)) < 0.1


def test_where_the_chunk_stands_makes_no_difference() -> None:
    """Keys are un-rotated by their places within the chunk; the remaining rotation is the same for all of them."""
    codec, errors = ChunkCodec(2.5, Planes(64), THETA), []
    for start in (0, 256, 100_000):
        keys = cached(2, 256, 2, 64, start=start)
        back = codec.decode(codec.encode(keys), keys.shape, keys.dtype)
        errors.append(relative_error(keys[0], back[0]))
    assert max(errors) < 1.1 * min(errors)


def test_unrotating_keys_pays() -> None:
    chunk, errors = cached(4, 256, 2, 64, start=4096), []
    for theta in (THETA, None):
        codec = ChunkCodec(2.5, Planes(64), theta)
        errors.append(relative_error(chunk[0], codec.decode(codec.encode(chunk), chunk.shape, chunk.dtype)[0]))
    assert errors[0] < 0.8 * errors[1]


def test_constant_and_empty_chunks() -> None:
    codec = ChunkCodec(2.5, Planes(64), None)
    for chunk in (torch.zeros(2, 2, 256, 128), torch.full((2, 2, 256, 128), 3.0)):
        back = codec.decode(codec.encode(chunk), chunk.shape, chunk.dtype)
        torch.testing.assert_close(back[0], chunk[0], rtol=1e-3, atol=1e-6)
        assert bool(torch.isfinite(back).all())


def test_altered_cut_and_foreign_records_are_refused() -> None:
    chunk = cached(2, 256, 1, 64)
    codec = ChunkCodec(2.5, Planes(64), THETA)
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
        decode(record, ChunkCodec(2.5, Planes(64), 500_000.0))
    with pytest.raises(LoadError, match="other options"):
        codec.decode(record, chunk.shape, torch.float16)
    decode(record, ChunkCodec(2.5, Planes(64), int(THETA)))


def test_a_record_of_an_earlier_version_is_refused() -> None:
    chunk, codec = cached(2, 256, 1, 64), ChunkCodec(2.5, Planes(64), THETA)
    record = codec.encode(chunk)
    assert bytes(record[:4].tolist()) == b"USC4"
    record[3] = ord("1")
    with pytest.raises(LoadError, match="a spectral record of another version: it starts with b'USC1', not b'USC4'"):
        codec.decode(record, chunk.shape, chunk.dtype)
    record[0] = ord("X")
    with pytest.raises(LoadError, match="not a spectral record"):
        codec.decode(record, chunk.shape, chunk.dtype)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_chunk_that_is_not_finite_is_refused(number: float) -> None:
    chunk = cached(1, 256, 1, 64)
    chunk[0, 0, 17, 3] = number
    with pytest.raises(InvalidArgumentError, match="finite"):
        ChunkCodec(2.5, Planes(64), THETA).encode(chunk)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2, 4, 255, 128), torch.float16, "256 tokens"),
        ((2, 4, 16, 128), torch.float16, "256 tokens"),
        ((3, 4, 256, 128), torch.float16, "one plane or two"),
        ((256, 128), torch.float16, r"\[layers, tokens, width\]"),
        ((1, 2, 4, 256, 128), torch.float16, r"\[layers, tokens, width\]"),
        ((2, 4, 256, 100), torch.float16, "head_dim=64"),
        ((4, 256, 192), torch.float16, "head_dim=64"),
        ((2, 4, 256, 128), torch.uint8, "floating dtype"),
    ],
)
def test_layouts_that_cannot_be_coded(shape: tuple[int, ...], dtype: torch.dtype, message: str) -> None:
    codec = ChunkCodec(2.5, Planes(64), THETA)
    obstacle = codec.obstacle(shape, dtype)
    assert obstacle is not None
    with pytest.raises(InvalidArgumentError, match=message):
        codec.encode(torch.zeros(shape).to(dtype))


def test_too_few_bits_for_a_layout_are_refused() -> None:
    """Few dimensions: a byte per token and the exact token already take more than the budget."""
    obstacle = ChunkCodec(1.2, Planes(8), THETA).obstacle((2, 1, 256, 8), torch.float32)
    assert obstacle is not None
    assert "raise bits_per_element" in obstacle


@pytest.mark.parametrize(
    ("bits", "theta", "message"),
    [
        (0.9, THETA, "bits_per_element"),
        (9, THETA, "bits_per_element"),
        ("2.5", THETA, "bits_per_element"),
        (2.5, 0.5, "rope_theta"),
        (2.5, "10000", "rope_theta"),
    ],
)
def test_options_are_checked(bits: float, theta: float, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        ChunkCodec(bits, Planes(64), theta)
