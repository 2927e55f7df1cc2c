"""Feeding tokens to a model to fill its cache, and the logits that follow them."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument


@torch.no_grad()
def feed(model: PreTrainedModel, input_ids: Tensor, cache: Any) -> Tensor:
    """Add ``input_ids [B, n]`` to ``cache``; returns the logits ``[B, vocab]`` after the last of them."""
    options: dict[str, Any] = {}
    # Logits of every token of a long prompt would be larger than its cache.
    if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
        options["logits_to_keep"] = 1
    output = model(input_ids=input_ids.to(model.device), **cache_argument(cache), use_cache=True, **options)
    logits: Tensor = output.logits[:, -1]
    return logits
