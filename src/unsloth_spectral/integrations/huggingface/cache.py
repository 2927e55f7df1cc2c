"""A transformers ``Cache`` whose full-attention layers are spectral."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DynamicCache,
    get_layer_types_and_kwargs,
)

from unsloth_spectral.cache.layer import SpectralLayer
from unsloth_spectral.cache.stats import CacheStats, LayerStats
from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.codec.sealer import Sealer, make_sealers
from unsloth_spectral.codec.tensors import storage_bytes
from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.integrations.huggingface.fingerprint import profile_of
from unsloth_spectral.integrations.huggingface.handle import CompressedStates
from unsloth_spectral.integrations.huggingface.support import check_model
from unsloth_spectral.integrations.huggingface.switch import enable


class SpectralCacheLayer(CacheLayerMixin):
    """A ``SpectralLayer`` in the shape transformers expects of a layer."""

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, config: SpectralConfig, sealer: Sealer) -> None:
        super().__init__()
        self.spectral = SpectralLayer(config, sealer)
        self.record_past = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take the new tokens ``(batch, num_key_value_heads, seq_len, head_dim)``; returns two handles."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.spectral.append(key_states, value_states)
        handle = CompressedStates(self.spectral, seal_after=not self.record_past)
        return handle, handle

    def get_seq_length(self) -> int:
        return self.spectral.num_tokens

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        self.spectral.reset()
        self.is_initialized = False

    def activate_past_recording(self) -> None:
        """Assisted decoding takes tokens back after each step: sealing waits until ``crop`` has said which."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest ``-tokens_to_remove`` tokens.

        Raises:
            InvalidArgumentError: the number is positive.
        """
        if tokens_to_remove > 0:
            raise InvalidArgumentError(
                f"crop takes the number of tokens to remove as zero or a negative number, got {tokens_to_remove}"
            )
        self.spectral.crop(max(0, self.spectral.num_tokens + tokens_to_remove))
        self.spectral.seal()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.spectral.map_batch(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.spectral.map_batch(lambda tensor: tensor.repeat_interleave(repeats, dim=0))


class SpectralCache(Cache):
    """A KV cache that stores old tokens as spectral factors, for ``model.generate(past_key_values=cache)``.

    Full-attention layers are spectral; sliding, chunked, linear and state layers keep their native cache. Making one
    also gives the model the attention function that reads it (``unpatch_unsloth_attention(model)`` takes it back);
    that function treats every other cache as before.

    Args:
        model: a decoder-only transformers model that uses the AttentionInterface.
        preset: ``"quality"``, ``"balanced"`` (the default) or ``"small"``, in place of a ``config``.
        config: bits or ranks, block size and exact tiers.
        use_profile: whether to give values the widths that follow from the model's profile, if one was measured
            (``unsloth-spectral profile``); without one all layers get the same.

    Raises:
        UnsupportedModelError: the model cannot carry it; the message names the model and what is supported.
        InvalidArgumentError: an option is out of its range for this model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        preset: str | None = None,
        config: SpectralConfig | None = None,
        use_profile: bool = True,
    ) -> None:
        if preset is not None and config is not None:
            raise InvalidArgumentError("preset and config both say how to compress: give one of them")
        self.config = SpectralConfig(preset=preset) if config is None else config
        if not isinstance(self.config, SpectralConfig):
            raise InvalidArgumentError(
                f"config must be a SpectralConfig, got {type(config).__name__}: pass SpectralConfig(rank_keys=...)"
            )
        check_model(model, self.config)
        enable(model)
        layer_types, layer_options = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
        num_layers = layer_types.count("full_attention")
        profile = profile_of(model, num_layers) if use_profile and self.config.codec == "spectral" else None
        sealers = iter(make_sealers(self.config, num_layers, profile))
        layers = [
            SpectralCacheLayer(self.config, next(sealers))
            if layer_type == "full_attention"
            else DYNAMIC_LAYER_TYPE_MAPPING[layer_type](**options)
            for layer_type, options in zip(layer_types, layer_options, strict=True)
        ]
        super().__init__(layers=layers)

    def stats(self) -> CacheStats:
        """Bytes stored and bytes a dense cache would take, the factor between them, and the same per layer."""
        return CacheStats.of([layer_stats(layer) for layer in self.layers])


def layer_stats(layer: Any) -> LayerStats:
    """Of a spectral layer, or of one that the model keeps natively, whatever its kind."""
    if isinstance(layer, SpectralCacheLayer):
        return layer.spectral.stats()
    # Keys and values are attributes, convolution and recurrent states sit in dictionaries.
    values = [value for held in vars(layer).values() for value in (held.values() if isinstance(held, dict) else [held])]
    tensors = [tensor for tensor in values if isinstance(tensor, Tensor) and tensor.numel() > 1]
    nbytes = storage_bytes(*tensors)
    return LayerStats(
        kind=type(layer).__name__,
        num_tokens=layer.get_seq_length() if isinstance(layer, CacheLayerMixin) else 0,
        residual_bytes=nbytes,
        dense_bytes=nbytes,
        elements=sum(tensor.numel() for tensor in tensors),
    )


def dense_cache(model: PreTrainedModel) -> DynamicCache:
    """The library's own cache, to compare with."""
    return DynamicCache(config=model.config)
