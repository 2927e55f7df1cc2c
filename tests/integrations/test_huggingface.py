"""SpectralCache under real transformers models: tiny random ones of six families, and SmolLM2."""

from functools import cache
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from unsloth_spectral import SpectralCache, SpectralConfig
from unsloth_spectral.codec import block as block_module
from unsloth_spectral.codec.rank import RankFactors

HEAD_DIM, BLOCK, SINKS, RESIDUAL = 16, 16, 4, 8
# Full rank and short blocks: sealing happens within a hundred tokens and leaves nothing but the rounding to int8.
LOSSLESS = SpectralConfig(HEAD_DIM, HEAD_DIM, BLOCK, SINKS, RESIDUAL)
# Logits of these models spread by about 1.6; the rounding moves them by 0.01 to 0.04, a lost token by more than 1.
NEAR = 0.1
COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # At the usual 0.02 random models attend evenly and hardly read their keys.
    "initializer_range": 0.1,
}
WINDOWED = {"num_hidden_layers": 4, "sliding_window": 24}
FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None, "num_key_value_heads": 1}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {**WINDOWED, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": HEAD_DIM},
    ),
    "gpt_oss": (GptOssConfig, GptOssForCausalLM, {**WINDOWED, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
families = pytest.mark.parametrize("family", FAMILIES)


@cache
def weights(family: str, seed: int) -> dict[str, torch.Tensor]:
    config, kind, options = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config(**{**COMMON, **options}))
        for name, parameter in model.named_parameters():
            if name.endswith(("sinks", "bias")):  # both start at zero
                torch.nn.init.normal_(parameter, std=0.5)
    return model.state_dict()


def build(family: str = "llama", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A fresh model; equal arguments give equal weights."""
    config, kind, options = FAMILIES[family]
    model = kind(config(**{**COMMON, **options, **overrides})).eval()
    model.load_state_dict(weights(family, seed))
    model.generation_config.eos_token_id = None
    return model


def token_ids(batch: int = 1, length: int = 80, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded_batch() -> dict[str, torch.Tensor]:
    """Three prompts of 80, 50 and 9 tokens."""
    ids, mask = token_ids(3), torch.ones(3, 80, dtype=torch.int64)
    for row, padding in enumerate((0, 30, 71)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def sealed_tokens(spectral: SpectralCache) -> list[int]:
    """Per spectral layer."""
    return [layer.sealed_tokens for layer in spectral.stats().layers if layer.kind == "spectral"]


def dense_cache(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor, past: Any = None, **options: Any) -> torch.Tensor:
    return model(ids, past_key_values=past, use_cache=past is not None, **options).logits


def unrounded_encode(block: torch.Tensor, rank: int) -> RankFactors:
    """The rank codec less its rounding to int8 and half precision."""
    left, singular_values, right = torch.linalg.svd(block.float(), full_matrices=False)
    codes, basis = left[..., :rank].mT.contiguous(), (singular_values[..., None] * right)[..., :rank, :]
    return RankFactors(codes, torch.ones_like(codes[..., :1, :1]), basis, torch.zeros_like(codes[..., 0, 0]))


@pytest.fixture
def unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """At full rank only the order of additions is then left between a spectral and a dense cache.

    Rounding to int8 moves logits by some hundredths, which decides between two of 128 random tokens often enough;
    without it tokens must be equal, and every mistake in order, mask or bookkeeping is seen.
    """
    monkeypatch.setattr(block_module.rank_codec, "encode", unrounded_encode)


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "padded": {"padded": True},
    "beams": {"num_beams": 3},
    "padded beams": {"num_beams": 3, "padded": True},
    "several sequences": {"num_beams": 4, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "chunked prefill": {"prefill_chunk_size": 32},
    "padded and chunked": {"prefill_chunk_size": 32, "padded": True},
    "sampling": {"do_sample": True, "temperature": 1.5, "num_return_sequences": 3, "top_k": 20},
}


@families
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("unrounded")
def test_generated_tokens_equal_the_dense_ones(family: str, mode: str) -> None:
    options = dict(MODES[mode])
    inputs = padded_batch() if options.pop("padded", False) else {"input_ids": token_ids()}
    options = {"do_sample": False, "max_new_tokens": 30, **options}
    dense_model, model = build(family), build(family)
    torch.manual_seed(0)
    expected = dense_model.generate(**inputs, **options)
    spectral = SpectralCache(model, config=LOSSLESS)
    torch.manual_seed(0)
    tokens = model.generate(**inputs, past_key_values=spectral, **options)
    assert min(sealed_tokens(spectral)) >= 5 * BLOCK
    assert tokens.shape[1] == 110
    assert torch.equal(tokens, expected)


@families
@pytest.mark.parametrize("padded", [False, True])
def test_with_int8_codes_only_near_ties_are_decided_otherwise(family: str, padded: bool) -> None:
    inputs = padded_batch() if padded else {"input_ids": token_ids(3)}
    options = {"do_sample": False, "max_new_tokens": 30, "return_dict_in_generate": True, "output_logits": True}
    dense = build(family).generate(**inputs, **options)
    model = build(family)
    spectral = SpectralCache(model, config=LOSSLESS)
    found = model.generate(**inputs, past_key_values=spectral, **options)
    assert min(sealed_tokens(spectral)) >= 5 * BLOCK
    agreed = 0
    for row in range(3):
        for step in range(30):
            expected, actual = dense.logits[step][row], found.logits[step][row]
            assert (actual - expected).abs().max() < NEAR
            wanted, got = dense.sequences[row, 80 + step], found.sequences[row, 80 + step]
            agreed += int(wanted == got)
            if wanted != got:  # the texts part here, and no later step can be compared
                assert expected[wanted] - expected[got] < 2 * NEAR
                break
    assert agreed >= 45
