"""One state a layer: what a later block shares with the first, the error limit, and bits within the budget."""

from typing import Any

import pytest
import torch

from unsloth_spectral.cache.layer import SpectralLayer
from unsloth_spectral.cache.layer_stats import SharedBytes
from unsloth_spectral.cache.stats import CacheStats
from unsloth_spectral.codec.block import ExactBlock
from unsloth_spectral.codec.config import PRESETS, SpectralConfig
from unsloth_spectral.codec.observed import Observed
from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.codec.rank.block import RankBlock
from unsloth_spectral.codec.rank.codec import RankLayer
from unsloth_spectral.codec.registry import make_codec
from unsloth_spectral.codec.spectral import codec as codec_module
from unsloth_spectral.codec.spectral.block import SpectralBlock
from unsloth_spectral.codec.spectral.codec import SpectralCodec, SpectralLayerCodec
from unsloth_spectral.codec.spectral.metric import metric_of
from unsloth_spectral.codec.tensors import TokenShape, storage_bytes
from unsloth_spectral.fields import Fields, flatten
from unsloth_spectral.rope import Rotation, rotate

BATCH, HEADS, HEAD_DIM, BLOCK = 2, 2, 32, 256


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(count: int, seed: int = 0, kind: int = 0, head_dim: int = HEAD_DIM, batch: int = BATCH) -> ExactBlock:
    """Keys with a decaying spectrum in a basis that ``kind`` chooses, and plain values."""
    mix = torch.linalg.qr(random(HEADS, head_dim, head_dim, seed=1000 + kind)).Q
    spread = torch.logspace(0.3, -1.2, head_dim)
    keys = (random(batch, HEADS, count, head_dim, seed=seed) * spread) @ mix + random(1, HEADS, 1, head_dim, seed=7)
    return ExactBlock(keys, random(batch, HEADS, count, head_dim, seed=seed + 500))


def rotation_of(count: int, start: int = 0, head_dim: int = HEAD_DIM) -> Rotation:
    pairs = head_dim // 2
    angle = torch.arange(start, start + count)[:, None] * 100.0 ** (-torch.arange(pairs) / pairs)
    first = torch.arange(pairs)
    return Rotation.of(torch.polar(torch.ones_like(angle), angle)[None], first, first + pairs)


def rotated_tokens(count: int, start: int = 0, seed: int = 0) -> tuple[ExactBlock, Observed]:
    """Tokens at positions from ``start`` on, their keys rotated as a model does it."""
    block, rotation = tokens(count, seed), rotation_of(count, start)
    keys = rotate(block.keys, rotation.table()[:, None], rotation)
    return ExactBlock(keys, block.values), Observed(rotation)


def codec_layer(bits: float = 3.0, limit: float | None = None, layers: int = 1) -> Any:
    config = SpectralConfig(block_size=BLOCK, bits_per_element=bits, error_limit=limit)
    return make_codec(config, layers).layer(0)


def sealed(
    codec: Any, block: ExactBlock, observed: Observed | None = None, last: SpectralBlock | None = None
) -> SpectralBlock:
    coded = codec.seal(block, None, Observed() if observed is None else observed, last)
    assert isinstance(coded, SpectralBlock)
    return coded


@pytest.mark.parametrize("bits", [1.6, 3.0])  # values of 1 and of 3 bits
def test_later_blocks_of_the_same_kind_share_the_basis_and_join(bits: float) -> None:
    codec = codec_layer(bits)
    first = sealed(codec, *rotated_tokens(512))
    second = sealed(codec, *rotated_tokens(BLOCK, 512, seed=1), last=first)
    assert second.keys.vectors is first.keys.vectors
    assert second.keys.mean is first.keys.mean
    assert second.values.largest is first.values.largest
    joined = codec.join(first, second)
    assert joined.num_tokens == 768
    assert joined.nbytes < first.nbytes + second.nbytes - first.keys.vectors.nbytes
    for part, a, b in zip(joined.reconstruct(), first.reconstruct(), second.reconstruct(), strict=True):
        assert (part - torch.cat([a, b], -2)).abs().max() < 2e-3 * part.abs().max()
    third = sealed(codec, *rotated_tokens(BLOCK, 768, seed=2), last=joined)
    assert codec.join(joined, third).num_tokens == 1024


