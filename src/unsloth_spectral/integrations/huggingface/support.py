"""Which models can carry a spectral cache, and which of them get their keys and values rebuilt."""

import inspect
from typing import Any

from transformers import PreTrainedModel

from unsloth_spectral.codec.codec import CodecConfig
from unsloth_spectral.errors import UnsupportedModelError
from unsloth_spectral.integrations.fast_path import copied_class
from unsloth_spectral.integrations.huggingface.cache_argument import CACHE_NAME
from unsloth_spectral.integrations.huggingface.layer_plans import layers_of
from unsloth_spectral.integrations.huggingface.private_api import can_set_attention, supports_cache
from unsloth_spectral.integrations.huggingface.versions import warn_if_untested

SUPPORTED = (
    "supported are decoder-only transformers models that have full-attention layers, for example Llama, Mistral, "
    "Qwen2, Qwen3, Gemma 2, Phi-3, SmolLM"
)

# The name under which models find the spectral attention function.
ATTENTION_NAME = "unsloth_spectral"

# Model types whose attention modules slice, split or repeat the result of `update`. A model of another type is marked
# when its attention module does so.
_READ_THEIR_KEYS = frozenset({"diffllama", "doge", "jetmoe"})
_IS_REBUILT = "_unsloth_spectral_is_rebuilt"  # the mark: an attribute of the model

# Configuration names for the number of runs of some layers: transformers adds cache layers for these while the model
# runs.
_LOOPS = ("n_recurrent_loops", "loop_num_passes")


def unwrapped(model: Any) -> Any:
    """The transformers model within ``torch.compile``'s and PEFT's wrappers; any other model itself."""
    if hasattr(model, "_orig_mod"):
        return unwrapped(model._orig_mod)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return unwrapped(model.get_base_model())
    return model


def check_model(model: object, config: CodecConfig) -> None:
    """Raise unless ``model`` can carry a spectral cache with ``config``.

    Raises:
        UnsupportedModelError: the message names the model, the obstacle and what is supported.
        InvalidArgumentError: a rank exceeds the model's head_dim.
    """
    warn_if_untested()
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"{name} is not a transformers PreTrainedModel; {SUPPORTED}")
    reason = _obstacle(model)
    if reason is not None:
        raise UnsupportedModelError(f"{name} {reason}; {SUPPORTED}")
    for head_dim in full_attention_dims(model):
        config.check_head_dim(head_dim)


def full_attention_dims(model: PreTrainedModel) -> list[int]:
    """The head_dim of each layer that becomes spectral, as its configuration says; none for layers of latents."""
    # Latents have no heads: the cache checks its first tokens instead.
    layers = [layer for layer in _full_attention_layers(model) if not getattr(layer, "kv_lora_rank", None)]
    return [getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads for layer in layers]


def why_materialised(model: PreTrainedModel) -> str | None:
    """Why ``model`` cannot use the spectral attention function and gets its keys and values rebuilt, as the end of a
    sentence; None if it can."""
    # A class copied by Unsloth's compiler has its own attention methods, which are replaced while the model generates.
    if not can_set_attention(copied_class(type(model))):
        return "does not use transformers' AttentionInterface"
    if any(getattr(layer, "kv_lora_rank", None) for layer in _full_attention_layers(model)):
        return "uses multi-head latent attention, which expands what it caches"
    reads_keys = model.config.get_text_config(decoder=True).model_type in _READ_THEIR_KEYS
    if reads_keys or getattr(model, _IS_REBUILT, False):
        return "computes with its keys and values before attention"
    return None


def rebuild_from_now_on(model: PreTrainedModel) -> None:
    """Make later caches for ``model`` return rebuilt keys and values, because it computes with them."""
    setattr(model, _IS_REBUILT, True)


def _full_attention_layers(model: PreTrainedModel) -> list[Any]:
    """The configurations of the layers that become spectral: sizes may differ from layer to layer."""
    plans = layers_of(model.config.get_text_config(decoder=True))
    return [plan.config for plan in plans if plan.layer_type == "full_attention"]


def _obstacle(model: PreTrainedModel) -> str | None:
    """Why ``model`` cannot carry a spectral cache, as the end of a sentence; None if it can."""
    if model.config.is_encoder_decoder:
        return "is an encoder-decoder"
    if not model.can_generate():
        return "cannot generate (it has no language-model head)"
    forward = inspect.signature(type(model).forward)
    if CACHE_NAME not in forward.parameters or not supports_cache(type(model)):
        return "takes no transformers Cache"
    config = model.config.get_text_config(decoder=True)
    if any((getattr(config, name, None) or 1) > 1 for name in _LOOPS):
        return "runs its layers several times for each token, with keys of their own each time"
    plans = layers_of(config)
    layer_types = {plan.layer_type for plan in plans}
    unknown = sorted({plan.layer_type for plan in plans if not plan.is_known})
    if unknown:
        return f"has layers of unknown type {', '.join(unknown)}"
    if "full_attention" not in layer_types:
        return f"has no full-attention layer (its layers are {', '.join(sorted(layer_types))})"
    return None
