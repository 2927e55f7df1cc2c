"""The three tiers of one layer against a dense model of the cache, under near-lossless settings (rank = head_dim)."""

import copy
import random
from collections.abc import Callable

import pytest
import torch

from unsloth_spectral.attention import direct, naive
from unsloth_spectral.attention.scores import ScoreOptions
from unsloth_spectral.cache.layer import SpectralLayer
from unsloth_spectral.codec.block import ExactBlock
from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.codec.rank import block as block_module
from unsloth_spectral.codec.rank.block import RankBlock
from unsloth_spectral.errors import InvalidArgumentError

BATCH, HEADS, HEAD_DIM, SIZE, RESIDUAL, SINKS = 2, 3, 8, 16, 5, 4
LOSSLESS = SpectralConfig(HEAD_DIM, HEAD_DIM, SIZE, SINKS, RESIDUAL)
# int8 rounding of the codes; every wrong, lost or moved token is an error of about 1.
NEAR = 0.03


def pair(num_tokens: int, seed: int = 0, batch: int = BATCH, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, HEADS, num_tokens, HEAD_DIM, generator=generator).to(dtype) for _ in range(2)]


def filled(num_tokens: int, config: SpectralConfig = LOSSLESS, **options: object) -> SpectralLayer:
    """A layer holding ``pair(num_tokens)``, sealed."""
    layer = SpectralLayer(config)
    layer.append(*pair(num_tokens, **options))
    layer.seal()
    return layer


def spectral(layer: SpectralLayer) -> list[RankBlock]:
    return [block for block in layer.blocks if isinstance(block, RankBlock)]


def check(layer: SpectralLayer, keys: torch.Tensor, values: torch.Tensor, assert_close: Callable[..., None]) -> None:
    """Same tokens in the same order, by ``reconstruct`` and by ``blocks``; unpadded layers only."""
    assert layer.num_tokens == keys.shape[-2]
    assert layer.is_empty == (keys.shape[-2] == 0 and not layer.blocks)
    if not keys.shape[-2]:
        return
    rebuilt = [block.reconstruct() for block in layer.blocks]
    for index, expected in enumerate((keys, values)):
        assert_close(layer.reconstruct()[index], expected, NEAR)
        assert_close(torch.cat([part[index] for part in rebuilt], -2), expected, NEAR)
    assert layer.arrange_mask(None) is None


@pytest.mark.parametrize("seed", range(40))
def test_random_histories_match_a_dense_cache(
    seed: int, assert_close: Callable[..., None], allocated_bytes: Callable[..., int]
) -> None:
    rng = random.Random(seed)
    config = SpectralConfig(
        HEAD_DIM,
        HEAD_DIM,
        block_size=rng.choice([8, SIZE, 30]),
        num_sink_tokens=rng.choice([0, 1, SINKS]),
        residual_length=rng.choice([0, 1, RESIDUAL, 40]),
    )
    layer = SpectralLayer(config)
    keys, values = pair(0)
    for step in range(20):
        kind = rng.choice(["append", "append", "append", "seal", "seal", "crop", "batch"])
        if kind == "append":
            new = pair(rng.choice([1, 1, 7, 33, 90]), 100 * seed + step, keys.shape[0] or BATCH)
            layer.append(*new)
            keys, values = torch.cat([keys, new[0]], -2), torch.cat([values, new[1]], -2)
        elif kind == "seal":
            layer.seal()
        elif kind == "crop":
            num_kept = rng.choice([keys.shape[-2], rng.randint(0, keys.shape[-2]), max(0, keys.shape[-2] - 1)])
            layer.crop(num_kept)
            keys, values = keys[..., :num_kept, :], values[..., :num_kept, :]
        elif keys.shape[-2]:
            rows = torch.tensor([rng.randrange(keys.shape[0]) for _ in range(rng.randint(1, 3))])
            layer.map_batch(lambda tensor, rows=rows: tensor[rows])
            keys, values = keys[rows], values[rows]
        if not keys.shape[-2]:
            keys, values = pair(0)
            layer.reset()
        check(layer, keys, values, assert_close)
        assert layer.stats().stored_bytes == allocated_bytes(layer)


