"""When a layer seals for the first time, and what that leaves to later blocks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from spectral_layers import BLOCK, check, check_bytes, config_of, feed

from unsloth_spectral.cache.layer import SpectralLayer
from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.codec.spectral.block import SpectralBlock

UNIT, SINKS, RESIDUAL = 128, 4, 16
KEPT = SINKS + RESIDUAL
assert BLOCK == UNIT, "the other tests' block; here blocks are longer"


def layer_of(**options: Any) -> SpectralLayer:
    return SpectralLayer(config_of(**{"block_size": 4 * UNIT, **options}))


def sealed_tokens(layer: SpectralLayer) -> list[int]:
    return [block.num_tokens for block in layer.blocks if isinstance(block, SpectralBlock)]


def fill(layer: SpectralLayer, dense: list[torch.Tensor] | None, count: int) -> list[torch.Tensor]:
    """Append, observe and seal ``count`` tokens that come together."""
    start = 0 if dense is None else dense[0].shape[-2]
    new = feed(layer, start, count, seed=start)
    layer.seal()
    return new if dense is None else [torch.cat(pair, -2) for pair in zip(dense, new, strict=True)]


@pytest.mark.parametrize(
    ("count", "sealed"),
    [(KEPT + UNIT - 1, []), (KEPT + UNIT, [UNIT]), (KEPT + 3 * UNIT - 1, [2 * UNIT]), (KEPT + 4 * UNIT, [4 * UNIT])],
)
def test_a_prefill_is_sealed_from_one_group_on(
    count: int, sealed: list[int], allocated_bytes: Callable[[Any], int]
) -> None:
    layer = layer_of()
    dense = fill(layer, None, count)
    assert sealed_tokens(layer) == sealed
    assert layer.is_sealed == bool(sealed)
    check(layer, dense)
    check_bytes(layer, allocated_bytes)


def test_what_is_decoded_waits_for_a_block() -> None:
    layer, dense = layer_of(), None
    for count in (30, *[1] * (KEPT + 4 * UNIT - 31)):
        dense = fill(layer, dense, count)
        assert not layer.is_sealed
    dense = fill(layer, dense, 1)
    assert sealed_tokens(layer) == [4 * UNIT]
    check(layer, dense)


def test_a_long_turn_after_a_short_one_is_sealed_at_once() -> None:
    layer, dense = layer_of(), None
    for count in (50, 1, 1, UNIT + 60):
        assert sealed_tokens(layer) == []
        dense = fill(layer, dense, count)
    assert sealed_tokens(layer) == [UNIT]
    check(layer, dense)


def test_the_rank_codec_waits_for_a_block() -> None:
    layer = SpectralLayer(SpectralConfig(8, 8, block_size=256, residual_length=RESIDUAL))
    fill(layer, None, KEPT + 255)
    assert not layer.is_sealed


def test_the_basis_of_a_short_prefill_serves_it_alone(allocated_bytes: Callable[[Any], int]) -> None:
    """It pays for few components, so a long answer would be coded badly in it."""
    layer = layer_of(bits_per_element=3)
    dense = fill(layer, None, KEPT + UNIT)
    few = layer.blocks[1]
    dense = fill(layer, dense, 4 * UNIT)
    assert sealed_tokens(layer) == [UNIT, 4 * UNIT]
    assert layer.blocks[2].keys.num_bits > few.keys.num_bits
    fill(layer, dense, 4 * UNIT)
    assert sealed_tokens(layer) == [UNIT, 8 * UNIT], "the block's own basis serves the next"
    assert layer.blocks[1].keys.vectors is few.keys.vectors
    check_bytes(layer, allocated_bytes)


@pytest.mark.parametrize("chunk", [100, UNIT, KEPT + UNIT, 300, 4 * UNIT])
def test_a_prefill_in_chunks(chunk: int, allocated_bytes: Callable[[Any], int]) -> None:
    layer, dense = layer_of(), None
    for start in range(0, 1600, chunk):
        dense = fill(layer, dense, min(chunk, 1600 - start))
        assert dense[0].shape[-2] - sum(sealed_tokens(layer)) < KEPT + 4 * UNIT
    first, *rest = sealed_tokens(layer)
    assert first >= UNIT
    assert len(rest) <= 1, "the chunks behind the first share a basis"
    assert all(count % (4 * UNIT) == 0 for count in rest)
    check(layer, dense)
    check_bytes(layer, allocated_bytes)
