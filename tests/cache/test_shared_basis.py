"""Blocks sealed later share the basis of earlier ones, whatever changed in the batch or the tail in between."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from spectral_layers import (
    BLOCK,
    GROUPS,
    HEAD_DIM,
    HEADS,
    check,
    check_bytes,
    config_of,
    feed,
    new_tokens,
    random,
)

from unsloth_spectral.cache.layer import SpectralLayer
from unsloth_spectral.codec.block import ExactBlock
from unsloth_spectral.codec.spectral.block import SpectralBlock
from unsloth_spectral.codec.tensors import TensorFunction

PREFILL = 4 + 3 * BLOCK + 20

MAPS: dict[str, TensorFunction] = {
    "reorder": lambda tensor: tensor[[1, 0]],
    "repeat": lambda tensor: tensor.repeat_interleave(2, dim=0),
    "select": lambda tensor: tensor[[1]],
    "move": torch.clone,
}
maps = pytest.mark.parametrize("function", MAPS.values(), ids=MAPS)


def prefilled(num_tokens: int = PREFILL) -> tuple[SpectralLayer, list[torch.Tensor]]:
    layer = SpectralLayer(config_of())
    dense = feed(layer, 0, num_tokens)
    layer.seal()
    assert len(coded(layer)) == 1
    return layer, dense


def coded(layer: SpectralLayer) -> list[SpectralBlock]:
    return [block for block in layer.blocks if isinstance(block, SpectralBlock)]


def extend(layer: SpectralLayer, dense: list[torch.Tensor], count: int, seed: int) -> list[torch.Tensor]:
    new = feed(layer, dense[0].shape[-2], count, len(dense[0]), seed=seed)
    return [torch.cat(pair, -2) for pair in zip(dense, new, strict=True)]


@maps
def test_a_block_sealed_after_a_change_of_the_batch_joins(
    function: TensorFunction, allocated_bytes: Callable[[Any], int]
) -> None:
    layer, dense = prefilled()
    layer.map_batch(function)
    dense = [function(tensor) for tensor in dense]
    (before,) = coded(layer)
    dense = extend(layer, dense, BLOCK, seed=1)
    layer.seal()
    (joined,) = coded(layer)
    assert joined.num_tokens == 4 * BLOCK
    assert joined.keys.vectors is before.keys.vectors
    assert joined.keys.mean is before.keys.mean
    assert joined.values.largest is before.values.largest
    assert len(joined.keys.vectors) == len(dense[0])
    check(layer, dense)
    check_bytes(layer, allocated_bytes)


def test_beam_search_costs_no_basis_and_no_queries(allocated_bytes: Callable[[Any], int]) -> None:
    """The batch is reordered every step, as beam search does, while several blocks are sealed."""
    (layer, dense), (still, _) = prefilled(), prefilled()
    most_queries = 0
    for position in range(PREFILL, PREFILL + 3 * BLOCK):
        feed(still, position, 1, seed=position)
        dense = [MAPS["reorder"](tensor) for tensor in extend(layer, dense, 1, seed=position)]
        most_queries = max(most_queries, layer._tiers.queries.nbytes)
        layer.seal(), still.seal()
        layer.map_batch(MAPS["reorder"])
    assert most_queries >= 30 * 2 * HEADS * GROUPS * HEAD_DIM * 2, "every fourth of the last 128, in half precision"
    (joined,), (expected,) = coded(layer), coded(still)
    assert joined.num_tokens == expected.num_tokens == 6 * BLOCK
    assert layer.stats().cold_bytes == still.stats().cold_bytes
    check(layer, dense)
    check_bytes(layer, allocated_bytes)


def test_queries_follow_their_rows() -> None:
    """After a reordering just before its sealing a block gets the codes of one whose rows always stood there."""
    swap, blocks = MAPS["reorder"], []
    short_of_one = 4 + 4 * BLOCK + config_of().residual_length - 1 - PREFILL
    for is_swapped_late in (False, True):
        layer = SpectralLayer(config_of(bits_per_element=2.5))
        rows = torch.clone if is_swapped_late else swap
        for start, count in ((0, PREFILL), (PREFILL, short_of_one)):
            keys, values, rotation = new_tokens(start, count, 2, start)
            # The rows' queries look at different dimensions.
            looks = torch.stack([torch.logspace(0, -2, HEAD_DIM), torch.logspace(-2, 0, HEAD_DIM)])[:, None, None]
            queries = random(2, HEADS * GROUPS, count, HEAD_DIM, seed=start + 2) * looks
            layer.append(rows(keys), rows(values))
            layer.observe(rows(queries), rotation)
            layer.seal()
        assert layer.stats().sealed_tokens == 3 * BLOCK
        if is_swapped_late:
            layer.map_batch(swap)
        feed(layer, PREFILL + short_of_one, 1, seed=5)
        layer.seal()
        blocks.extend(coded(layer))
    first, second = blocks
    assert first.num_tokens == second.num_tokens == 4 * BLOCK
    assert torch.equal(first.keys.streams, second.keys.streams)
    assert torch.equal(first.keys.scales, second.keys.scales)
    assert torch.equal(first.values.streams, second.values.streams)


@pytest.mark.parametrize("removed", [1, 7, 20])
def test_a_crop_of_the_tail_keeps_the_basis(removed: int, allocated_bytes: Callable[[Any], int]) -> None:
    layer, dense = prefilled()
    layer.crop(PREFILL - removed)
    dense = [tensor[..., :-removed, :] for tensor in dense]
    # Assisted decoding: a few tokens come, some of them are taken back.
    while len(coded(layer)) == 1 and coded(layer)[0].num_tokens < 5 * BLOCK:
        dense = extend(layer, dense, 6, seed=dense[0].shape[-2])
        layer.crop(layer.num_tokens - 4)
        dense = [tensor[..., :-4, :] for tensor in dense]
        assert all(
            int(positions.max()) < layer.num_tokens
            for positions in layer._tiers.queries._positions
            if positions.numel()
        )
        layer.seal()
    (joined,) = coded(layer)
    assert joined.num_tokens == 5 * BLOCK
    check(layer, dense)
    check_bytes(layer, allocated_bytes)


def test_a_crop_into_sealed_tokens_forgets_the_basis(allocated_bytes: Callable[[Any], int]) -> None:
    layer, dense = prefilled()
    num_kept = 4 + 2 * BLOCK
    layer.crop(num_kept)
    assert layer._codec.nbytes == 0
    dense = extend(layer, [tensor[..., :num_kept, :] for tensor in dense], BLOCK + 20, seed=1)
    layer.seal()
    first, second = coded(layer)
    assert second.keys.vectors is not first.keys.vectors
    check(layer, dense)
    check_bytes(layer, allocated_bytes)


def test_what_two_blocks_share_they_share_after_a_change_of_the_batch() -> None:
    layer = SpectralLayer(config_of())
    feed(layer, 0, PREFILL)
    layer.seal()
    spoilt = feed(layer, PREFILL, 2 * BLOCK)
    layer._tiers.residual.block.keys[..., 5, :] = float("nan")  # type: ignore[union-attr]
    layer.seal()
    assert [type(block) for block in layer.blocks[1:-1]] == [SpectralBlock, ExactBlock, SpectralBlock]
    layer.map_batch(MAPS["repeat"])
    first, second = coded(layer)
    assert first.keys.vectors is second.keys.vectors
    assert len(first.keys.vectors) == 2 * len(spoilt[0])


def test_an_overflow_does_not_decide_the_basis_of_the_rest() -> None:
    """The run that contains the block cannot be sealed as a whole; its other blocks can."""
    layer = SpectralLayer(config_of())
    feed(layer, 0, 4 + 4 * BLOCK + 16)
    layer._tiers.residual.block.keys[..., 4 + 2 * BLOCK + 5, :] = 1e30  # type: ignore[union-attr]
    layer.seal()
    kinds = [(type(block), block.num_tokens) for block in layer.blocks[1:-1]]
    assert kinds == [(SpectralBlock, 2 * BLOCK), (ExactBlock, BLOCK), (SpectralBlock, BLOCK)]
