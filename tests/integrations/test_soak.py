"""Long decoding: memory follows the stated bytes, and nothing else grows."""

import gc
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM

from unsloth_spectral import SpectralCache, SpectralConfig
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument

BLOCK, STEPS = 32, 600


def live_storages() -> dict[int, torch.UntypedStorage]:
    """Of all tensors that Python knows of, each once; while they are kept, their places are not given anew."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
    return {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in tensors)}


# With the spectral codec the process also has tables: constants, and one rotation per rotary pair (8) and token.
@pytest.mark.parametrize(
    ("config", "constant", "per_token"),
    [
        (SpectralConfig(8, 8, BLOCK, 4, 8), 1_024, 0),
        (SpectralConfig(block_size=128, residual_length=16), 45_000, 64),
    ],
)
@torch.no_grad()
def test_memory_follows_the_stated_bytes(
    config: SpectralConfig, constant: int, per_token: int, tiny_llama: Callable[..., LlamaForCausalLM]
) -> None:
    model = tiny_llama()
    cache = SpectralCache(model, config=config)
    ids = torch.randint(3, 128, (1, 1), generator=torch.Generator().manual_seed(0))
    before = live_storages()
    for step in range(STEPS):
        ids = model(ids, **cache_argument(cache)).logits[:, -1:].argmax(-1)
        if step % 150 == 149:
            held_bytes = sum(storage.nbytes() for place, storage in live_storages().items() if place not in before)
            unstated = held_bytes - cache.stats().stored_bytes
            assert 0 <= unstated <= constant + per_token * (step + 1)
    stats = cache.stats()
    assert stats.num_tokens == STEPS
    assert min(layer.sealed_tokens for layer in stats.layers) >= STEPS - 2 * config.block_size - 32
    assert stats.exact_blocks == 0
