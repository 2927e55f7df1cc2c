"""Which models can carry a spectral cache."""

from transformers import PreTrainedModel
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, get_layer_types_and_kwargs

from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.errors import UnsupportedModelError

SUPPORTED = (
    "supported are decoder-only transformers models that use the AttentionInterface and have full-attention layers, "
    "for example Llama, Mistral, Qwen2, Qwen3, Gemma 2, Phi-3, SmolLM"
)

# Their attention modules slice or split what `update` returns.
_READ_THEIR_KEYS = ("diffllama",)


def check_model(model: object, config: SpectralConfig) -> None:
    """Raise unless ``model`` can carry a spectral cache with ``config``.

    Raises:
        UnsupportedModelError: names the model, what stands in the way and what is supported.
        InvalidArgumentError: a rank exceeds the model's head_dim.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"{name} is not a transformers PreTrainedModel; {SUPPORTED}")
    reason = _obstacle(model)
    if reason is not None:
        raise UnsupportedModelError(f"{name} {reason}; {SUPPORTED}")
    text_config = model.config.get_text_config(decoder=True)
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    config.check_head_dim(head_dim)


def _obstacle(model: PreTrainedModel) -> str | None:
    """Why ``model`` cannot carry a spectral cache, as the end of a sentence; None where it can."""
    if model.config.is_encoder_decoder:
        return "is an encoder-decoder"
    if not model.can_generate():
        return "cannot generate (it has no language-model head)"
    if not model._can_set_attn_implementation():
        return "does not use transformers' AttentionInterface"
    text_config = model.config.get_text_config(decoder=True)
    if getattr(text_config, "kv_lora_rank", None):
        return "uses multi-head latent attention, whose cache is low-rank already"
    if text_config.model_type in _READ_THEIR_KEYS:
        return "computes with its keys and values before attention, which a compressed cache does not hand out"
    layer_types = get_layer_types_and_kwargs(text_config)[0]
    unknown = sorted(set(layer_types) - set(DYNAMIC_LAYER_TYPE_MAPPING))
    if unknown:
        return f"has layers of unknown type {', '.join(unknown)}"
    if "full_attention" not in layer_types:
        return f"has no full-attention layer (its layers are {', '.join(sorted(set(layer_types)))})"
    return None
