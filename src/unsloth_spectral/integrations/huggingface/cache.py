"""A transformers ``Cache`` whose full-attention layers are spectral."""

import logging
from typing import Any
from weakref import WeakSet

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import (
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
from unsloth_spectral.errors import InvalidArgumentError, SpectralError
from unsloth_spectral.integrations.huggingface.fingerprint import profile_of
from unsloth_spectral.integrations.huggingface.handle import CompressedStates
from unsloth_spectral.integrations.huggingface.support import check_model, why_materialised
from unsloth_spectral.integrations.huggingface.switch import enable
from unsloth_spectral.integrations.options import config_of

logger = logging.getLogger("unsloth_spectral")
_told: WeakSet[PreTrainedModel] = WeakSet()


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


class MaterialisingCacheLayer(SpectralCacheLayer):
    """For models that compute with their keys and values: stored compressed, handed out dense.

    The attention is the model's own, so nothing is known of its mask, queries and positions: padding is taken for
    tokens like any other, and keys are compressed as they come.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take the new tokens ``(batch, num_key_value_heads, seq_len, head_dim)``; returns all, sealed ones rebuilt."""
        super().update(key_states, value_states)
        dense = self.spectral.reconstruct()
        if not self.record_past:
            self.spectral.seal()
        return dense


class SpectralCache(Cache):
    """A KV cache that stores old tokens as spectral factors, for ``model.generate(past_key_values=cache)``.

    Full-attention layers are spectral; sliding, chunked, linear and state layers keep their native cache. Making one
    also gives the model the attention function that reads it (``unpatch_unsloth_attention(model)`` takes it back);
    that function treats every other cache as before.

    A model that computes with its keys and values itself, outside transformers' AttentionInterface or before it
    (multi-head latent attention, DiffLlama, Falcon, GPT-J, BLOOM, MPT), gets them rebuilt at every step, one layer at a
    time: memory falls, decoding gets no faster. A warning says so, once a model.

    Args:
        model: a decoder-only transformers model.
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
        self.config = config_of(config, preset=preset)
        check_model(model, self.config)
        enable(model)
        text_config = model.config.get_text_config(decoder=True)
        layer_types, native = get_layer_types_and_kwargs(text_config)[0], DynamicCache(config=text_config).layers
        num_layers = layer_types[: len(native)].count("full_attention")
        profile = profile_of(model, num_layers) if use_profile and self.config.codec == "spectral" else None
        sealers = iter(make_sealers(self.config, num_layers, profile))
        reason = why_materialised(model)
        if reason is not None:
            _tell_once(model, reason)
        kind = SpectralCacheLayer if reason is None else MaterialisingCacheLayer
        # An early exit makes a model of the first layers; its list of types may go on.
        layers = [
            kind(self.config, next(sealers)) if layer_type == "full_attention" else layer
            for layer_type, layer in zip(layer_types, native, strict=False)
        ]
        super().__init__(layers=layers)
        self._spectral = [layer for layer in layers if isinstance(layer, SpectralCacheLayer)]
        self._first = layers.index(self._spectral[0])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Take a layer's new tokens; the first spectral layer's begin a forward pass.

        Raises:
            SpectralError: the last pass was interrupted, and layers of other kinds cannot take its tokens back.
        """
        if layer_idx == self._first:
            self._take_back()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that all spectral layers hold: what an interrupted pass left in some of them does not count."""
        return min(super().get_seq_length(layer_idx), self._shortest)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if layer_idx < len(self.layers) and isinstance(self.layers[layer_idx], SpectralCacheLayer):
            return self._shortest + query_length, 0
        return super().get_mask_sizes(query_length, layer_idx)

    @property
    def _shortest(self) -> int:
        return min(layer.spectral.num_tokens for layer in self._spectral)

    def _take_back(self) -> None:
        """Cut all layers to one length: a forward pass that was interrupted left its tokens in the first ones alone."""
        shortest = self._shortest
        if all(layer.spectral.num_tokens == shortest for layer in self._spectral):
            return
        others = {type(layer).__name__ for layer in self.layers} - {SpectralCacheLayer.__name__, "DummyLayer"}
        if others:
            raise SpectralError(
                f"the last forward pass was interrupted, and {', '.join(sorted(others))} in this cache "
                "cannot take its tokens back: call cache.reset() and start again from the whole prompt"
            )
        for layer in self._spectral:
            layer.spectral.crop(shortest)

    def stats(self) -> CacheStats:
        """Bytes stored and bytes a dense cache would take, the factor between them, and the same per layer."""
        return CacheStats.of([layer_stats(layer) for layer in self.layers])


def _tell_once(model: PreTrainedModel, reason: str) -> None:
    if model not in _told:
        _told.add(model)
        logger.warning(
            "%s %s: its keys and values are stored compressed and rebuilt at every step, so memory falls but decoding "
            "gets slower, not faster",
            type(model).__name__,
            reason,
        )


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
