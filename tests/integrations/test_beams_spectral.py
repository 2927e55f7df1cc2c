"""Beam search reorders the rows of a spectral cache at every step: that costs neither a basis nor bytes."""

from collections.abc import Callable

import torch
from transformers import LlamaForCausalLM

from unsloth_spectral import SpectralCache, SpectralConfig
from unsloth_spectral.codec.spectral.block import SpectralBlock
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument

PROMPT, NEW, BLOCK, RESIDUAL = 400, 320, 128, 16


def test_beam_search_over_several_sealings(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_llama(initializer_range=0.1, head_dim=32)
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, 128, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    config = SpectralConfig(preset="balanced", block_size=BLOCK, residual_length=RESIDUAL)
    cache = SpectralCache(model, config=config)
    prefill_only = SpectralCache(model, config=config)
    with torch.no_grad():
        model(ids.expand(3, -1), **cache_argument(prefill_only))
    generated = model.generate(
        ids,
        max_new_tokens=NEW,
        num_beams=3,
        do_sample=False,
        **cache_argument(cache),
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert generated.sequences.shape == (1, PROMPT + NEW)
    assert len(set(generated.beam_indices[0].tolist()) - {-1}) > 1, "rows changed places"
    assert torch.stack(generated.logits).isfinite().all()
    for layer, before in zip(cache.layers, prefill_only.layers, strict=True):
        (block,) = (block for block in layer.spectral.blocks if isinstance(block, SpectralBlock))
        stats, at_first = layer.spectral.stats(), before.spectral.stats()
        assert at_first.sealed_tokens == 2 * BLOCK
        assert block.num_tokens == stats.sealed_tokens == 5 * BLOCK, "sealed three times while decoding, and joined"
        assert stats.exact_blocks == 0
        # The prefill paid for the basis.
        assert stats.cold_bytes / stats.sealed_tokens < at_first.cold_bytes / at_first.sealed_tokens
        assert all(part.isfinite().all() for part in layer.spectral.reconstruct())
        assert stats.error_keys < 1.5 * at_first.error_keys
