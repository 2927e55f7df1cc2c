"""Chunks in the bases of a model's profile."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from known_model import THETA, chunk_of, known_profile
from torch import Tensor

from unsloth_spectral.codec.chunk import of_model, rotations
from unsloth_spectral.codec.chunk.codec import ChunkCodec
from unsloth_spectral.codec.chunk.layout import Blocks, Heads, Planes
from unsloth_spectral.codec.chunk.record import HEADER_BYTES, Reader
from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.codec.spectral import kernel, packing
from unsloth_spectral.codec.spectral import keys as key_codec
from unsloth_spectral.errors import InvalidArgumentError, LoadError

PROFILE = known_profile(3, 2, 64)


def there_and_back(codec: ChunkCodec, chunk: Tensor) -> Tensor:
    return codec.decode(codec.encode(chunk), chunk.shape, chunk.dtype)


def relative_error(chunk: Tensor, back: Tensor) -> float:
    return float((back.float() - chunk.float()).norm() / chunk.float().norm())


def number_in(record: Tensor) -> int:
    """The number of chunks that come before, as the record tells."""
    return int(Reader(record).take(torch.int32, 1))


@pytest.mark.parametrize(
    ("layers", "heads", "dim", "tokens"),
    [(1, 1, 64, 256), (3, 2, 64, 256), (2, 3, 80, 300), (2, 1, 32, 257), (2, 1, 128, 1024), (3, 1, 6, 511)],
)
@pytest.mark.parametrize("bits", [2.5, 4.0, 8.0])
@pytest.mark.parametrize("number", [0, 5])
def test_a_record_has_its_size_is_nearly_full_and_comes_back(
    layers: int, heads: int, dim: int, tokens: int, bits: float, number: int
) -> None:
    profile = known_profile(layers, heads, dim)
    chunk = chunk_of(profile, tokens, number)
    codec = ChunkCodec(bits, Planes(dim), THETA, profile)
    record = codec.encode(chunk)
    assert record.dtype == torch.uint8
    assert len(record) == codec.nbytes(chunk.shape) == int(bits * chunk.numel() / 8)
    used = len(record) - int((record.flip(0) != 0).nonzero()[0])
    assert used > 0.97 * len(record)
    back = codec.decode(record, chunk.shape, chunk.dtype)
    # A tile of 128 tokens takes as many bytes as its first token does.
    paid = bits * tokens / (-(-tokens // 128) * 128)
    assert relative_error(chunk, back) < (0.35 if paid > 2.2 else 0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("number", [0, 2])
def test_round_trip_in_every_dtype(dtype: torch.dtype, number: int) -> None:
    chunk = chunk_of(PROFILE, 256, number).to(dtype)
    back = there_and_back(ChunkCodec(4.0, Planes(64), THETA, PROFILE), chunk)
    assert back.dtype == dtype
    assert back.shape == chunk.shape
    assert relative_error(chunk, back) < 0.12
    assert torch.equal(back[:, :, 0].float(), chunk[:, :, 0].float()) == (number == 0)


def test_more_bits_lose_less() -> None:
    chunk = chunk_of(PROFILE, 256, 3)
    errors = [
        relative_error(chunk, there_and_back(ChunkCodec(bits, Planes(64), THETA, PROFILE), chunk))
        for bits in (1.5, 2.5, 4.0, 8.0)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02


@pytest.mark.parametrize("number", [0, 7])
def test_keys_lose_less_than_in_bases_of_their_own(number: int) -> None:
    """A record of its own pays for its vectors. The values of both have two bits."""
    profile = known_profile(2, 2, 64)
    profile = replace(profile, value_sensitivities=(2e-4,) * 2)
    chunk = chunk_of(profile, 256, number)
    own, of_the_model = (
        relative_error(chunk[0], there_and_back(ChunkCodec(2.5, Planes(64), THETA, given), chunk)[0])
        for given in (None, profile)
    )
    assert of_the_model < 0.8 * own


def test_a_scaled_rotary_embedding_is_that_of_the_profile() -> None:
    """Slow pairs turn eight times slower than the base says, as Llama 3.1's do."""
    steps = tuple(step if step > 0.1 else step / 8 for step in rotations.steps_of(64, THETA))
    profile = replace(PROFILE, rope_steps=steps)
    chunk = chunk_of(profile, 256, 40)
    record = ChunkCodec(3.0, Planes(64), THETA, profile).encode(chunk)
    assert number_in(record) == 40
    by_steps, by_base = (
        relative_error(chunk[0], there_and_back(ChunkCodec(3.0, Planes(64), THETA, given), chunk)[0])
        for given in (profile, PROFILE)
    )
    assert by_steps < 0.6 * by_base
    without_base = there_and_back(ChunkCodec(3.0, Planes(64), None, profile), chunk)
    assert relative_error(chunk[0], without_base[0]) == by_steps


