"""What LMCache makes of caches that vLLM's attention backends lay out, by LMCache's own code, on a CPU."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")
pytest.importorskip("lmcache")

from lmcache.v1.multiprocess.transfer_context.base import gather_paged_kv_to_cpu
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, compute_layer_kv_cache_shape_bytes

from unsloth_spectral.codec.chunk.layout import ChunkLayout, Heads, Latent, Planes

LAYERS, BLOCKS, BLOCK, HEADS, DIM, RANK, ROPE = 2, 5, 16, 3, 8, 12, 4
ORDER = [3, 0, 4]  # the blocks of a sequence, somewhere in the cache
NHD, HND = {"kv_layout": "NHD"}, {"kv_layout": "HND"}


def random(*shape: int) -> Tensor:
    return torch.randn(LAYERS, *shape, generator=torch.Generator().manual_seed(0))


def chunk_of(caches: Tensor, hints: dict[str, str]) -> Tensor:
    """The chunk of the blocks ``ORDER``, as LMCache gathers it from each layer's cache."""
    by_name = {f"layers.{layer}": cache for layer, cache in enumerate(caches)}
    (chunk,) = gather_paged_kv_to_cpu(by_name, ORDER, len(ORDER), layout_hints=hints)
    return chunk


def in_order(paged: Tensor) -> Tensor:
    """``[layers, blocks, tokens, heads, dim]`` as ``[layers, heads, tokens, dim]`` of the sequence."""
    return paged[:, ORDER].flatten(1, 2).transpose(1, 2)


def test_vllm_lays_keys_beside_values_by_head() -> None:
    """As FlashAttention, FlashInfer and Triton attention read a cache [blocks, heads, tokens, 2 * head_dim]."""
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=HEADS, head_size=DIM, dtype=torch.float32)
    *shape, nbytes = compute_layer_kv_cache_shape_bytes(spec, BLOCKS)
    assert (shape, nbytes) == ([BLOCKS, HEADS, BLOCK], 2 * DIM * 4)
    caches = random(BLOCKS, HEADS, BLOCK, 2 * DIM)
    keys, values = caches.transpose(2, 3).split(DIM, dim=-1)
    expect(Heads(DIM), chunk_of(caches, HND), in_order(keys), in_order(values))


def test_vllm_lays_keys_beside_values_by_head_with_tokens_first() -> None:
    caches = random(BLOCKS, BLOCK, HEADS, 2 * DIM)
    keys, values = caches.split(DIM, dim=-1)
    expect(Heads(DIM), chunk_of(caches, NHD), in_order(keys), in_order(values))


def test_a_plane_of_keys_beside_one_of_values() -> None:
    """As vLLM's b12x backend reads a cache [blocks, 2, tokens, heads * head_dim]."""
    caches = random(BLOCKS, 2, BLOCK, HEADS * DIM)
    keys, values = caches.unflatten(-1, (HEADS, DIM)).unbind(2)
    expect(Planes(DIM), chunk_of(caches, HND), in_order(keys), in_order(values))


def test_two_planes() -> None:
    """As vLLM before 0.26 had it: [2, blocks, tokens, heads, head_dim]."""
    caches = random(2, BLOCKS, BLOCK, HEADS, DIM)
    keys, values = caches.unbind(1)
    expect(Planes(DIM), chunk_of(caches, NHD), in_order(keys), in_order(values))


@pytest.mark.parametrize("has_head", [False, True])
def test_latents(has_head: bool) -> None:
    """As vLLM's backends for multi-head latent attention keep them, the rotated part behind the latent."""
    spec = MLAAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=RANK + ROPE, dtype=torch.float32)
    assert compute_layer_kv_cache_shape_bytes(spec, BLOCKS) == (BLOCKS, 1, BLOCK, 4 * (RANK + ROPE))
    caches = random(BLOCKS, BLOCK, RANK + ROPE)
    latent, rotated = caches[:, :, :, None].split([RANK, ROPE], dim=-1)
    pairs = torch.cat([rotated[..., 0::2], rotated[..., 1::2]], -1)
    chunk = chunk_of(caches[:, :, None] if has_head else caches, HND)
    expect(Latent(RANK, ROPE), chunk, in_order(pairs), in_order(latent))


def expect(layout: ChunkLayout, chunk: Tensor, keys: Tensor, values: Tensor) -> None:
    for shape in [chunk.shape] if chunk.shape[0] == 2 else [chunk.shape, (1, *chunk.shape)]:
        assert layout.obstacle(shape) is None
        split = layout.split(chunk.view(shape))
        torch.testing.assert_close(split, (keys, values), rtol=0, atol=0)