@pytest.mark.parametrize("residual_length", [0, 1, RESIDUAL, 40])
@pytest.mark.parametrize("num_sink_tokens", [0, SINKS])
@pytest.mark.parametrize("step", [1, 7, SIZE, 50])
def test_sizes_of_the_tiers(residual_length: int, num_sink_tokens: int, step: int) -> None:
    layer = SpectralLayer(SpectralConfig(HEAD_DIM, HEAD_DIM, SIZE, num_sink_tokens, residual_length))
    for count in range(step, 200, step):
        layer.append(*pair(step, count))
        layer.seal()
        stats = layer.stats()
        enough = num_sink_tokens + residual_length + SIZE
        if count < enough:
            assert not layer.is_sealed
            assert stats.sealed_tokens == 0
            assert len(layer.blocks) == 1
            continue
        exact_tail = count - num_sink_tokens - stats.sealed_tokens
        assert stats.sealed_tokens % SIZE == 0
        assert stats.sealed_tokens > 0
        assert residual_length <= exact_tail < residual_length + SIZE
        assert len(spectral(layer)) == 1, "blocks of one length are stacked"
        assert sum(block.num_tokens for block in layer.blocks) == layer.num_tokens == count


def test_sinks_and_residual_are_exact() -> None:
    keys, values = pair(100)
    layer = filled(100)
    sealed = layer.stats().sealed_tokens
    assert sealed == 80
    for actual, expected in zip(layer.reconstruct(), (keys, values), strict=True):
        assert torch.equal(actual[..., :SINKS, :], expected[..., :SINKS, :])
        assert torch.equal(actual[..., SINKS + sealed :, :], expected[..., SINKS + sealed :, :])
        assert not torch.equal(actual, expected)


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_sinks_are_exact_where_blocks_are_shorter_than_they(block_size: int) -> None:
    layer = SpectralLayer(SpectralConfig(1, 1, block_size, num_sink_tokens=4, residual_length=0))
    keys, _ = pair(12)
    for position in range(12):
        layer.append(*(tensor[..., position : position + 1, :] for tensor in pair(12)))
        layer.seal()
    assert torch.equal(layer.reconstruct()[0][..., :4, :], keys[..., :4, :])


def test_nothing_is_encoded_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    encode = block_module.factors.encode

    def spy(block: torch.Tensor, rank: int):
        encoded.append(block.shape[2])
        return encode(block, rank)

    monkeypatch.setattr(block_module.factors, "encode", spy)
    layer = filled(60)
    first = spectral(layer)[0]
    count = first.num_blocks
    assert count == 3
    codes, basis = first.keys.codes.clone(), first.values.basis.clone()
    for step in range(70):
        layer.append(*pair(1, step + 1))
        layer.seal()
    layer.map_batch(lambda tensor: tensor.flip(0))
    layer.map_batch(lambda tensor: tensor.flip(0))
    last = spectral(layer)[0]
    assert last.num_blocks == 7
    assert torch.equal(last.keys.codes[:, :, :count], codes)
    assert torch.equal(last.values.basis[:, :, :count], basis)
    assert sum(encoded) == 2 * last.num_blocks
    assert spectral(layer)[0].num_blocks == 7
    layer.crop(SINKS + 2 * SIZE + 3)
    assert torch.equal(spectral(layer)[0].keys.codes, codes[:, :, :2])
    assert torch.equal(spectral(layer)[1].keys.codes, codes[:, :, 2:, :, :3])
    assert sum(encoded) == 14