def test_the_layout_changes_no_number() -> None:
    chunk = chunk_of(PROFILE, 256, 4)
    expected = Planes(64).split(there_and_back(ChunkCodec(3.0, Planes(64), THETA, PROFILE), chunk))
    keys, values = Planes(64).split(chunk)
    for layout in (Heads(64), Blocks(64, 128), Planes(64)):
        for shape in ((3, 256, 256), (1, 3, 256, 256)):
            fused = layout.join(keys, values, shape)
            back = layout.split(there_and_back(ChunkCodec(3.0, layout, THETA, PROFILE), fused))
            torch.testing.assert_close(back, expected, rtol=0, atol=0)


@pytest.mark.parametrize("tokens", [256, 300])
@pytest.mark.parametrize("number", [0, 1, 2, 17, 400])
def test_the_place_of_a_chunk_is_found(tokens: int, number: int) -> None:
    record = ChunkCodec(3.0, Planes(64), THETA, PROFILE).encode(chunk_of(PROFILE, tokens, number))
    assert number_in(record) == number


def test_only_the_first_chunk_has_an_exact_token() -> None:
    codec = ChunkCodec(3.0, Planes(64), THETA, PROFILE)
    for number, is_exact in ((0, True), (9, False)):
        chunk = chunk_of(PROFILE, 256, number)
        assert torch.equal(there_and_back(codec, chunk)[:, :, 0], chunk[:, :, 0]) == is_exact


def test_a_first_token_unlike_all_others_does_not_disturb_them() -> None:
    chunk = chunk_of(PROFILE, 256, 0)
    codec = ChunkCodec(3.0, Planes(64), THETA, PROFILE)
    expected = there_and_back(codec, chunk)
    chunk[0, :, 0] *= -50
    back = there_and_back(codec, chunk)
    torch.testing.assert_close(back[0, :, 1:], expected[0, :, 1:], rtol=0, atol=0)
    assert torch.equal(back[:, :, 0], chunk[:, :, 0])


