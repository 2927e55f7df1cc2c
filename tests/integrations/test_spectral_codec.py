"""SpectralCache with the spectral codec under a tiny Llama: near the dense cache, batched, padded, while decoding."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from unsloth_spectral import SpectralCache, SpectralConfig, unpatch_unsloth_attention
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument

Build = Callable[..., LlamaForCausalLM]
# A random model's logits differ by about 1.6 between tokens; a lost or wrongly rotated key costs KL of .01 and more.
NEAR = 1e-3


def config_of(**options: Any) -> SpectralConfig:
    return SpectralConfig(**{"bits_per_element": 8, "block_size": 128, "residual_length": 16, **options})


def model_of(tiny_llama: Build, **options: Any) -> LlamaForCausalLM:
    model = tiny_llama(initializer_range=0.1, **options)
    model.generation_config.eos_token_id = None
    return model


def padded_batch(length: int = 260) -> dict[str, torch.Tensor]:
    """Three prompts, the last hardly longer than a block."""
    ids = torch.randint(3, 128, (3, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, length, dtype=torch.int64)
    for row, padding in enumerate((0, 40, 120)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def forced_logits(model: LlamaForCausalLM, batch: dict[str, torch.Tensor], tokens: torch.Tensor, cache: Any) -> Any:
    """Logits after the prompt and after each of ``tokens [B, n]``, fed one by one."""
    mask = batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    spectral_logits = [model(**batch, position_ids=positions, **cache_argument(cache)).logits[:, -1]]
    for step in range(tokens.shape[1]):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
        positions = positions[:, -1:] + 1
        token = tokens[:, step : step + 1]
        spectral_logits.append(
            model(token, attention_mask=mask, position_ids=positions, **cache_argument(cache)).logits[:, -1]
        )
    return torch.stack(spectral_logits, 1)


def divergence(actual: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """KL of ``actual`` from ``exact``, in nats."""
    p, q = exact.double().log_softmax(-1), actual.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def test_near_the_dense_cache_with_padded_prompts(tiny_llama: Build) -> None:
    model, batch = model_of(tiny_llama), padded_batch()
    tokens = torch.randint(3, 128, (3, 150), generator=torch.Generator().manual_seed(1))
    exact = forced_logits(model, batch, tokens, DynamicCache(config=model.config))
    cache = SpectralCache(model, config=config_of())
    spectral_logits = forced_logits(model, batch, tokens, cache)
    stats = cache.stats()
    assert [layer.sealed_tokens for layer in stats.layers] == [384, 384]
    kl = divergence(spectral_logits, exact)
    assert float(kl[:, 0].max()) < 1e-8, "a prefill is attended to exactly"
    assert float(kl[:, 1:].mean()) < NEAR
    assert float(kl.max()) < 20 * NEAR
    # Fewer bits are worse: something really goes through the codes.
    small = forced_logits(model, batch, tokens, SpectralCache(model, config=config_of(bits_per_element=1.38)))
    assert float(divergence(small, exact)[:, 1:].mean()) > 3 * float(kl[:, 1:].mean())


def test_sealing_while_decoding(tiny_llama: Build) -> None:
    model = model_of(tiny_llama)
    prompt = torch.randint(3, 128, (1, 20), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    options = {"max_new_tokens": 300, "do_sample": False, "use_cache": True}
    cache = SpectralCache(model, config=config_of())
    written = model.generate(**batch, **options, **cache_argument(cache))
    assert written.shape[1] == 320
    layers = cache.stats().layers
    assert all(layer.sealed_tokens == 256 for layer in layers)
    assert all(layer.exact_blocks == 0 for layer in layers)
    assert all(len(layer.spectral.blocks) <= 4 for layer in cache.layers)
    rotations = [block.keys.rotation for layer in cache.layers for block in layer.spectral.blocks[1:-1]]
    assert all(rotation is not None and rotation.step is not None for rotation in rotations)
    tokens = written[:, 20:-1]
    exact = forced_logits(model, batch, tokens, DynamicCache(config=model.config))
    again = forced_logits(model, batch, tokens, SpectralCache(model, config=config_of()))
    assert torch.equal(again[:, :-1].argmax(-1), tokens), "what generate chose"
    assert float(divergence(again, exact).mean()) < NEAR
    assert float(divergence(again, exact)[:, :100].max()) < 1e-6, "nothing is sealed yet"


def test_left_padding_takes_no_more_bits(tiny_llama: Build) -> None:
    config = SpectralConfig(bits_per_element=3.0, num_sink_tokens=0)
    options = {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    model, batch = model_of(tiny_llama, **options), padded_batch(2200)
    bits = []
    for mask in (torch.ones_like(batch["attention_mask"]), batch["attention_mask"]):
        cache = SpectralCache(model, config=config)
        forced_logits(model, {**batch, "attention_mask": mask}, torch.empty(3, 0, dtype=torch.int64), cache)
        bits.append(cache.stats().cold_bits_per_element)
    assert bits == pytest.approx([3.0, 3.0], rel=0.02)


def test_beam_search_and_batches(tiny_llama: Build) -> None:
    model, batch = model_of(tiny_llama), padded_batch()
    options = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False}
    cache = SpectralCache(model, config=config_of())
    written = model.generate(**batch, **options, **cache_argument(cache))
    assert written.shape == (3, 266)
    assert cache.stats().layers[0].sealed_tokens > 0
    with torch.no_grad():
        tokens = torch.full((1, 1), 5)
        exact = forced_logits(model, batch, tokens.expand(3, 1), DynamicCache(config=model.config))
        spectral_logits = forced_logits(model, batch, tokens.expand(3, 1), SpectralCache(model, config=config_of()))
    assert float(divergence(spectral_logits, exact).max()) < 20 * NEAR


def test_unpatching_removes_all_hooks(tiny_llama: Build) -> None:
    model = model_of(tiny_llama)
    before = model.config._attn_implementation
    SpectralCache(model)
    SpectralCache(model)
    before_passes = [module for module in model.modules() if module._forward_pre_hooks]
    after_passes = [module for module in model.modules() if module._forward_hooks]
    # Attention of each layer, and the model; the rotary embeddings, and the model.
    assert len(before_passes) == model.config.num_hidden_layers + 1
    assert len(after_passes) == 2
    assert all(len(module._forward_pre_hooks) == 1 for module in before_passes)
    assert all(len(module._forward_hooks) == 1 for module in after_passes)
    unpatch_unsloth_attention(model)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert model.config._attn_implementation == before
    unpatch_unsloth_attention(model)


def test_two_caches_of_one_model_share_nothing(tiny_llama: Build) -> None:
    model, batch = model_of(tiny_llama), padded_batch()
    tokens = torch.randint(3, 128, (3, 3), generator=torch.Generator().manual_seed(1))
    alone = forced_logits(model, batch, tokens, SpectralCache(model, config=config_of()))
    first, second = (SpectralCache(model, config=config_of()) for _ in range(2))
    forced_logits(model, {key: value.flip(0) for key, value in batch.items()}, tokens, first)
    assert torch.equal(forced_logits(model, batch, tokens, second), alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_half_precision(dtype: torch.dtype, tiny_llama: Build) -> None:
    model, batch = model_of(tiny_llama).to(dtype), padded_batch()
    tokens = torch.randint(3, 128, (3, 5), generator=torch.Generator().manual_seed(1))
    exact = forced_logits(model, batch, tokens, DynamicCache(config=model.config))
    cache = SpectralCache(model, config=config_of())
    spectral_logits = forced_logits(model, batch, tokens, cache)
    assert spectral_logits.dtype == dtype
    assert float(divergence(spectral_logits, exact).mean()) < 10 * NEAR
    assert cache.layers[0].spectral.reconstruct()[0].dtype == dtype
