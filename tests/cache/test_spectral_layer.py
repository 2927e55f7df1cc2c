"""A layer under the spectral codec against a dense model of the cache, at eight bits an element."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectral_layers import (
    BLOCK,
    GROUPS,
    HEAD_DIM,
    HEADS,
    NEAR,
    check,
    check_bytes,
    config_of,
    feed,
    new_tokens,
    random,
    rotation_of,
)

from unsloth_spectral.attention import direct, naive
from unsloth_spectral.attention.scores import ScoreOptions
from unsloth_spectral.cache.layer import SpectralLayer
from unsloth_spectral.codec.block import ExactBlock
from unsloth_spectral.codec.spectral.block import SpectralBlock

Operation = tuple[str, Any]
operations = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 300)),
    st.tuples(st.just("append"), st.integers(1, 3)),
    st.tuples(st.just("seal"), st.none()),
    st.tuples(st.just("seal"), st.none()),
    st.tuples(st.just("crop"), st.floats(0.02, 1.0)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 3), min_size=1, max_size=3)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    num_sink_tokens=st.sampled_from([0, 4]),
    history=st.lists(operations, min_size=4, max_size=12),
)
def test_random_histories_match_a_dense_cache(
    num_sink_tokens: int, history: list[Operation], allocated_bytes: Callable[[Any], int]
) -> None:
    layer, rows = SpectralLayer(config_of(num_sink_tokens=num_sink_tokens)), 2
    dense = feed(layer, 0, 200)
    for step, (kind, amount) in enumerate(history):
        if kind == "append":
            new = feed(layer, dense[0].shape[-2], amount, rows, seed=10 * step)
            dense = [torch.cat(pair, -2) for pair in zip(dense, new, strict=True)]
        elif kind == "seal":
            layer.seal()
        elif kind == "crop":
            num_kept = max(1, int(amount * dense[0].shape[-2]))
            layer.crop(num_kept)
            dense = [tensor[..., :num_kept, :] for tensor in dense]
        else:
            picked = (
                torch.tensor([row % rows for row in amount])
                if kind == "select"
                else torch.arange(rows).repeat_interleave(1 if rows > 4 else amount)
            )
            layer.map_batch(lambda tensor, picked=picked: tensor[picked])
            dense, rows = [tensor[picked] for tensor in dense], len(picked)
        check(layer, dense)
        check_bytes(layer, allocated_bytes)


def test_a_long_decode_keeps_one_basis_and_one_block(allocated_bytes: Callable[[Any], int]) -> None:
    layer = SpectralLayer(config_of())
    dense = feed(layer, 0, 600)
    layer.seal()
    for position in range(600, 1000):
        new = feed(layer, position, 1, seed=position)
        dense = [torch.cat(pair, -2) for pair in zip(dense, new, strict=True)]
        layer.seal()
        assert layer.num_tokens - layer.stats().sealed_tokens < 4 + 16 + BLOCK
    check(layer, dense)
    check_bytes(layer, allocated_bytes)
    (block,) = [block for block in layer.blocks if isinstance(block, SpectralBlock)]
    assert block.num_tokens == 896 + 0 == layer.stats().sealed_tokens
    assert block.keys.rotation is not None
    assert block.keys.rotation.step is not None
    assert float((block.keys.rotation.table() - rotation_of(4, 896).table()).abs().max()) < 5e-3


def positions_are_right(layer: SpectralLayer, may_be_unknown: bool = False) -> bool:
    """True if every coded block has the positions of its tokens."""
    start, near = 0, []
    for block in layer.blocks:
        if isinstance(block, SpectralBlock):
            rotation = block.keys.rotation
            assert may_be_unknown or rotation is not None
            if rotation is not None:
                near.append(float((rotation.table() - rotation_of(start, block.num_tokens).table()).abs().max()) < 1e-2)
        start += block.num_tokens
    assert near
    return all(near)


@pytest.mark.parametrize("kept", [2, 3, 4, 50, 300, 590])
def test_positions_stay_right_after_a_crop(kept: int) -> None:
    layer = SpectralLayer(config_of())
    dense = feed(layer, 0, 600)
    layer.seal()
    assert positions_are_right(layer)
    layer.crop(kept)
    dense = [tensor[..., :kept, :] for tensor in dense]
    for count in (200, 250, 5, 300):
        new = feed(layer, dense[0].shape[-2], count, seed=count)
        dense = [torch.cat(pair, -2) for pair in zip(dense, new, strict=True)]
        layer.seal()
        check(layer, dense)
    # Tokens are decoded correctly under any rotation; a wrong rotation costs bits.
    assert positions_are_right(layer)


def test_positions_stay_right_where_the_first_tokens_were_not_observed() -> None:
    layer = SpectralLayer(config_of())
    keys, values, _ = new_tokens(0, 10, 2, 0)
    layer.append(keys, values)
    dense = [torch.cat(pair, -2) for pair in zip([keys, values], feed(layer, 10, 500), strict=True)]
    for count in (0, 300):
        if count:
            new = feed(layer, dense[0].shape[-2], count, seed=count)
            dense = [torch.cat(pair, -2) for pair in zip(dense, new, strict=True)]
        layer.seal()
        check(layer, dense)
    first, second = (block.keys.rotation for block in layer.blocks if isinstance(block, SpectralBlock))
    assert first is None, "some of its tokens stand who knows where"
    assert second is not None
    assert positions_are_right(layer, may_be_unknown=True)


def test_a_layer_without_rotations_or_queries(allocated_bytes: Callable[[Any], int]) -> None:
    layer = SpectralLayer(config_of())
    keys, values, _ = new_tokens(0, 500, 2, 0)
    layer.append(keys, values)
    layer.seal()
    check(layer, [keys, values])
    check_bytes(layer, allocated_bytes)
    assert layer.stats().sealed_tokens == 384


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_exact(bad: float, assert_close: Callable[..., None]) -> None:
    layer = SpectralLayer(config_of())
    keys, values, rotation = new_tokens(0, 4 + 5 * BLOCK + 16, 2, 0)
    keys[1, 0, 4 + 2 * BLOCK + 5, 3] = bad
    layer.append(keys, values)
    layer.observe(random(2, 4, keys.shape[-2], HEAD_DIM), rotation)
    layer.seal()
    kinds = [(type(block), block.num_tokens) for block in layer.blocks]
    assert kinds == [
        (ExactBlock, 4),
        (SpectralBlock, 2 * BLOCK),
        (ExactBlock, BLOCK),
        (SpectralBlock, 2 * BLOCK),
        (ExactBlock, 16),
    ]
    exact = layer.blocks[2]
    assert torch.equal(exact.values, values[..., 4 + 2 * BLOCK : 4 + 3 * BLOCK, :])
    assert_close(exact.keys.nan_to_num(posinf=9), keys[..., 4 + 2 * BLOCK : 4 + 3 * BLOCK, :].nan_to_num(posinf=9), 0)
    assert layer.stats().exact_blocks == 1
    assert positions_are_right(layer)
    for block, start in ((layer.blocks[1], 4), (layer.blocks[3], 4 + 3 * BLOCK)):
        part = keys[..., start : start + 2 * BLOCK, :]
        assert float((block.reconstruct()[0] - part).norm() / part.norm()) < NEAR


def test_keys_too_large_for_the_stored_mean_stay_exact() -> None:
    layer = SpectralLayer(config_of())
    keys, values, _ = new_tokens(0, 300, 2, 0)
    layer.append(1e6 * keys, values)
    layer.seal()
    assert layer.stats().sealed_tokens == 0
    assert layer.stats().exact_blocks == 2
    assert torch.equal(layer.reconstruct()[0], 1e6 * keys)


def test_attention_over_the_blocks_is_near_the_dense_one() -> None:
    layer = SpectralLayer(config_of())
    dense = feed(layer, 0, 700)
    layer.seal()
    query = random(2, HEADS * GROUPS, 3, HEAD_DIM, seed=9)
    options = ScoreOptions(scaling=HEAD_DIM**-0.5)
    exact = naive.attend(query, [ExactBlock(*dense)], None, options)
    for attend in (direct.attend, naive.attend):
        output = attend(query, layer.blocks, None, options)
        assert float((output - exact).norm() / exact.norm()) < NEAR


def test_left_padding() -> None:
    layer, padding = SpectralLayer(config_of()), torch.tensor([0, 150])
    dense = feed(layer, 0, 600)
    layer.seal(padding)
    assert layer.stats().sealed_tokens > 0
    for part, expected in zip(layer.reconstruct(), dense, strict=True):
        assert float((part[0] - expected[0]).norm() / expected[0].norm()) < NEAR
        assert float((part[1, :, 150:] - expected[1, :, 150:]).norm() / expected[1, :, 150:].norm()) < NEAR
        assert torch.equal(part[1, :, 150:154], expected[1, :, 150:154]), "sinks"


@pytest.mark.parametrize("since", ["a short tail", "a reordering of beams"])
def test_few_queries_do_not_decide_alone(since: str) -> None:
    """Tokens sealed after hardly any queries must serve the queries that come later, too."""
    layer = SpectralLayer(config_of())
    keys, values, rotation = new_tokens(0, 260, 2, 0)
    dense = [keys * torch.logspace(0, -1.5, HEAD_DIM), values]  # later tokens need a basis of their own
    layer.append(*dense)
    layer.observe(random(2, HEADS * GROUPS, 260, HEAD_DIM, seed=2), rotation)
    layer.seal()
    assert layer.stats().sealed_tokens == 128
    for position in range(260, 300):
        if since != "a short tail":
            layer.map_batch(lambda tensor: tensor[[1, 0]])
            dense = [tensor[[1, 0]] for tensor in dense]
        new = feed(layer, position, 1, seed=position)
        dense = [torch.cat(pair, -2) for pair in zip(dense, new, strict=True)]
        layer.seal()
    assert layer.stats().sealed_tokens == 256
    query = random(2, HEADS, 50, HEAD_DIM, seed=11)
    sealed = slice(4 + 128, 4 + 256)  # the tail of the prefill
    exact = query @ dense[0][..., sealed, :].mT
    scores = query @ layer.reconstruct()[0][..., sealed, :].mT
    # Without the floor for scarce queries this is .4 to .6.
    assert float((scores - exact).norm() / exact.norm()) < 0.1


def test_reset_forgets_all() -> None:
    layer = SpectralLayer(config_of())
    feed(layer, 0, 600)
    layer.seal()
    first = layer.reconstruct()[0]
    layer.reset()
    assert layer.is_empty
    assert layer.stats().stored_bytes == 0
    feed(layer, 0, 600)
    layer.seal()
    assert torch.equal(layer.reconstruct()[0], first)
