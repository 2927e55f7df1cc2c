"""Tiny random models of every family the tests know, in one place."""

import functools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# Where there is a GPU the whole matrix runs there.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Major and minor number of the installed transformers.
RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
HEAD_DIM = 16
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
    # At the usual 0.02 random models attend evenly, and their keys hardly matter.
    "initializer_range": 0.1,
    # With tied embeddings a token would mostly predict itself.
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Family:
    """A row of the matrix.

    Attributes:
        model_type: transformers' name of the architecture.
        options: of the configuration, besides ``COMMON``.
        without: names of ``COMMON`` that this configuration does not take.
        is_materialised: whether its keys and values are rebuilt for the attention of its own.
        is_recurrent: whether layers keep a state that cannot go back, so that transformers refuses to guess ahead.
        grows_tables: whether its RoPE tables follow the longest text it has seen, so that texts disturb each other.
        refusal: what ``SpectralCache`` says to it, where it cannot be served.
    """

    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    is_materialised: bool = False
    is_recurrent: bool = False
    grows_tables: bool = False
    refusal: str | None = None


def rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **options}}


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Every second layer has a window, shorter than the prompts.
WINDOW = {"num_hidden_layers": 4, "sliding_window": 24}
ALTERNATING = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
GEMMA4 = {
    **ALTERNATING,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 0,
    "global_head_dim": 2 * HEAD_DIM,
}
LATENT = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": HEAD_DIM,
    "qk_nope_head_dim": HEAD_DIM,
    "v_head_dim": 24,
}