@pytest.mark.parametrize("wrong", [0, 3, 1000])
def test_a_wrong_place_costs_fidelity_alone(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, chunk = ChunkCodec(6.0, Planes(64), THETA, PROFILE), chunk_of(PROFILE, 256, 8)
    right = relative_error(chunk[0], there_and_back(codec, chunk)[0])
    monkeypatch.setattr(of_model, "number_of_chunk", lambda *_: (wrong, False))
    record = codec.encode(chunk)
    monkeypatch.undo()
    assert number_in(record) == wrong
    assert right < relative_error(chunk[0], codec.decode(record, chunk.shape, chunk.dtype)[0]) < 0.1


def test_keys_without_rotations() -> None:
    chunk = chunk_of(PROFILE, 256, 3, None)
    back = there_and_back(ChunkCodec(4.0, Planes(64), None, PROFILE), chunk)
    assert relative_error(chunk, back) < 0.12
    assert torch.equal(back[:, :, 0], chunk[:, :, 0]), "where the chunk stands is unknown"


def test_a_wrong_base_costs_fidelity_alone() -> None:
    chunk = chunk_of(PROFILE, 256, 3)
    right, wrong = (
        relative_error(chunk[0], there_and_back(ChunkCodec(4.0, Planes(64), theta, PROFILE), chunk)[0])
        for theta in (THETA, 500_000.0)
    )
    assert right < wrong < 0.3


def test_constant_and_empty_chunks() -> None:
    codec = ChunkCodec(2.5, Planes(64), THETA, PROFILE)
    for chunk in (torch.zeros(2, 3, 256, 128), torch.full((2, 3, 256, 128), 3.0)):
        back = there_and_back(codec, chunk)
        assert bool(torch.isfinite(back).all())
        assert float((back[0] - chunk[0]).abs().max()) < 1.0


def test_no_bits_go_to_heads_and_layers_that_do_not_matter() -> None:
    profile = known_profile(2, 2, 64)
    profile = replace(profile, key_sensitivities=((1.0, 1.0), (1e-4, 1.0)), value_sensitivities=(1e-2, 1e-6))
    chunk = chunk_of(profile, 256, 4)
    back = there_and_back(ChunkCodec(3.0, Planes(64), THETA, profile), chunk)
    keys, values = ((back - chunk)[plane].square().unflatten(-1, (2, 64)).mean((1, 3)) for plane in (0, 1))
    assert float(keys[1, 0]) > 10 * float(keys[1, 1])
    assert float(values[1].mean()) > 3 * float(values[0].mean())


def test_nothing_is_cached_for_each_chunk() -> None:
    """Widths differ from chunk to chunk; with tables for each of them a server would fill its memory."""
    codec = ChunkCodec(3.0, Planes(64), THETA, PROFILE)
    there_and_back(codec, chunk_of(PROFILE, 256, 1))
    caches = (packing._places, kernel._rows, key_codec._as_tensor, key_codec._of_widths, rotations.rotation_at)
    sizes = [cache.cache_info().currsize for cache in caches]
    for seed in range(3):
        there_and_back(codec, chunk_of(PROFILE, 256, 1, seed=10 * seed))
    assert [cache.cache_info().currsize for cache in caches] == sizes


def test_encoding_is_deterministic_and_changes_no_input() -> None:
    codec, chunk = ChunkCodec(2.5, Planes(64), THETA, PROFILE), chunk_of(PROFILE, 256, 6)
    before = chunk.clone()
    records = [codec.encode(chunk) for _ in range(2)]
    assert torch.equal(*records)
    assert torch.equal(chunk, before)
    assert torch.equal(records[0], ChunkCodec(2.5, Planes(64), int(THETA), replace(PROFILE)).encode(chunk))


@pytest.mark.skipif(not kernel.is_available(), reason="there is no compiled kernel to compare with")
def test_the_plain_encoder_makes_records_of_the_same_error(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = known_profile(1, 1, 16)
    codec, chunk = ChunkCodec(3.5, Planes(16), THETA, profile), chunk_of(profile, 256, 1)
    by_kernel = there_and_back(codec, chunk)
    monkeypatch.setattr(kernel, "is_available", lambda: False)
    torch.testing.assert_close(there_and_back(codec, chunk), by_kernel, rtol=1e-3, atol=1e-3)


def test_altered_cut_and_foreign_records_are_refused() -> None:
    chunk = chunk_of(PROFILE, 256, 0)
    codec, own = ChunkCodec(2.5, Planes(64), THETA, PROFILE), ChunkCodec(2.5, Planes(64), THETA)
    record = codec.encode(chunk)
    for place in (0, 5, 9, HEADER_BYTES, len(record) // 2, len(record) - 1):
        altered = record.clone()
        altered[place] ^= 1
        with pytest.raises(LoadError):
            codec.decode(altered, chunk.shape, chunk.dtype)
    with pytest.raises(LoadError, match="bytes"):
        codec.decode(record[:-1], chunk.shape, chunk.dtype)
    other = ChunkCodec(2.5, Planes(64), THETA, known_profile(3, 2, 64, seed=7))
    with pytest.raises(LoadError, match=r"other options than .*profile [0-9a-f]{16}"):
        other.decode(record, chunk.shape, chunk.dtype)
    for reader, foreign in ((own, record), (codec, own.encode(chunk))):
        with pytest.raises(LoadError, match="another version"):
            reader.decode(foreign, chunk.shape, chunk.dtype)
    assert bytes(record[:4].tolist()) == b"USC5"
    codec.decode(record, chunk.shape, chunk.dtype)


@pytest.mark.parametrize("shape", [(2, 4, 256, 128), (2, 3, 256, 192), (2, 3, 256, 64)])
def test_chunks_of_another_model_are_named(shape: tuple[int, ...]) -> None:
    codec = ChunkCodec(2.5, Planes(64), THETA, PROFILE)
    layers, heads = shape[1], shape[3] // 64
    message = f"the profile is of 3 layers of 2 heads of 64, and chunks have {layers} of {heads} of 64: measure one"
    assert message in str(codec.obstacle(shape, torch.float16))
    with pytest.raises(InvalidArgumentError, match="the profile is of 3 layers"):
        codec.encode(torch.zeros(shape))


def test_heads_of_another_size_are_named() -> None:
    obstacle = ChunkCodec(2.5, Planes(32), THETA, PROFILE).obstacle((2, 3, 256, 64), torch.float16)
    assert "chunks have 3 of 2 of 32" in str(obstacle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bases": (), "key_means": ()}, "no bases"),
        ({"key_means": ()}, "no bases"),
        ({"bases": (PROFILE.bases[0], known_profile(1, 1, 64).bases[0], PROFILE.bases[2])}, "different heads"),
    ],
)
def test_profiles_that_cannot_serve_are_refused(change: dict[str, Any], message: str) -> None:
    profile: ModelProfile = replace(PROFILE, **change)
    with pytest.raises(InvalidArgumentError, match=message):
        ChunkCodec(2.5, Planes(64), THETA, profile)


def test_too_few_bits_are_refused() -> None:
    profile = known_profile(1, 1, 8)
    obstacle = ChunkCodec(1.2, Planes(8), THETA, profile).obstacle((2, 1, 256, 8), torch.float32)
    assert "raise bits_per_element" in str(obstacle)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_chunk_that_is_not_finite_is_refused(number: float) -> None:
    chunk = chunk_of(PROFILE, 256, 1)
    chunk[0, 0, 17, 3] = number
    with pytest.raises(InvalidArgumentError, match="finite"):
        ChunkCodec(2.5, Planes(64), THETA, PROFILE).encode(chunk)
