"""A basis for the model: who takes it, what it costs, and tokens sealed a few at a time in it."""

from typing import Any

import pytest
import torch

from unsloth_spectral.cache.layer import SpectralLayer
from unsloth_spectral.cache.stats import CacheStats
from unsloth_spectral.codec.block import ExactBlock
from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.codec.model_basis import BasisRows, ModelBasis
from unsloth_spectral.codec.observed import Observed
from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.codec.registry import make_codec
from unsloth_spectral.codec.spectral.block import SpectralBlock
from unsloth_spectral.errors import LoadError
from unsloth_spectral.fields import Fields, flatten
from unsloth_spectral.rope import Rotation, rotate

HEADS, DIM = 2, 32
SPREAD = torch.logspace(0.3, -1.2, DIM)
FIRST = torch.arange(DIM // 2)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def axes(kind: int) -> torch.Tensor:
    return torch.linalg.qr(random(HEADS, DIM, DIM, seed=1000 + kind)).Q


def rotation_of(start: int, count: int) -> Rotation:
    angle = torch.arange(start, start + count)[:, None] * 1000.0 ** (-FIRST / len(FIRST))
    return Rotation.of(torch.polar(torch.ones_like(angle), angle)[None], FIRST, FIRST + len(FIRST))


def tokens(count: int, start: int = 0, kind: int = 0, batch: int = 1) -> tuple[ExactBlock, Rotation]:
    """Keys whose principal axes ``kind`` chooses, at positions from ``start`` on."""
    keys = (random(batch, HEADS, count, DIM, seed=start) * SPREAD) @ axes(kind) + random(1, HEADS, 1, DIM, seed=7)
    rotation = rotation_of(start, count)
    rotated = rotate(keys, rotation.table()[:, None], rotation)
    return ExactBlock(rotated, random(batch, HEADS, count, DIM, seed=start + 500)), rotation


def profile(layers: int = 1) -> ModelProfile:
    basis = ModelBasis.rounded(axes(0), SPREAD.square().expand(HEADS, -1).contiguous())
    variances = tuple(SPREAD.square().repeat(HEADS).tolist())
    return ModelProfile((0.5,) * layers, ((1.0,) * HEADS,) * layers, (variances,) * layers, (basis,) * layers)


def layer_of(bits: float = 4.0, with_profile: bool = True) -> SpectralLayer:
    config = SpectralConfig(bits_per_element=bits, residual_length=16)
    return SpectralLayer(config, make_codec(config, 1, profile() if with_profile else None).layer(0))


def feed(layer: SpectralLayer, count: int, kind: int = 0, batch: int = 1, is_rotated: bool = True) -> ExactBlock:
    block, rotation = tokens(count, layer.num_tokens, kind, batch)
    if not is_rotated:
        block = ExactBlock(rotate(block.keys, rotation.table()[:, None].conj(), rotation), block.values)
        rotation = None
    layer.append(block.keys, block.values)
    layer.observe(random(batch, 2 * HEADS, count, DIM, seed=layer.num_tokens) / 4, rotation)
    layer.seal()
    return block


def coded(layer: SpectralLayer) -> list[SpectralBlock]:
    return [block for block in layer.blocks if isinstance(block, SpectralBlock)]


def error(layer: SpectralLayer, dense: ExactBlock) -> tuple[float, float]:
    return tuple(  # type: ignore[return-value]
        float((actual - expected).norm() / expected.norm())
        for actual, expected in zip(layer.reconstruct(), (dense.keys, dense.values), strict=True)
    )


def joined(*blocks: ExactBlock) -> ExactBlock:
    return ExactBlock(torch.cat([b.keys for b in blocks], -2), torch.cat([b.values for b in blocks], -2))


def test_equal_bases_are_one_object_and_their_digest_finds_it() -> None:
    basis = ModelBasis.rounded(axes(0), SPREAD.expand(HEADS, -1).contiguous())
    assert ModelBasis.of(basis.vectors.clone(), basis.row_scales.clone(), basis.variances.clone()) is basis
    assert ModelBasis.named(basis.digest) is basis
    other = ModelBasis.rounded(axes(1), SPREAD.expand(HEADS, -1).contiguous())
    assert other.digest != basis.digest
    matrices = basis.on(torch.device("cpu"))
    assert torch.allclose(matrices.rows @ matrices.inverse, torch.eye(DIM), atol=1e-4)
    assert torch.allclose(matrices.rows @ matrices.metric @ matrices.rows.mT, torch.eye(DIM), atol=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        lambda v, s, e: (v.float(), s, e),
        lambda v, s, e: (v[:, :-1], s, e),
        lambda v, s, e: (v, s[:1], e),
        lambda v, s, e: (v, s / 0, e),
        lambda v, s, e: (v, s, -e),
    ],
)
def test_what_is_no_basis_is_refused(change: Any) -> None:
    basis = ModelBasis.rounded(axes(0), torch.ones(HEADS, DIM))
    with pytest.raises(
        LoadError, match="a model's basis must be square matrices of bytes, with a scale and a variance"
    ):
        ModelBasis.of(*change(basis.vectors, basis.row_scales, basis.variances))


