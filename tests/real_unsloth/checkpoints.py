"""Tiny random models with a tokenizer, as files that Unsloth can load."""

from pathlib import Path
from typing import Any

import torch
from families.models import ALTERNATING, COMMON, LOCAL_EXPERTS, rope
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# More rows than the tokenizer has words: Unsloth may add a padding token of its own.
SMALL = {**COMMON, "initializer_range": 0.15, "vocab_size": 144}
SCALED = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
# Each with its options, besides SMALL. Unsloth has fast paths for the first seven.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, scaled RoPE": ("llama", SCALED),
    "mistral": ("mistral", {"sliding_window": None}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {**ALTERNATING, "query_pre_attn_scalar": 16}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma3": ("gemma3_text", {**ALTERNATING, "query_pre_attn_scalar": 16}),
    "phi": ("phi", {}),
    "gpt-oss": ("gpt_oss", {**ALTERNATING, **LOCAL_EXPERTS}),
    # Two experts that are nearly as good would be chosen between by a rounding.
    "gpt-oss, all experts": ("gpt_oss", {**ALTERNATING, **LOCAL_EXPERTS, "num_experts_per_tok": 4}),
}


def save(family: str, folder: Path) -> None:
    """Write a model of ``family`` with its tokenizer to ``folder``; always the same weights."""
    torch.manual_seed(0)
    kind, options = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SMALL, **options}))
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "sinks")):
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, 140)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
