"""The cache layers that a model's configuration asks for, as transformers has it: one by one, or all alike."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer: its type, the options of transformers' cache layer of that type, and its own configuration."""

    layer_type: str
    options: dict[str, Any]
    config: Any


def layers_of(config: PreTrainedConfig) -> list[LayerPlan]:
    """The layers of a model with this (text) ``config``, in order."""
    found: Any = get_layer_types_and_kwargs(config)
    types, options = found
    if isinstance(options, dict):  # the same for all layers, in the first releases of the supported range
        options = [options] * len(types)
    # An early exit makes a model of the first layers; its list of types may go on.
    return [LayerPlan(*plan) for plan in zip(types, options, config.per_layer_config, strict=False)]