def test_short_prompts_take_it_and_long_ones_of_another_kind_do_not() -> None:
    for count, kind, is_shared in ((200, 0, True), (600, 1, True), (1500, 0, True), (4000, 1, False)):
        layer = layer_of()
        feed(layer, count, kind)
        (block,) = coded(layer)
        assert (block.keys.rows is not None) == is_shared, (count, kind)
        assert block.keys.vectors.shape[1] == (0 if is_shared else sum(map(len, block.keys.widths)))


def test_it_is_counted_apart_and_takes_fewer_bytes_than_a_basis_of_their_own() -> None:
    layers = [layer_of(), layer_of(), layer_of(with_profile=False)]
    for layer in layers:
        feed(layer, 4 + 16 + 256)
    shared, again, own = (CacheStats.of([layer.stats()]) for layer in layers)
    (block,), (other,) = coded(layers[0]), coded(layers[1])
    assert block.keys.rows is not None
    assert other.keys.rows is not None
    assert block.keys.rows.basis is other.keys.rows.basis
    assert shared.basis_bytes == again.basis_bytes == block.keys.rows.basis.nbytes > 0
    assert own.basis_bytes == 0
    assert shared.layers[0].basis == block.keys.rows.basis.digest
    assert shared.cold_bits_per_element < 4.3  # type: ignore[operator]
    assert error(layers[0], tokens(276)[0])[0] < 0.7 * error(layers[2], tokens(276)[0])[0]


@pytest.mark.parametrize("bits", [2.0, 5.0])
@pytest.mark.parametrize("step", [1, 7, 40, 200])
def test_tokens_sealed_a_few_at_a_time_are_as_good_as_those_of_a_prefill(bits: float, step: int) -> None:
    """They go on in the last tile, un-rotated by its first token, and no more than 31 wait."""
    whole, parts = layer_of(bits), layer_of(bits)
    first = feed(parts, 276)
    dense = [first]
    while parts.num_tokens < 700:
        dense.append(feed(parts, min(step, 700 - parts.num_tokens)))
        assert 16 <= parts.num_tokens - 4 - sum(block.num_tokens for block in coded(parts)) <= 16 + 31
    assert len(coded(parts)) == 1, "one block, into which tokens were filled"
    all_tokens = joined(*dense)
    whole.append(all_tokens.keys, all_tokens.values)
    whole.observe(random(1, 2 * HEADS, 700, DIM, seed=276) / 4, rotation_of(0, 700))
    whole.seal()
    for in_parts, at_once in zip(error(parts, all_tokens), error(whole, all_tokens), strict=True):
        # The plan of 276 tokens has fewer bits than that of 700, as the mean costs each of them more.
        assert in_parts < 1.4 * at_once


def test_no_unit_lies_in_two_tiles() -> None:
    layer = layer_of()
    feed(layer, 4 + 16 + 112)
    lengths = [layer.stats().sealed_tokens]
    for _ in range(160):
        feed(layer, 1)
        lengths.append(layer.stats().sealed_tokens)
    assert sorted(set(lengths)) == [112, 128, 160, 192, 224, 256]


def test_later_tokens_need_no_queries() -> None:
    layer = layer_of()
    feed(layer, 276)
    feed(layer, 1)
    assert layer._tiers.queries.nbytes == 0


