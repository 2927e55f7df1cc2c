"""Feeding tokens to a model for what they leave in its cache, and for the token after them."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument


@torch.no_grad()
def feed(model: PreTrainedModel, input_ids: Tensor, cache: Any) -> Tensor:
    """Logits ``[B, vocab]`` after the last of ``input_ids [B, n]``, which ``cache`` then holds too."""
    options: dict[str, Any] = {}
    # Logits of every token of a long prompt would be larger than its cache.
    if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
        options["logits_to_keep"] = 1
    found = model(input_ids=input_ids.to(model.device), **cache_argument(cache), use_cache=True, **options)
    logits: Tensor = found.logits[:, -1]
    return logits