def test_a_block_of_another_kind_gets_its_own_basis() -> None:
    codec = codec_layer()
    first, limited = sealed(codec, tokens(512)), sealed(codec, tokens(BLOCK, seed=1, kind=1))
    assert limited.keys.vectors is not first.keys.vectors
    assert codec.join(first, limited) is None
    assert float(limited.keys.relative_error.max()) < 2.5 * float(first.keys.relative_error.max())
    # The first basis stays the one that is tried.
    again = sealed(codec, tokens(BLOCK, seed=2), last=first)
    assert again.keys.vectors is first.keys.vectors
    assert codec.join(first, again) is not None


def test_values_that_grow_later_are_not_cut_off() -> None:
    codec = codec_layer()
    first, later = tokens(512), tokens(BLOCK, seed=1)
    later.values[:, :, 40:50] *= 20
    sealed(codec, first)
    values = sealed(codec, later).reconstruct()[1]
    error = (values - later.values).norm(dim=-1) / later.values.norm(dim=-1)
    assert float(error[:, :, 40:50].max()) < 2 * float(error[:, :, 100:].max())


def test_after_forgetting_everything_is_planned_anew() -> None:
    codec = codec_layer()
    first = sealed(codec, tokens(512))
    assert codec.nbytes > 0
    codec.forget()
    assert codec.nbytes == 0
    second = sealed(codec, tokens(BLOCK, seed=1))
    assert second.keys.vectors is not first.keys.vectors
    assert second.keys.num_bits > 0
    assert codec.join(first, second) is None
    codec.reset()
    assert torch.equal(sealed(codec, tokens(512)).keys.streams, first.keys.streams)


def test_the_plan_follows_the_batch() -> None:
    """With one result for one tensor, blocks sealed later still join."""
    plain, repeated = codec_layer(), codec_layer()
    first = sealed(plain, tokens(512))
    before, nbytes, results = sealed(repeated, tokens(512)), repeated.nbytes, {}

    def repeat(tensor: torch.Tensor) -> torch.Tensor:
        return results.setdefault(id(tensor), tensor[[1, 0, 1]])

    repeated.map_batch(repeat)
    assert repeated.nbytes == 3 * nbytes // 2
    later, rows = tokens(BLOCK, seed=1), [1, 0, 1]
    behind = before.map_batch(repeat)
    alone = sealed(plain, later, last=first)
    later_block = sealed(repeated, ExactBlock(later.keys[rows], later.values[rows]), last=behind)
    assert torch.equal(later_block.keys.streams, alone.keys.streams[rows])
    assert torch.equal(later_block.values.scales, alone.values.scales[rows])
    joined = repeated.join(behind, later_block)
    assert joined is not None
    assert torch.equal(joined.keys.streams, plain.join(first, alone).keys.streams[rows])


def test_there_is_nothing_to_follow_before_the_first_sealing() -> None:
    codec = codec_layer()
    codec.map_batch(lambda tensor: tensor[[1]])
    assert codec.nbytes == 0


def test_a_run_shorter_than_a_block_leaves_no_plan() -> None:
    codec, fresh = codec_layer(), codec_layer()
    short, later = sealed(codec, tokens(BLOCK - 128)), sealed(codec, tokens(BLOCK, seed=1))
    expected = sealed(fresh, tokens(BLOCK, seed=1))
    assert later.keys.widths == expected.keys.widths, "neither its basis nor its water level counts"
    assert torch.equal(later.keys.streams, expected.keys.streams)
    assert codec.join(short, later) is None
    assert sealed(codec, tokens(BLOCK, seed=2)).keys.vectors is later.keys.vectors


def test_what_is_not_finite_leaves_no_plan() -> None:
    codec, huge = codec_layer(), tokens(BLOCK)
    huge.keys[:, :, 7] = 1e30
    assert not sealed(codec, huge).is_finite
    assert codec.nbytes == 0
    assert sealed(codec, tokens(BLOCK, seed=1)).is_finite


def test_only_whole_groups_and_coded_blocks_join() -> None:
    codec = codec_layer()
    first, second = sealed(codec, tokens(512)), sealed(codec, tokens(BLOCK, seed=1))
    assert codec.join(first.first_tokens(500)[0], second) is None
    assert codec.join(tokens(512), second) is None
    assert codec.join(first, tokens(512)) is None
    assert codec.join(first.map_batch(torch.clone), second) is None