def test_tokens_of_a_strange_kind_wait_for_a_block_and_get_a_basis_of_their_own() -> None:
    layer = layer_of(2.0)
    dense = [feed(layer, 600, is_rotated=False)]
    for _ in range(1200):
        dense.append(feed(layer, 1, kind=1, is_rotated=False))
    blocks = coded(layer)
    assert blocks[0].keys.rows is not None
    assert any(block.keys.rows is None for block in blocks[1:])
    # The later ones of the strange kind join its block 32 at a time.
    assert layer._tiers.residual.num_tokens <= 16 + 31  # type: ignore[union-attr]
    assert layer.stats().exact_blocks == 1
    assert error(layer, joined(*dense))[0] < 0.5


def test_values_that_grow_begin_a_block() -> None:
    layer = layer_of()
    dense = [feed(layer, 276)]
    for _ in range(22):
        block, rotation = tokens(32, layer.num_tokens)
        block.values.mul_(50)
        layer.append(block.keys, block.values)
        layer.observe(random(1, 2 * HEADS, 32, DIM), rotation)
        layer.seal()
        dense.append(block)
    assert len(coded(layer)) == 2
    assert layer._tiers.residual.num_tokens <= 16 + 31  # type: ignore[union-attr]
    assert error(layer, joined(*dense))[1] < 0.2


def test_a_layer_of_other_heads_takes_its_own_basis() -> None:
    """As with tensor parallelism, where a process has some of the heads."""
    layer = layer_of()
    for count in (276, 600):
        block, rotation = tokens(count, layer.num_tokens)
        layer.append(block.keys[:, :1], block.values[:, :1])
        layer.observe(random(1, 2, count, DIM), rotation)
        layer.seal()
    assert all(block.keys.rows is None for block in coded(layer))
    assert coded(layer)


def test_padded_rows_and_rows_that_are_picked_later() -> None:
    layer = layer_of(6.0)
    block, rotation = tokens(400, batch=3)
    layer.append(block.keys, block.values)
    layer.observe(random(3, 2 * HEADS, 400, DIM) / 4, rotation)
    layer.seal(torch.tensor([0, 130, 0]))
    layer.map_batch(lambda tensor: tensor[[1, 0]])
    later = [feed(layer, 1, batch=2) for _ in range(40)]
    keys = torch.cat([block.keys[[1, 0]], *[more.keys for more in later]], -2)
    rebuilt = layer.reconstruct()[0]
    assert float((rebuilt - keys)[0, :, 130:].norm() / keys[0, :, 130:].norm()) < 0.1
    assert float((rebuilt - keys)[1].norm() / keys[1].norm()) < 0.1
    assert len(coded(layer)) == 1


def test_stored_and_restored_it_goes_on() -> None:
    config = SpectralConfig(bits_per_element=4, residual_length=16)
    codecs = [make_codec(config, 1, profile()) for _ in range(2)]
    layer, again = (SpectralLayer(config, codec.layer(0)) for codec in codecs)
    feed(layer, 300)
    tree, stored = flatten({"layer": layer.to_fields(), "shared": codecs[0].to_fields()})
    assert not any(tensor.dtype == torch.int8 and tensor.numel() for tensor in stored), "the profile carries the basis"
    copies = [tensor.clone() for tensor in stored]
    fields = Fields(tree, lambda number, device: copies[number])
    codecs[1].restore(fields.sub("shared"))
    again.restore(fields.sub("layer"))
    for one in (layer, again):
        feed(one, 1)
        feed(one, 70)
    for first, second in zip(layer.reconstruct(), again.reconstruct(), strict=True):
        assert torch.equal(first, second)


def test_rows_of_an_unknown_basis_are_refused() -> None:
    basis = ModelBasis.rounded(axes(3), torch.ones(HEADS, DIM))
    places = ((0, 5), (1,))
    fields = {**BasisRows(basis, places).to_fields()}
    read = Fields(flatten(fields)[0], lambda *_: torch.empty(0))
    assert BasisRows.from_fields(read, HEADS, DIM, (2, 1)) == BasisRows(basis, places)
    for changed, counts in (({"basis": "2x32-0"}, (2, 1)), ({"places": ((0, 5), (32,))}, (2, 1)), ({}, (1, 1))):
        read = Fields(flatten({**fields, **changed})[0], lambda *_: torch.empty(0))
        with pytest.raises(LoadError):
            BasisRows.from_fields(read, HEADS, DIM, counts)


