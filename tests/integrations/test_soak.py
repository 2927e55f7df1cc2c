"""Long decoding: bytes follow the tokens, and nothing else grows. The full length and the time are benchmarks/soak.py."""

import gc
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM

from unsloth_spectral import SpectralCache, SpectralConfig

BLOCK, STEPS = 32, 600


def live_tensor_bytes() -> int:
    """Of all tensors that Python knows of, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("config", [SpectralConfig(8, 8, BLOCK, 4, 8), SpectralConfig(block_size=128, residual_length=16)])
@torch.no_grad()
def test_memory_follows_the_stated_bytes(config: SpectralConfig, tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_llama()
    cache = SpectralCache(model, config=config)
    ids = torch.randint(3, 128, (1, 1), generator=torch.Generator().manual_seed(0))
    without, excess, stored = live_tensor_bytes(), [], []
    for step in range(STEPS):
        ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        if step % 150 == 149:
            stored.append(cache.stats().stored_bytes)
            excess.append(live_tensor_bytes() - without - stored[-1])
    stats = cache.stats()
    assert stats.num_tokens == STEPS
    assert min(layer.sealed_tokens for layer in stats.layers) >= STEPS - 2 * config.block_size - 32
    assert stats.exact_blocks == 0
    # The newest token and bookkeeping of some hundred bytes are not the cache's; none of it grows.
    assert max(map(abs, excess)) < 16_384
    assert excess[-1] <= excess[0] + 4_096
    # Equal numbers of tokens take equal bytes, but for where in a block each count ends.
    exact = 2 * 2 * 2 * 16 * 4 * config.block_size
    first, last = stored[1] - stored[0], stored[3] - stored[2]
    assert last <= first + exact