@pytest.mark.parametrize("limit", [0.2, 0.06, 0.02])
def test_a_tight_limit_buys_bits(limit: float) -> None:
    plain = sealed(codec_layer(bits=2.0), tokens(512))
    assert max(float(plain.keys.relative_error.max()), float(plain.values.relative_error.max())) > limit
    block = sealed(codec_layer(bits=2.0, limit=limit), tokens(512))
    assert float(block.keys.relative_error.max()) <= limit
    assert float(block.values.relative_error.max()) <= limit
    assert block.values.nbits > plain.values.nbits
    if limit < 0.2:
        assert block.keys.num_bits > plain.keys.num_bits
    rebuilt, exact = block.reconstruct()[1], tokens(512).values
    assert (rebuilt - exact).norm() / exact.norm() <= limit * 1.01


def test_a_limit_that_is_met_changes_nothing() -> None:
    unlimited, limited = sealed(codec_layer(), tokens(512)), sealed(codec_layer(limit=0.9), tokens(512))
    assert torch.equal(unlimited.keys.streams, limited.keys.streams)
    assert torch.equal(unlimited.values.streams, limited.values.streams)


def test_an_impossible_limit_gives_none_and_the_layer_keeps_the_block() -> None:
    assert codec_layer(limit=1e-4).seal(tokens(512), None, Observed()) is None
    layer = SpectralLayer(SpectralConfig(block_size=BLOCK, num_sink_tokens=4, residual_length=16, error_limit=1e-4))
    block = tokens(4 + 512 + 16)
    layer.append(block.keys, block.values)
    layer.seal()
    assert layer.stats().exact_blocks == 2
    assert layer.stats().sealed_tokens == 0
    assert all(isinstance(part, ExactBlock) for part in layer.blocks)
    assert torch.equal(layer.reconstruct()[0], block.keys)
    assert torch.equal(layer.reconstruct()[1], block.values)


