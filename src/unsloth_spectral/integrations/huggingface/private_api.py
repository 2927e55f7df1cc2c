"""The undocumented parts of transformers that this library uses.

A release may change these names without notice. Each is used in this file alone, so this file is the place to adapt to
a new release.
"""

from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    HQQQuantizedLayer,
    QuantizedLayer,
    QuantoQuantizedLayer,
    get_layer_types_and_kwargs,
)

# The method by which ``generate`` makes its cache: ``(generation_config, model_kwargs, *args)``.
PREPARE_CACHE = "_prepare_cache_for_generation"

# Names in the modelling code of most models: the function that rotates queries and keys, and two attributes of a module
# of rotary embeddings, with a prefix where it has several tables.
ROTATION_FUNCTION = "apply_rotary_pos_emb"
FREQUENCIES, SCALING = "inv_freq", "attention_scaling"


def attention_of(config: Any) -> str | None:
    """The attention implementation in use under ``config``; None if that is not the configuration of a model."""
    name: str | None = getattr(config, "_attn_implementation", None)
    return name


def stored_attention(config: PreTrainedConfig) -> str | None:
    """The attention implementation as it is stored: None before one was chosen."""
    name: str | None = config._attn_implementation_internal
    return name


def store_attention(config: PreTrainedConfig, name: str | None) -> None:
    """Undo a choice of attention implementation, without the checks of a new choice."""
    config._attn_implementation_internal = name


def can_set_attention(kind: Any) -> bool:
    """True if models of class ``kind`` attend through transformers' AttentionInterface."""
    return bool(kind._can_set_attn_implementation())


def supports_cache(kind: Any) -> bool:
    """True if ``generate`` gives models of class ``kind`` a DynamicCache."""
    return bool(kind._supports_default_dynamic_cache())


def compiles_everywhere(generation_config: Any) -> bool:
    """True if a call of ``generate`` asks for compiled steps on any device."""
    options = generation_config.compile_config
    return options is not None and bool(options._compile_all_devices)


def layer_types(config: PreTrainedConfig) -> tuple[list[str], list[dict[str, Any]]]:
    """The type of each layer of a model with this (text) ``config``, and the options of its cache layer."""
    types: Any
    options: Any
    types, options = get_layer_types_and_kwargs(config)
    # In the first supported releases the options are the same for all layers.
    return types, [options] * len(types) if isinstance(options, dict) else options


def layer_configs(config: PreTrainedConfig) -> list[Any]:
    """The configuration of each layer: sizes may differ from layer to layer."""
    return list(config.per_layer_config)


def has_layer_class(layer_type: str) -> bool:
    """True if transformers has a growing cache layer for layers of this type."""
    return layer_type in DYNAMIC_LAYER_TYPE_MAPPING


def has_fixed_layer_class(layer_type: str) -> bool:
    """True if transformers has a cache layer of fixed size for layers of this type."""
    return layer_type in STATIC_LAYER_TYPE_MAPPING


def make_layer(layer_type: str, options: dict[str, Any], max_length: int | None = None) -> Any:
    """The cache layer that a DynamicCache has for layers of this type or, with a ``max_length``, a StaticCache."""
    if max_length is None:
        return DYNAMIC_LAYER_TYPE_MAPPING[layer_type](**options)
    return STATIC_LAYER_TYPE_MAPPING[layer_type](max_cache_len=max_length, **options)


def quantized_states(layer: QuantizedLayer) -> tuple[Any, Any]:
    """The stored keys and values of a layer of a QuantizedCache; None if it is empty."""
    return layer._quantized_keys, layer._quantized_values


# Subclasses of QuantizedLayer must define ``_quantize`` and ``_dequantize``; these are those of its back ends.
def quantize_by_quanto(layer: QuantoQuantizedLayer, tensor: Tensor, axis: int) -> Any:
    return QuantoQuantizedLayer._quantize(layer, tensor, axis)


def quantize_by_hqq(layer: HQQQuantizedLayer, tensor: Tensor, axis: int) -> Any:
    return HQQQuantizedLayer._quantize(layer, tensor, axis)


def dequantize_by_hqq(layer: HQQQuantizedLayer, payload: Any) -> Any:
    return HQQQuantizedLayer._dequantize(layer, payload)
