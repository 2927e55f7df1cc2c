"""Tiny random models with a tokenizer, as files that Unsloth can load."""

from pathlib import Path
from typing import Any

import torch
from families.models import ALTERNATING, COMMON, LOCAL_EXPERTS, rope
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
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
WITH_IMAGES = "gemma3 with images"
# An image is four patches, and begins and ends with a token of its own.
IMAGE_SIZE, IMAGE_TOKEN, IMAGE_BEGIN, IMAGE_END = 28, 140, 141, 142


def build(family: str) -> PreTrainedModel:
    """A model of ``family``; always the same weights."""
    torch.manual_seed(0)
    kind, options = FAMILIES["gemma3" if family == WITH_IMAGES else family]
    config = CONFIG_MAPPING[kind](**{**SMALL, **options})
    if family != WITH_IMAGES:
        return AutoModelForCausalLM.from_config(config)
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = SiglipVisionConfig(**layers, image_size=IMAGE_SIZE, patch_size=IMAGE_SIZE // 2)
    places = {"image_token_index": IMAGE_TOKEN, "boi_token_index": IMAGE_BEGIN, "eoi_token_index": IMAGE_END}
    whole = Gemma3Config(text_config=config, vision_config=vision, mm_tokens_per_image=4, **places)
    return Gemma3ForConditionalGeneration(whole)


def save(family: str, folder: Path) -> None:
    """Write a model of ``family`` with its tokenizer to ``folder``."""
    model = build(family)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "sinks", "projection_weight")):
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, 140)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