FAMILIES: dict[str, Family] = {
    "Llama": Family("llama"),
    "Llama, linear RoPE": Family("llama", rope("linear", factor=4.0)),
    "Llama, llama3 RoPE": Family(
        "llama",
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "Llama, dynamic RoPE": Family(
        "llama", {**rope("dynamic", factor=2.0), "max_position_embeddings": 64}, grows_tables=True
    ),
    "Llama, yarn RoPE": Family(
        "llama", {**rope("yarn", factor=4.0, original_max_position_embeddings=64), "max_position_embeddings": 256}
    ),
    "Mistral": Family("mistral", {"sliding_window": None, "num_key_value_heads": 1}),
    "Mistral, sliding window": Family("mistral", {"sliding_window": 24}, refusal="no full-attention layer"),
    "Mixtral": Family("mixtral", LOCAL_EXPERTS),
    "Qwen2": Family("qwen2"),
    "Qwen2-MoE": Family("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 32}),
    "Qwen3": Family("qwen3"),
    "Qwen3-MoE": Family("qwen3_moe", EXPERTS),
    "Qwen3-Next": Family(
        "qwen3_next",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": HEAD_DIM,
            "linear_value_head_dim": HEAD_DIM,
        },
        is_recurrent=True,
    ),
    "Gemma 2": Family("gemma2", {**ALTERNATING, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": HEAD_DIM}),
    "Gemma 3": Family("gemma3_text", {**ALTERNATING, "query_pre_attn_scalar": HEAD_DIM}),
    "Gemma 4": Family("gemma4_text", GEMMA4),
    "Gemma 4, shared keys": Family(
        "gemma4_text",
        {
            **GEMMA4,
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_kv_shared_layers": 2,
        },
    ),
    "Phi": Family("phi", rope("default", partial_rotary_factor=0.5)),
    "Phi-3": Family("phi3", {"sliding_window": None}),
    "Phi-3, longrope": Family(
        "phi3",
        {
            "sliding_window": None,
            "original_max_position_embeddings": 2048,
            **rope(
                "longrope",
                factor=2.0,
                short_factor=[1.0 + 0.1 * pair for pair in range(HEAD_DIM // 2)],
                long_factor=[3.0] * (HEAD_DIM // 2),
            ),
        },
    ),
    "gpt-oss": Family("gpt_oss", {**ALTERNATING, **LOCAL_EXPERTS}),
    "GLM": Family("glm"),
    "GLM-4": Family("glm4"),
    "Cohere": Family("cohere"),
    "Cohere 2": Family("cohere2", ALTERNATING),
    "SmolLM3": Family("smollm3", {"no_rope_layers": [1, 0], "use_sliding_window": False}),
    "OLMo 2": Family("olmo2"),
    "Granite": Family("granite", {"attention_multiplier": 1 / HEAD_DIM}),
    "GPT-NeoX": Family("gpt_neox"),
    "StableLM": Family("stablelm"),
    "Llama 4": Family(
        "llama4_text",
        {
            **LOCAL_EXPERTS,
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 96,
            "no_rope_layers": [1, 0, 1, 0],
            "attention_chunk_size": 32,
        },
    ),
    "LFM2": Family("lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "Bamba": Family(
        "bamba",
        {
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "mamba_d_state": 16,
            "mamba_chunk_size": 32,
        },
        is_recurrent=True,
    ),
    "EXAONE 4": Family("exaone4", ALTERNATING),
    "GPT-2": Family("gpt2"),
    "Qwen2-VL, text": Family("qwen2_vl"),
    "DeepSeek-V3": Family("deepseek_v3", LATENT, without=("head_dim",), is_materialised=True),
    "DiffLlama": Family("diffllama", is_materialised=True),
    "Doge": Family("doge", is_materialised=True),
    "JetMoe": Family("jetmoe", {**LOCAL_EXPERTS, "kv_channels": HEAD_DIM}, is_materialised=True),
    "Falcon": Family(
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
        without=("head_dim",),
        is_materialised=True,
    ),
    "Falcon, ALiBi": Family(
        "falcon",
        {"new_decoder_architecture": False, "multi_query": False, "alibi": True},
        without=("head_dim",),
        is_materialised=True,
    ),
    "GPT-J": Family("gptj", {"rotary_dim": 8}, is_materialised=RELEASE < (5, 24)),
    "BLOOM": Family("bloom", is_materialised=True),
    # By default it writes to no cache, and reads a given one incorrectly.
    "MPT": Family("mpt", {"max_seq_len": 4096, "use_cache": True}, is_materialised=True),
    "OpenAI GPT": Family("openai-gpt", refusal="takes no transformers Cache"),
}


# One of each kind: plain, windowed, with a recurrent state, with sink logits, with fused projections, rebuilt.
REPRESENTATIVE = ("Llama", "Gemma 3", "Qwen3-Next", "gpt-oss", "Phi-3", "DeepSeek-V3")


def served(*rest: Any, quick: bool = False) -> list[Any]:
    """Parameters ``family, *rest`` for all families that are served: those that are not representative are slow, unless
    the test is a ``quick`` one."""
    families = [family for family, row in FAMILIES.items() if row.refusal is None]
    return [
        pytest.param(family, *rest, marks=() if quick or family in REPRESENTATIVE else pytest.mark.slow)
        for family in families
    ]


def make(family: str, **overrides: Any) -> PreTrainedModel:
    """A model of ``family``, its weights drawn anew."""
    chosen = FAMILIES[family]
    options = {name: value for name, value in COMMON.items() if name not in chosen.without}
    options = {**options, **chosen.options, **overrides}
    if chosen.model_type == "qwen2_vl":
        rotary = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
        vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}
        return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config={**options, **rotary}, vision_config=vision))
    config = CONFIG_MAPPING[chosen.model_type](**options)
    # The first supported releases of transformers give Gemma 2 sdpa, which drops its soft cap.
    attention = {"attn_implementation": "eager"} if chosen.model_type == "gemma2" else {}
    return AutoModelForCausalLM.from_config(config, **attention)


@functools.cache
def weights(family: str, seed: int) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make(family)
        for name, parameter in model.named_parameters():
            # All start at zero. Key biases are large in Qwen2; elsewhere they would give one answer to whatever came
            # before.
            if name.endswith(("sinks", "q_proj.bias", "k_proj.bias")):
                torch.nn.init.normal_(parameter, std=0.5)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
            # Gemma 4 has no other scale for its scores.
            if name.endswith("q_norm.weight") and FAMILIES[family].model_type == "gemma4_text":
                torch.nn.init.constant_(parameter, (2 * HEAD_DIM) ** -0.5)
    return model.state_dict()


def build(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A fresh model in float32; equal arguments give equal weights."""
    model = make(family, **overrides).eval()
    model.load_state_dict(weights(family, seed))
    model.generation_config.eos_token_id = None
    return model.to(DEVICE)
