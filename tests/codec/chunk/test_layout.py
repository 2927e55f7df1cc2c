"""Chunks as engines lay them out, taken apart number by number."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from unsloth_spectral.codec.chunk.layout import Blocks, ChunkLayout, Heads, Latent, Planes
from unsloth_spectral.errors import InvalidArgumentError

LAYERS, HEADS, TOKENS, DIM = 2, 3, 8, 4


def numbered(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


KEYS, VALUES = numbered(LAYERS, HEADS, TOKENS, DIM), -numbered(LAYERS, HEADS, TOKENS, DIM) - 1


def beside_by_head(layer: int, token: int) -> list[Tensor]:
    return [x[layer, head, token] for head in range(HEADS) for x in (KEYS, VALUES)]


def keys_before_values(layer: int, token: int) -> list[Tensor]:
    return [x[layer, head, token] for x in (KEYS, VALUES) for head in range(HEADS)]


def rows(row: Callable[[int, int], list[Tensor]]) -> Tensor:
    """``[layers, tokens, width]``, token by token."""
    return torch.stack(
        [torch.stack([torch.cat(row(layer, token)) for token in range(TOKENS)]) for layer in range(LAYERS)]
    )


def blocks_of_transposed_keys(block: int) -> Tensor:
    """The layout of vLLM's CPU kernels: in each block a head's keys, transposed, then its values."""
    chunk = torch.empty(LAYERS, TOKENS, HEADS, 2 * DIM)
    for layer in range(LAYERS):
        for head in range(HEADS):
            for start in range(0, TOKENS, block):
                keys, values = (x[layer, head, start : start + block] for x in (KEYS, VALUES))
                both = torch.cat([keys.mT.flatten(), values.flatten()])
                chunk[layer, start : start + block, head] = both.view(block, 2 * DIM)
    return chunk.flatten(2)


@pytest.mark.parametrize(
    ("layout", "chunk"),
    [
        (Heads(DIM), rows(beside_by_head)),
        (Heads(DIM), rows(beside_by_head)[None]),
        (Blocks(DIM, 4), blocks_of_transposed_keys(4)),
        (Blocks(DIM, 8), blocks_of_transposed_keys(8)[None]),
        (Planes(DIM), rows(keys_before_values)),
        (Planes(DIM), rows(keys_before_values)[None]),
        (Planes(DIM), torch.stack([KEYS, VALUES]).transpose(2, 3).flatten(3)),
    ],
)
def test_keys_and_values_are_where_the_engine_puts_them(layout: ChunkLayout, chunk: Tensor) -> None:
    assert layout.obstacle(chunk.shape) is None
    assert layout.num_heads(chunk.shape) == HEADS
    keys, values = layout.split(chunk)
    assert torch.equal(keys, KEYS)
    assert torch.equal(values, VALUES)
    assert torch.equal(layout.join(keys, values, chunk.shape), chunk)


@pytest.mark.parametrize("planes", [(), (1,)])
def test_latents_have_their_rotated_part_behind_them(planes: tuple[int, ...]) -> None:
    layout, chunk = Latent(10, 4), numbered(*planes, LAYERS, TOKENS, 14)
    assert layout.obstacle(chunk.shape) is None
    assert layout.num_heads(chunk.shape) == 1
    keys, values = layout.split(chunk)
    assert torch.equal(values[:, 0], chunk.view(LAYERS, TOKENS, 14)[..., :10])
    # Pairs are neighbours in the chunk, and half the size apart for the codec.
    assert keys[1, 0, 2].tolist() == chunk.view(LAYERS, TOKENS, 14)[1, 2][[10, 12, 11, 13]].tolist()
    assert torch.equal(layout.join(keys, values, chunk.shape), chunk)


@pytest.mark.parametrize(
    ("layout", "shape", "message"),
    [
        (Heads(64), (2, 4, 256, 128), 'write "layout": "planes"'),
        (Heads(128), (1, 4, 256, 576), 'write "layout": "latent"'),
        (Heads(64), (4, 256, 192), "2 * head_dim=128"),
        (Blocks(64, 128), (1, 4, 300, 128), "got 300 tokens"),
        (Blocks(64, 128), (2, 4, 256, 128), 'write "layout": "planes"'),
        (Blocks(64, 128), (1, 4, 256, 192), "2 * head_dim=128"),
        (Planes(64), (3, 4, 256, 128), "one plane or two"),
        (Planes(64), (2, 4, 256, 100), "head_dim=64"),
        (Planes(64), (1, 4, 256, 192), "multiple of 128"),
        (Latent(512, 64), (1, 4, 256, 1024), "[1, layers, tokens, 576]"),
        (Latent(512, 64), (2, 4, 256, 576), "[1, layers, tokens, 576]"),
    ],
)
def test_other_layouts_are_named(layout: ChunkLayout, shape: tuple[int, ...], message: str) -> None:
    obstacle = layout.obstacle(shape)
    assert obstacle is not None
    assert message in obstacle


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Heads(63), "head_dim"),
        (lambda: Heads(0), "head_dim"),
        (lambda: Heads(64.0), "head_dim"),  # type: ignore[arg-type]
        (lambda: Blocks(64, 0), "block_tokens"),
        (lambda: Blocks(64, True), "block_tokens"),
        (lambda: Blocks(63, 128), "head_dim"),
        (lambda: Planes(True), "head_dim"),
        (lambda: Planes("64"), "head_dim"),  # type: ignore[arg-type]
        (lambda: Latent(0, 64), "kv_lora_rank"),
        (lambda: Latent(512, 0), "qk_rope_head_dim"),
        (lambda: Latent(512, 63), "qk_rope_head_dim"),
    ],
)
def test_sizes_are_checked(make: Callable[[], ChunkLayout], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        make()
