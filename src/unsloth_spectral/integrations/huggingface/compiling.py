"""Whether the decoding steps of a model can be compiled, and the mask of such a step."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import causal_mask_function, sdpa_mask

from unsloth_spectral.attention import steps
from unsloth_spectral.codec.codec import CodecConfig
from unsloth_spectral.codec.spectral.codec import SpectralCodec
from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.integrations.huggingface.layer_plans import layers_of
from unsloth_spectral.integrations.huggingface.private_api import compiles_everywhere, has_fixed_layer_class
from unsloth_spectral.integrations.huggingface.support import full_attention_dims, why_materialised
from unsloth_spectral.log import warn_once


def usable_length(model: PreTrainedModel, config: CodecConfig, max_length: int | None) -> int | None:
    """``max_length`` if steps of ``model`` can be compiled with ``config``; else None, and one warning says why not.

    Raises:
        InvalidArgumentError: ``max_length`` is no positive integer.
    """
    if max_length is None:
        return None
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise InvalidArgumentError(f"max_length must be a number of tokens, 1 or more, got {max_length!r}")
    reason = _obstacle(model, config)
    if reason is None:
        return max_length
    warn_once(
        "%s: with this cache its decoding steps cannot be compiled (%s): it grows as without max_length",
        type(model).__name__,
        reason,
        about=model,
    )
    return None


def _obstacle(model: PreTrainedModel, config: CodecConfig) -> str | None:
    reason = why_materialised(model)
    if reason is not None:
        return f"it {reason}"
    if config.codec != SpectralCodec.name:
        return f"the {config.codec} codec has no kernel"
    for plan in layers_of(model.config.get_text_config(decoder=True)):
        if not has_fixed_layer_class(plan.layer_type):
            return f"its layers of type {plan.layer_type} have no form of fixed size"
    reasons = (steps.obstacle(model.device, model.dtype, dim) for dim in full_attention_dims(model))
    return next(filter(None, reasons), None)


def would_compile(model: PreTrainedModel, generation_config: Any) -> bool:
    """True if ``generate`` compiles the steps of ``model`` for a cache that allows it, and no kernel is missing."""
    if generation_config.disable_compile or generation_config.is_assistant:
        return False
    if compiles_everywhere(generation_config):
        return True
    return model.device.type == "cuda" and steps.obstacle(model.device, model.dtype, 1) is None


def step_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """``sdpa_mask``, which makes no mask for one query that sees all tokens.

    transformers asks for one at each step of a cache that compiles, as long as the cache may become. Ours attends to
    the tokens that there are.
    """
    padding, function = kwargs.get("attention_mask"), kwargs.get("mask_function", causal_mask_function)
    is_plain = kwargs.get("q_length") == 1 and kwargs.get("local_size") is None and function is causal_mask_function
    if is_plain and (padding is None or (not torch.compiler.is_compiling() and bool(padding.all()))):
        return None
    return sdpa_mask(*args, **kwargs)
