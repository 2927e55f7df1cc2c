"""Statistics of a cache: bytes found by walking it, ranks, errors, and consistent sums."""

import dataclasses
import json
from collections.abc import Callable

import pytest
import torch

from unsloth_spectral.cache.layer import SpectralLayer
from unsloth_spectral.cache.stats import CacheStats, LayerStats
from unsloth_spectral.codec.config import SpectralConfig

BATCH, HEADS, HEAD_DIM = 2, 3, 32
CONFIG = SpectralConfig(rank_keys=4, rank_values=8, block_size=64, num_sink_tokens=4, residual_length=16)


def filled(num_tokens: int, dtype: torch.dtype = torch.float16, config: SpectralConfig = CONFIG) -> SpectralLayer:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, BATCH, HEADS, num_tokens, HEAD_DIM, generator=generator).to(dtype)
    layer = SpectralLayer(config)
    layer.append(keys.clone(), values.clone())
    layer.seal()
    return layer


@pytest.mark.parametrize("num_tokens", [1, 83, 84, 85, 500])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_bytes_are_the_storages_of_torch(
    num_tokens: int, dtype: torch.dtype, allocated_bytes: Callable[..., int]
) -> None:
    layer = filled(num_tokens, dtype)
    for _ in range(70):
        stats = layer.stats()
        assert stats.stored_bytes == stats.sink_bytes + stats.cold_bytes + stats.residual_bytes
        assert stats.stored_bytes == allocated_bytes(layer)
        layer.append(*torch.randn(2, BATCH, HEADS, 1, HEAD_DIM).to(dtype))
        layer.seal()


def test_bytes_by_hand() -> None:
    stats = filled(500).stats()
    sealed = (500 - 4 - 16) // 64 * 64
    blocks = BATCH * HEADS * sealed // 64
    assert stats.sealed_tokens == sealed == 448
    assert stats.sink_bytes == 2 * BATCH * HEADS * 4 * HEAD_DIM * 2
    assert stats.cold_bytes == sum(blocks * (rank * 64 + rank * HEAD_DIM * 2 + 4 + 4) for rank in (4, 8))
    assert stats.residual_bytes == 2 * BATCH * HEADS * (500 - 4 - sealed) * HEAD_DIM * 2
    assert stats.elements == 2 * BATCH * HEADS * 500 * HEAD_DIM
    assert stats.cold_elements == 2 * BATCH * HEADS * sealed * HEAD_DIM
    assert stats.dense_bytes == 2 * stats.elements
    assert (stats.rank_keys, stats.rank_values, stats.exact_blocks, stats.num_tokens) == (4, 8, 0, 500)


def test_errors_are_those_of_the_reconstruction() -> None:
    layer = filled(500, torch.float32)
    keys, values = layer.reconstruct()
    generator = torch.Generator().manual_seed(0)
    for rebuilt, expected, error in zip(
        (keys, values),
        torch.randn(2, BATCH, HEADS, 500, HEAD_DIM, generator=generator),
        (layer.stats().error_keys, layer.stats().error_values),
        strict=True,
    ):
        blocks = [part[..., 4:452, :].unflatten(2, (-1, 64)).flatten(-2) for part in (rebuilt, expected)]
        true = ((blocks[0] - blocks[1]).norm(dim=-1) / blocks[1].norm(dim=-1)).mean()
        assert error == pytest.approx(float(true), rel=0.02)
        assert 0.3 < error < 1


def test_nothing_sealed_has_no_ranks_or_errors() -> None:
    for layer in (SpectralLayer(CONFIG), filled(20)):
        stats = layer.stats()
        assert (stats.rank_keys, stats.rank_values, stats.error_keys, stats.error_values) == (None, None, None, None)
        assert (stats.sealed_tokens, stats.cold_bytes, stats.seal_seconds, stats.svd_fallbacks) == (0, 0, 0.0, 0)
    assert filled(20).stats().stored_bytes == filled(20).stats().dense_bytes


def test_seconds_add_up() -> None:
    layer = filled(500)
    first = layer.stats().seal_seconds
    assert first > 0
    layer.append(*torch.randn(2, BATCH, HEADS, 200, HEAD_DIM).half())
    layer.seal()
    assert layer.stats().seal_seconds > first


def test_exact_factorizations_are_counted_once_per_matrix() -> None:
    # Zero matrices go to the exact SVD.
    layer = SpectralLayer(SpectralConfig(8, 8, 64, 4, 16))
    layer.append(*torch.zeros(2, BATCH, HEADS, 500, HEAD_DIM))
    layer.seal()
    expected = 2 * BATCH * HEADS * 448 // 64
    assert layer.stats().svd_fallbacks == expected
    layer.map_batch(lambda tensor: tensor.repeat_interleave(2, 0))
    layer.append(*torch.zeros(2, 2 * BATCH, HEADS, 64, HEAD_DIM))
    layer.seal()
    assert layer.stats().svd_fallbacks == expected + 2 * 2 * BATCH * HEADS
    layer.crop(4 + 64 + 10)
    assert layer.stats().svd_fallbacks == expected + 2 * 2 * BATCH * HEADS
    layer.reset()
    assert layer.stats().svd_fallbacks == 0


def test_the_sums_of_a_cache() -> None:
    layers = [
        LayerStats(
            "spectral",
            100,
            60,
            10,
            20,
            30,
            600,
            300,
            160,
            rank_keys=4,
            rank_values=8,
            basis="2x32-0123456789abcdef",
            basis_bytes=7,
            room_bytes=3,
            error_keys=0.1,
            error_values=0.2,
            exact_blocks=1,
            svd_fallbacks=2,
            seal_seconds=0.5,
        ),
        LayerStats("DynamicSlidingWindowLayer", 90, residual_bytes=40, dense_bytes=40, elements=20, room_bytes=8),
    ]
    stats = CacheStats.of(layers)
    assert dataclasses.asdict(stats) == {
        "layers": tuple(dataclasses.asdict(layer) for layer in layers),
        "num_tokens": 100,
        "basis_bytes": 7,
        "room_bytes": 11,
        "stored_bytes": 100,
        "dense_bytes": 640,
        "compression_factor": 6.4,
        "bits_per_element": 2.5,
        "exact_blocks": 1,
        "svd_fallbacks": 2,
        "seal_seconds": 0.5,
        "cold_bits_per_element": 1.0,
    }
    assert json.loads(json.dumps(stats.to_dict()))["layers"][0]["error_values"] == 0.2
    assert "layers" not in repr(stats)


def test_an_empty_cache() -> None:
    for layers in ([], [LayerStats("spectral", 0)]):
        stats = CacheStats.of(layers)
        assert (stats.num_tokens, stats.stored_bytes, stats.compression_factor, stats.bits_per_element) == (0, 0, 1, 0)


def test_stats_are_frozen() -> None:
    stats = filled(100).stats()
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.num_tokens = 1
