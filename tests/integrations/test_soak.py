"""Long decoding: memory follows the stated bytes, and nothing else grows."""

import gc
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM

from unsloth_spectral import SpectralCache, SpectralConfig, rope

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


# With the spectral codec the process has tables of its own too: constants, and one turn a rotary pair (8) and token.
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
    rope._last.step = rope._last.table = None  # of another test, and let go during this one
    without = live_tensor_bytes()
    for step in range(STEPS):
        ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        if step % 150 == 149:
            unstated = live_tensor_bytes() - without - cache.stats().stored_bytes
            assert 0 <= unstated <= constant + per_token * (step + 1)
    stats = cache.stats()
    assert stats.num_tokens == STEPS
    assert min(layer.sealed_tokens for layer in stats.layers) >= STEPS - 2 * config.block_size - 32
    assert stats.exact_blocks == 0
