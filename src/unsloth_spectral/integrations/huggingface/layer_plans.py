"""The cache layers that a model's configuration asks for."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from unsloth_spectral.integrations.huggingface.private_api import (
    has_layer_class,
    layer_configs,
    layer_types,
    make_layer,
)

_CROSS_ATTENTION = "cross_attention"


class CrossAttentionLayer(DynamicLayer):
    """Keys and values of an image, for the layers that attend to it (Mllama's); empty if there is no image.

    It has no tokens of the text, so ``crop`` does not change it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_before = 0

    def begin_pass(self) -> None:
        """Remember the length that ``take_back`` returns to."""
        self.num_before = self.get_seq_length()

    def take_back(self) -> None:
        """Remove the tokens of an interrupted forward pass."""
        if self.num_before == 0:
            self.reset()
        elif self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[..., : self.num_before, :], self.values[..., : self.num_before, :]

    def crop(self, tokens_to_remove: int) -> None:
        """Do nothing: the text is cropped, the image is not."""

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized, self.num_before = False, 0


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer: its type, the options of transformers' cache layer of that type, and its own configuration."""

    layer_type: str
    options: dict[str, Any]
    config: Any

    @property
    def is_known(self) -> bool:
        """True if there is a cache layer for this type."""
        return self.layer_type == _CROSS_ATTENTION or has_layer_class(self.layer_type)

    def transformers_layer(self, max_length: int | None = None) -> Any:
        """The cache layer that a model uses here without this library; one of fixed size for ``max_length`` tokens."""
        if self.layer_type == _CROSS_ATTENTION:
            return CrossAttentionLayer()
        return make_layer(self.layer_type, self.options, max_length)


def layers_of(config: PreTrainedConfig) -> list[LayerPlan]:
    """The layers of a model with this (text) ``config``, in order."""
    types, options = layer_types(config)
    # transformers counts the layers that attend to an image among those that attend to the text.
    crossing = getattr(config, "cross_attention_layers", None) or ()
    types = [_CROSS_ATTENTION if number in crossing else kind for number, kind in enumerate(types)]
    # An early-exit model has only the first layers, but may have the whole list of types.
    return [LayerPlan(*plan) for plan in zip(types, options, layer_configs(config), strict=False)]
