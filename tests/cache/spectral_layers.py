"""Layers under the spectral codec for tests: tokens like those of a model, and checks against a dense cache."""

from collections.abc import Callable
from typing import Any

import torch

from unsloth_spectral.cache.layer import SpectralLayer
from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.codec.spectral.block import SpectralBlock
from unsloth_spectral.rope import Rotation, rotate

HEADS, GROUPS, HEAD_DIM, BLOCK = 2, 2, 16, 128
# Every wrong, lost or moved token is an error of about 1.
NEAR = 0.08
FIRST = torch.arange(HEAD_DIM // 2)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rotation_of(start: int, count: int) -> Rotation:
    angle = torch.arange(start, start + count)[:, None] * 100.0 ** (-FIRST / len(FIRST))
    return Rotation.of(torch.polar(torch.ones_like(angle), angle)[None], FIRST, FIRST + len(FIRST))


def new_tokens(start: int, count: int, batch: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, Rotation]:
    """Keys like those of a model with a key bias, values, and the positions."""
    rotation = rotation_of(start, count)
    x = random(batch, HEADS, count, HEAD_DIM, seed=seed) + 2 * random(1, HEADS, 1, HEAD_DIM)
    return (
        rotate(x, rotation.table()[:, None], rotation),
        random(batch, HEADS, count, HEAD_DIM, seed=seed + 1),
        rotation,
    )


def feed(layer: SpectralLayer, start: int, count: int, batch: int = 2, seed: int = 0) -> list[torch.Tensor]:
    keys, values, rotation = new_tokens(start, count, batch, seed)
    layer.append(keys, values)
    layer.observe(random(batch, HEADS * GROUPS, count, HEAD_DIM, seed=seed + 2) / 4, rotation)
    return [keys, values]


def config_of(**options: Any) -> SpectralConfig:
    return SpectralConfig(**{"block_size": BLOCK, "residual_length": 16, "bits_per_element": 8, **options})


def check(layer: SpectralLayer, dense: list[torch.Tensor]) -> None:
    count = dense[0].shape[-2]
    assert layer.num_tokens == count == sum(block.num_tokens for block in layer.blocks)
    rebuilt = [torch.cat(parts, -2) for parts in zip(*(block.reconstruct() for block in layer.blocks), strict=True)]
    for actual in (layer.reconstruct(), rebuilt):
        for part, expected in zip(actual, dense, strict=True):
            assert part.shape == expected.shape
            assert float((part - expected).norm() / expected.norm()) < NEAR
            worst = (part - expected).norm(dim=-1) / expected.norm(dim=-1).mean()
            assert float(worst.max()) < 5 * NEAR, "a token is lost or out of its place"


def check_bytes(layer: SpectralLayer, allocated_bytes: Callable[[Any], int]) -> None:
    stats = layer.stats()
    assert stats.stored_bytes == stats.sink_bytes + stats.cold_bytes + stats.residual_bytes
    # All tensors of the layer, except the plan of the basis in no block and the steps of positions that pieces share.
    assert abs(allocated_bytes(layer) - stats.stored_bytes) <= 0.05 * stats.stored_bytes + 4000
    sealed = [block for block in layer.blocks if isinstance(block, SpectralBlock)]
    assert stats.sealed_tokens == sum(block.num_tokens for block in sealed)
    assert stats.cold_bytes >= sum(block.nbytes for block in sealed)
    assert (
        stats.dense_bytes
        == 4 * stats.elements
        == 4 * layer.num_tokens * layer.blocks[0].reconstruct()[0][:, :, 0].numel() * 2
    )