CROPS = {
    "nothing": 100,
    "inside the residual": 99,
    "the whole residual": SINKS + 5 * SIZE,
    "a block border": SINKS + 2 * SIZE,
    "inside a block": SINKS + 2 * SIZE + 7,
    "one token of a block": SINKS + 1,
    "behind the sinks": SINKS,
    "inside the sinks": 2,
    "all but one": 1,
    "everything": 0,
}


@pytest.mark.parametrize("kept", CROPS.values(), ids=CROPS.keys())
def test_crop_then_go_on(kept: int, assert_close: Callable[..., None], allocated_bytes: Callable[..., int]) -> None:
    keys, values = pair(100)
    layer = filled(100)
    layer.crop(kept)
    keys, values = keys[..., :kept, :], values[..., :kept, :]
    check(layer, keys, values, assert_close)
    assert layer.stats().stored_bytes == allocated_bytes(layer)
    for step in range(1, 80):
        new = pair(1, step)
        layer.append(*new)
        layer.seal()
        keys, values = torch.cat([keys, new[0]], -2), torch.cat([values, new[1]], -2)
    check(layer, keys, values, assert_close)
    assert layer.stats().sealed_tokens >= 3 * SIZE
    assert layer.stats().stored_bytes == allocated_bytes(layer)
    for actual, expected in zip(layer.reconstruct(), (keys, values), strict=True):
        assert torch.equal(actual[..., :2, :], expected[..., :2, :]) or kept == 1


def test_crop_gives_bytes_back() -> None:
    layer, sizes = filled(1000), []
    for num_kept in (1000, 999, 900, 500, 100, 30, 6, 2, 0):
        layer.crop(num_kept)
        sizes.append(layer.stats().stored_bytes)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 0
    assert sizes[-2] == 2 * BATCH * HEADS * HEAD_DIM * 2 * 4 + 8 * BATCH


@pytest.mark.parametrize("kept", [-1, 101, 10**9])
def test_crop_refuses_what_it_does_not_hold(kept: int) -> None:
    layer = filled(100)
    with pytest.raises(InvalidArgumentError, match=f"between 0 and the 100 tokens held, got {kept}"):
        layer.crop(kept)
    assert layer.num_tokens == 100


def test_an_empty_layer() -> None:
    layer = SpectralLayer(LOSSLESS)
    layer.seal()
    layer.crop(0)
    layer.map_batch(lambda tensor: tensor[:1])
    assert (layer.num_tokens, layer.blocks, layer.is_empty, layer.is_sealed) == (0, [], True, False)
    assert layer.stats().stored_bytes == 0
    with pytest.raises(InvalidArgumentError, match="append tokens first"):
        layer.reconstruct()


def test_reset_forgets_everything(allocated_bytes: Callable[..., int]) -> None:
    layer = filled(100)
    layer.reset()
    assert (layer.num_tokens, layer.is_empty, layer.is_sealed, allocated_bytes(layer)) == (0, True, False, 0)
    layer.append(*pair(7, 1, batch=5))
    assert torch.equal(layer.reconstruct()[0], pair(7, 1, batch=5)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, assert_close: Callable[..., None]) -> None:
    keys, values = pair(100, dtype=dtype)
    layer = filled(100, dtype=dtype)
    assert layer.reconstruct()[0].dtype == dtype
    check(layer, keys, values, assert_close)
    assert torch.equal(layer.reconstruct()[0][..., :SINKS, :], keys[..., :SINKS, :])
    assert layer.stats().dense_bytes == 2 * keys.numel() * keys.element_size()


def test_inference_mode_prefill_then_decode_outside_it(assert_close: Callable[..., None]) -> None:
    with torch.inference_mode():
        layer = filled(100)
    keys, values = pair(100)
    with torch.no_grad():
        for step in range(1, 40):
            layer.append(*pair(1, step))
            layer.seal()
    twin = copy.deepcopy(layer)
    with torch.inference_mode():
        layer.append(*pair(1, 40))
        layer.seal()
    layer.crop(120)
    for part, old in zip(layer.reconstruct(), (keys, values), strict=True):
        assert_close(part[..., :100, :], old, NEAR)
    assert twin.num_tokens == 139