def test_observed_is_enough_without_positions() -> None:
    """A model without rotary embeddings."""
    codec = make_codec(SpectralConfig(bits_per_element=4), 1, profile()).layer(0)
    keys = (random(1, HEADS, 256, DIM) * SPREAD) @ axes(0)
    first = codec.seal(ExactBlock(keys, keys), None, Observed())
    more = codec.seal(ExactBlock(keys[..., :40, :], keys[..., :40, :]), None, Observed(), first)
    assert isinstance(more, SpectralBlock)
    assert more.num_tokens == 296


def test_values_that_grow_within_one_call_lose_no_token() -> None:
    layer = layer_of()
    dense = [feed(layer, 276), feed(layer, 32)]
    block, rotation = tokens(144, layer.num_tokens)
    block.values[..., 100:, :] *= 50
    layer.append(block.keys, block.values)
    layer.observe(random(1, 2 * HEADS, 144, DIM), rotation)
    layer.seal()
    dense.append(block)
    assert layer.num_tokens == 452
    assert error(layer, joined(*dense))[1] < 0.2


def test_one_huge_value_spoils_no_later_ones() -> None:
    layer = layer_of()
    feed(layer, 700)
    layer._tiers.residual._values[0, :, 5] *= 3e4  # type: ignore[union-attr]
    for _ in range(1200):
        feed(layer, 1)
    values = tokens(1)[0].values
    later = layer.reconstruct()[1][..., 1400:, :]
    expected = torch.cat([tokens(1, place)[0].values for place in range(1400, 1900)], -2)
    assert values.shape[-2] == 1
    assert float((later - expected).norm() / expected.norm()) < 0.25


def test_a_second_text_of_another_kind_gets_a_basis_of_its_own_at_once() -> None:
    layer = layer_of(2.0)
    dense = [feed(layer, 300, is_rotated=False), feed(layer, 4000, kind=1, is_rotated=False)]
    blocks = coded(layer)
    assert any(block.keys.rows is None for block in blocks)
    assert error(layer, joined(*dense))[0] < 0.3
    assert layer._tiers.queries.nbytes == 0


def test_a_row_with_a_token_or_two_makes_no_plan() -> None:
    layer = layer_of(4.0)
    block, rotation = tokens(400, batch=2)
    layer.append(block.keys, block.values)
    layer.observe(random(2, 2 * HEADS, 400, DIM) / 4, rotation)
    layer.seal(torch.tensor([0, 318]))
    later = feed(layer, 1000, batch=2)
    rebuilt = layer.reconstruct()[0][:, :, 400:]
    assert float((rebuilt - later.keys)[1].norm() / later.keys[1].norm()) < 0.2


def test_with_an_error_limit_the_bases_are_not_used() -> None:
    config = SpectralConfig(bits_per_element=2, residual_length=16, error_limit=0.25)
    layer = SpectralLayer(config, make_codec(config, 1, profile()).layer(0))
    feed(layer, 276)
    for _ in range(600):
        feed(layer, 1)
    assert all(block.keys.rows is None for block in coded(layer))
    assert len(coded(layer)) <= 2


def test_a_short_prompt_of_other_heads_waits_for_whole_blocks() -> None:
    layer = layer_of()
    for count in (200, *[1] * 600):
        block, rotation = tokens(count, layer.num_tokens)
        layer.append(block.keys[:, :1], block.values[:, :1])
        layer.observe(random(1, 2, count, DIM), rotation)
        layer.seal()
    assert len(coded(layer)) == 2


def test_keys_whose_squares_overflow_stay_exact() -> None:
    layer = layer_of()
    feed(layer, 300)
    block, rotation = tokens(32, layer.num_tokens)
    layer.append(block.keys * 1e19, block.values)
    layer.observe(random(1, 2 * HEADS, 32, DIM), rotation)
    layer.seal()
    for _ in range(100):
        feed(layer, 1)
    assert any(isinstance(block, ExactBlock) for block in layer.blocks[1:-1])
    assert torch.equal(layer.reconstruct()[0][..., 300:332, :], block.keys * 1e19)


def test_the_tensors_that_a_basis_was_made_of_may_change() -> None:
    made = ModelBasis.rounded(axes(5), torch.ones(HEADS, DIM))
    vectors = made.vectors.clone()
    del made
    basis = ModelBasis.of(vectors, torch.ones(HEADS, DIM, 1), torch.ones(HEADS, DIM))
    vectors.zero_()
    assert bool(basis.vectors.any())