def test_an_impossible_limit_ends_where_keys_lack_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, encode = [], codec_module.key_codec.encode

    def spy(*args: Any) -> Any:
        calls.append(1)
        assert len(calls) < 100
        return encode(*args)

    monkeypatch.setattr(codec_module.key_codec, "encode", spy)
    block = tokens(512)
    block.keys[..., HEAD_DIM // 2 :] = 0
    assert codec_layer(limit=1e-4).seal(block, None, Observed()) is None
    assert len(calls) > 2


def layers_of(
    config: SpectralConfig, num_layers: int, count: int, head_dim: int, seen: int = 16, **options: Any
) -> CacheStats:
    """A cache of layers whose keys differ tenfold in size, filled and sealed one layer after another.

    Attention saw the newest ``seen`` tokens; where it did not see all, the positions of the others are unknown.
    """
    stats, rotation, shared = [], rotation_of(count, head_dim=head_dim), SharedBytes()
    codec = make_codec(config, num_layers, **options)
    for index in range(num_layers):
        layer, block = SpectralLayer(config, codec.layer(index)), tokens(count, seed=index, head_dim=head_dim, batch=1)
        layer.append((10.0 ** (index % 3 / 2)) * block.keys, block.values)
        layer.observe(random(1, 2 * HEADS, seen, head_dim, seed=index), rotation)
        layer.seal()
        stats.append(layer.stats(shared))
        assert stats[-1].sealed_tokens > 0
    return CacheStats.of(stats)


@pytest.mark.parametrize(("preset", "head_dim"), [("quality", 64), ("balanced", 64), ("small", 64)])
def test_the_cold_tier_takes_the_bits_asked_for(preset: str, head_dim: int) -> None:
    config = SpectralConfig(preset=preset)
    stats = layers_of(config, 6, 2200, head_dim)
    check_bits(stats, config)


@pytest.mark.parametrize("preset", ["quality", "balanced", "small"])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_a_short_prefill_takes_the_bits_asked_for(preset: str, groups: int) -> None:
    config = SpectralConfig(preset=preset)
    count = 4 + 64 + 128 * groups
    check_bits(layers_of(config, 6, count, 64, seen=count), config)


@pytest.mark.parametrize("head_dim", [32, 80, 128])
@pytest.mark.parametrize("preset", ["balanced", "small"])
def test_the_cold_tier_takes_the_bits_asked_for_at_other_head_dims(preset: str, head_dim: int) -> None:
    config = SpectralConfig(preset=preset)
    check_bits(layers_of(config, 4, 2200, head_dim), config)


def test_the_cold_tier_takes_the_bits_asked_for_with_a_profile() -> None:
    config = SpectralConfig(bits_per_element=2.6)
    variances = tuple((torch.arange(1, 129) ** -1.0).tolist())
    keys = tuple((key, 2 * key) for key in (0.1, 1.0, 0.3, 2.0, 0.05, 1.0))
    profile = ModelProfile((1.0, 0.01, 5.0, 0.1, 0.5, 0.02), keys, (variances,) * 6)
    stats = layers_of(config, 6, 2200, 64, profile=profile)
    check_bits(stats, config)
    assert len({layer.bits_values for layer in stats.layers}) > 1


def check_bits(stats: CacheStats, config: SpectralConfig) -> None:
    assert stats.cold_bits_per_element == pytest.approx(config.target_bits, rel=0.02)
    codes = sum((layer.bits_keys + layer.bits_values) / 2 * layer.cold_elements for layer in stats.layers)
    assert stats.cold_bits_per_element > codes / sum(layer.cold_elements for layer in stats.layers)


def test_the_query_metric_buys_what_queries_look_at() -> None:
    queries = 0.01 * random(BATCH, 2 * HEADS, 64, HEAD_DIM, seed=4)
    queries[..., :8] *= 300
    observed = Observed(None, queries, torch.full((BATCH, 64), 512))
    block = tokens(512)
    with_queries, without = (sealed(codec_layer(bits=1.5), block, o) for o in (observed, Observed()))
    per_head = queries.unflatten(1, (HEADS, 2)).flatten(2, 3)
    exact = per_head @ block.keys.mT
    errors = [(actual.scores(per_head) - exact).norm() / exact.norm() for actual in (with_queries, without)]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("count", [1, 8, 33, 256])
def test_few_queries_do_not_decide_alone(count: int) -> None:
    """While decoding at most 33 queries a head are sampled: they span a part of the directions later queries use."""
    queries = random(BATCH, HEADS, count, 64)
    block, rotation = tokens(BLOCK, head_dim=64), rotation_of(BLOCK, head_dim=64)
    later = random(BATCH, HEADS, 300, 64, seed=1)
    exact = later @ block.keys.mT
    errors = []
    for observed in (Observed(rotation, queries, torch.full((BATCH, count), BLOCK)), Observed(rotation)):
        sealed_block = sealed(codec_layer(bits=4.0), block, observed)
        errors.append(float((sealed_block.scores(later) - exact).norm() / exact.norm()))
    assert errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize("count", [1, 4, 32, 400])
def test_few_queries_buy_neither_a_basis_nor_bits(count: int) -> None:
    """The floor for scarce queries does not tell how much an error matters."""
    codec, queries = codec_layer(bits=2.0), random(BATCH, 2 * HEADS, 512, HEAD_DIM) / 4
    first = sealed(codec, tokens(512), Observed(None, queries, (torch.arange(512) + 1).expand(BATCH, -1)))
    few = Observed(None, queries[:, :, -count:], torch.full((BATCH, count), BLOCK))
    assert sealed(codec, tokens(BLOCK, seed=1), few).keys.vectors is first.keys.vectors
    limited = sealed(codec, tokens(BLOCK, seed=1, kind=1), few)
    assert limited.keys.vectors is not first.keys.vectors
    # The basis of a smaller block costs more bits per token, so it has fewer bits for codes.
    assert 0.6 * first.keys.num_bits < limited.keys.num_bits < 1.05 * first.keys.num_bits


@pytest.mark.parametrize("span", [0, 1, 32])
def test_the_metric_is_that_of_the_unrotated_queries(span: int) -> None:
    spans = (span,) * (HEAD_DIM // 2)
    queries = random(BATCH, 2 * HEADS, 600, HEAD_DIM)
    fixed = metric_of(Observed(None, queries, torch.full((BATCH, 600), 64)), HEADS, HEAD_DIM, spans)
    seen = metric_of(Observed(rotation_of(64), queries, torch.full((BATCH, 600), 64)), HEADS, HEAD_DIM, spans)
    assert seen.shape == (BATCH, HEADS, HEAD_DIM, HEAD_DIM)
    # Rotation keeps lengths; the floor depends on the number of queries.
    assert torch.allclose(*(m.diagonal(dim1=-2, dim2=-1).sum(-1) for m in (seen, fixed)), rtol=5e-3)
    assert torch.equal(seen, fixed) == (span == 0)
    first = metric_of(
        Observed(rotation_of(64), queries, torch.ones(BATCH, 600, dtype=torch.int64)), HEADS, HEAD_DIM, spans
    )
    assert torch.allclose(first, fixed, atol=5e-3), "a query that saw a single token saw it at position 0, unrotated"
    nothing = metric_of(Observed(rotation_of(64)), HEADS, HEAD_DIM, spans)
    assert torch.equal(nothing[0, 0], torch.eye(HEAD_DIM))


def test_units_and_kinds() -> None:
    config = SpectralConfig(block_size=512)
    layer = make_codec(config, 3).layer(2)
    assert isinstance(layer, SpectralLayerCodec)
    assert (layer.unit(True), layer.unit(False)) == (128, 512)
    rank = make_codec(SpectralConfig(8, 8, block_size=32), 2).layer(0)
    assert isinstance(rank, RankLayer)
    assert rank.unit(True) == rank.unit(False) == 32
    block = tokens(64)
    sealed_block = rank.seal(block, None, Observed())
    assert isinstance(sealed_block, RankBlock)
    joined = rank.join(sealed_block, rank.seal(block, None, Observed()))
    assert joined is not None
    assert joined.num_tokens == 128


def test_coded_blocks_answer_like_dense_ones() -> None:
    block = sealed(codec_layer(), tokens(1280), Observed(rotation_of(1280)))
    keys, values = block.reconstruct()
    query, weights = random(BATCH, HEADS, 3, HEAD_DIM), torch.rand(BATCH, HEADS, 3, 1280)
    assert torch.allclose(block.scores(query), query @ keys.mT, atol=2e-2)
    assert torch.allclose(block.combine(weights), weights @ values, rtol=1e-3, atol=1e-2)
    tiles = list(block.tiles(300))
    assert [tile.num_tokens for tile in tiles] == [256] * 5
    assert torch.allclose(torch.cat([tile.reconstruct()[0] for tile in tiles], -2), keys, atol=1e-2)
    (cut,) = block.first_tokens(333)
    assert cut.num_tokens == 333
    assert torch.allclose(cut.reconstruct()[0], keys[..., :333, :], atol=1e-2)
    assert torch.allclose(cut.reconstruct()[1], values[..., :333, :], atol=1e-4)
    assert cut.nbytes < 0.4 * block.nbytes
    assert block.num_key_value_heads == HEADS
    assert block.is_finite


def test_the_evaluation_compares_every_preset() -> None:
    assert SpectralCodec.compared == {"spectral": tuple(SpectralConfig(preset=preset) for preset in PRESETS)}


@pytest.mark.parametrize(("count", "budget"), [(BLOCK // 2, "short_budget"), (2 * BLOCK, "budget")])
def test_the_budget_is_charged_what_components_and_their_bits_take(count: int, budget: str) -> None:
    codec = make_codec(SpectralConfig(block_size=BLOCK, bits_per_element=3.0), 1)
    layer = codec.layer(0)
    block = sealed(layer, tokens(count, batch=1), Observed(rotation_of(count)))
    statistics = storage_bytes(block.keys.relative_error, block.values.relative_error)
    # A number a dimension for the places; the budget does not pay for statistics.
    stored = block.nbytes + layer.nbytes + 8 * HEAD_DIM - statistics
    left = codec.to_fields()[budget]["balances"]["0"]
    assert (2 * 3.0 * HEADS * HEAD_DIM - left) * count / 8 == pytest.approx(stored)


def test_a_stored_layer_seals_on_in_the_basis_that_it_had() -> None:
    first, second = codec_layer(), codec_layer()
    before = sealed(first, *rotated_tokens(2 * BLOCK))
    tree, tensors = flatten(first.to_fields())
    shape = TokenShape(BATCH, HEADS, HEAD_DIM, HEAD_DIM, torch.float32, torch.float32)
    second.restore(Fields(tree, lambda number, _: tensors[number]), shape)
    expected, found = (sealed(codec, *rotated_tokens(BLOCK, 2 * BLOCK, seed=1)) for codec in (first, second))
    assert torch.equal(expected.keys.vectors, before.keys.vectors)
    for part, other in zip(found.reconstruct(), expected.reconstruct(), strict=True):
        assert torch.equal(part, other)
    assert torch.equal(found.keys.vectors, before.keys.vectors)
    assert torch.equal(found.values.largest, before.values.largest)