def test_a_deepcopy_shares_nothing(assert_close: Callable[..., None]) -> None:
    layer = filled(100)
    twin = copy.deepcopy(layer)
    layer.append(*pair(30, 1))
    layer.seal()
    layer.crop(3)
    for tensor in layer.reconstruct():
        tensor.zero_()
    layer.reset()
    check(twin, *pair(100), assert_close)
    places = {id(block) for block in twin.blocks}
    assert not places & {id(block) for block in layer.blocks}


def test_tokens_that_carry_gradients_are_held_without_them() -> None:
    layer = SpectralLayer(LOSSLESS)
    for num_tokens in (10, 20, 80):
        keys, values = pair(num_tokens)
        layer.append(keys.requires_grad_() * 2, values.requires_grad_() * 2)
        assert not any(part.requires_grad for part in layer.reconstruct())
        copy.deepcopy(layer)  # refused by torch for tensors with a history
        layer.seal()
    assert layer.stats().sealed_tokens > 0


def test_wrong_shapes_are_refused_and_change_nothing() -> None:
    layer = filled(100)
    keys, values = pair(3)
    wrong = {
        "three dimensions": (keys[0], values[0]),
        "lengths differ": (keys, values[..., :2, :]),
        "heads differ": (keys[:, :2], values),
        "another batch": (keys[:1], values[:1]),
        "other heads": (keys[:, :1], values[:, :1]),
        "another width": (keys[..., :4], values[..., :4]),
        "another width of values": (keys, values[..., :4]),
        "values that would broadcast": (keys, values[..., :1]),
    }
    for case, tokens in wrong.items():
        before = layer.reconstruct()
        with pytest.raises(InvalidArgumentError):
            layer.append(*tokens)
        assert layer.num_tokens == 100, case
        assert all(torch.equal(first, other) for first, other in zip(before, layer.reconstruct(), strict=True)), case


def test_a_rank_above_the_head_dim_is_refused_with_the_first_tokens() -> None:
    layer = SpectralLayer(SpectralConfig(HEAD_DIM + 1, 4, SIZE))
    with pytest.raises(InvalidArgumentError, match="rank_keys must be at most the model's head_dim, 8"):
        layer.append(*pair(3))
    assert layer.is_empty


def test_sealing_is_repeatable_and_draws_no_random_numbers() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = filled(100, SpectralConfig(3, 4, SIZE))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    other = filled(100, SpectralConfig(3, 4, SIZE))
    assert all(torch.equal(a, b) for a, b in zip(first.reconstruct(), other.reconstruct(), strict=True))


def test_the_layer_can_be_attended_to(assert_close: Callable[..., None]) -> None:
    layer = filled(100, SpectralConfig(3, 4, SIZE, SINKS, RESIDUAL))
    query = torch.randn(BATCH, 2 * HEADS, 3, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    expected = naive.attend(query, [ExactBlock(*layer.reconstruct())], None, ScoreOptions(0.3))
    assert_close(direct.attend(query, layer.blocks, None, ScoreOptions(0.3)), expected, 1e-4)


def test_a_codec_that_has_no_use_for_queries_keeps_none(allocated_bytes: Callable[..., int]) -> None:
    layer = filled(10)
    before = allocated_bytes(layer)
    layer.observe(torch.ones(BATCH, HEADS, 10, HEAD_DIM), None)
    assert not layer.uses_queries
    assert allocated_bytes(layer) == before


def test_the_batch_size_is_that_of_the_tokens_held() -> None:
    layer = SpectralLayer(LOSSLESS)
    assert layer.batch_size == 0
    layer.append(*pair(30))
    assert layer.batch_size == BATCH
    layer.map_batch(lambda tensor: tensor[:1])
    assert layer.batch_size == 1
    layer.reset()
    assert layer.batch_size == 0
