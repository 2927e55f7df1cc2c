"""The layers of a spectral cache in the shape transformers expects."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from unsloth_spectral.attention import steps
from unsloth_spectral.attention.cpu import directory_of
from unsloth_spectral.cache.layer import SpectralLayer
from unsloth_spectral.cache.layer_stats import SharedBytes
from unsloth_spectral.cache.stats import LayerStats
from unsloth_spectral.cache.step_buffers import StepBuffers
from unsloth_spectral.codec.codec import CodecConfig, LayerCodec
from unsloth_spectral.codec.tensors import storage_bytes
from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.fields import Field, Fields
from unsloth_spectral.integrations.huggingface.attention_call import AttentionCall
from unsloth_spectral.integrations.huggingface.handle import CompressedStates, ModelReference
from unsloth_spectral.integrations.huggingface.layer_plans import CrossAttentionLayer
from unsloth_spectral.integrations.huggingface.transformers_layers import (
    restore_transformers_layer,
    transformers_layer_to_fields,
)


class SpectralCacheLayer(CacheLayerMixin):
    """A ``SpectralLayer`` in the shape transformers expects of a layer.

    Args:
        config: the options of the cache.
        codec: seals this layer's tokens.
        model: the model that the cache is made for, for error messages; None for a layer without a model.
        max_length: the most tokens, for a layer whose steps can be compiled; None for one that grows without limit.

    Attributes:
        call: the attention module's call that will bring the next tokens, between its pre-hook and ``update``.
    """

    is_sliding = False
    is_croppable = True

    def __init__(
        self,
        config: CodecConfig,
        codec: LayerCodec,
        model: ModelReference | None = None,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        self.step = None if max_length is None else StepBuffers(directory_of, max_length)
        self.spectral = SpectralLayer(config, codec, self.step)
        self.model, self.max_length = model, max_length
        self.is_compileable = max_length is not None
        self.call: AttentionCall | None = None
        self.record_past = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._initialize(key_states.dtype, key_states.device)

    def _initialize(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device, self.is_initialized = dtype, device, True
        # Code that reads these instead of calling attention gets an error with the reason.
        self.keys: Any = CompressedStates(self.spectral, seal_after=False)
        self.values: Any = self.keys

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Append the new tokens ``(batch, num_key_value_heads, seq_len, head_dim)``; returns two handles."""
        step = self.step
        if step is not None and self.is_ready_for(key_states.shape[2]) and len(key_states) == len(step.keys):
            self.call = None
            steps.append(step.keys, step.values, step.counts, key_states.detach(), value_states.detach())
            handle = CompressedStates(self.spectral, not self.record_past, self.model, None, step)
            return handle, handle
        return self._update(key_states, value_states)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _update(self, key_states: Tensor, value_states: Tensor) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.spectral.append(key_states, value_states)
        handle = CompressedStates(self.spectral, not self.record_past, self.model, self.call)
        self.call = None
        return handle, handle

    def is_ready_for(self, query_length: int) -> bool:
        """True if a pass with so many new tokens can be a compiled step."""
        # A pass that may be taken back in part is never sealed by itself, and the ring would overflow.
        return query_length == 1 and self.step is not None and self.step.is_ready and not self.record_past

    def get_seq_length(self) -> Any:
        if torch.compiler.is_compiling() and self.step is not None and self.step.is_ready:
            return self.step.counts[1]
        return self.spectral.num_tokens

    def get_max_length(self) -> int:
        return -1 if self.max_length is None else self.max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.max_length is not None and self.is_ready_for(query_length):
            return self.max_length, 0
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        self.spectral.reset()
        self.is_initialized, self.call = False, None

    def activate_past_recording(self) -> None:
        """Delay sealing until ``crop``: assisted decoding removes rejected tokens after each step."""
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

    def seal(self) -> None:
        """Seal what is due, unless ``crop`` will."""
        if not self.record_past:
            self.spectral.seal()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.spectral.map_batch(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.spectral.map_batch(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def to_fields(self) -> Field:
        """The stored form of this layer; None where it is empty."""
        return None if self.spectral.is_empty else {"record_past": self.record_past, **self.spectral.to_fields()}

    def restore(self, fields: Fields, device: torch.device) -> None:
        """Fill this layer from its stored form, with tensors on ``device``.

        Raises:
            LoadError: a field is missing, or does not fit the others.
        """
        self.record_past = fields.flag("record_past")
        self.spectral.restore(fields)
        self._initialize(fields.sub("tokens").dtype("dtype"), device)


class MaterialisingCacheLayer(SpectralCacheLayer):
    """A layer for models that compute with their keys and values: it stores them compressed and returns them dense.

    The model uses its own attention, so its mask, queries and positions are unknown: padding counts as text, and keys
    are compressed rotated.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Append the new tokens ``(batch, num_key_value_heads, seq_len, head_dim)``; returns all, sealed ones
        rebuilt."""
        self._update(key_states, value_states)
        dense = self.spectral.reconstruct()
        self.seal()
        return dense


def layer_stats(layer: Any, shared: SharedBytes | None = None) -> LayerStats:
    """Statistics of a spectral layer or of one of transformers' own, without the bytes already in ``shared``."""
    if isinstance(layer, SpectralCacheLayer):
        return layer.spectral.stats(shared)
    # A layer keeps keys and values as attributes, and convolution and recurrent states in dictionaries.
    # The keys and values of an image are no tokens of the text.
    holds_text = isinstance(layer, CacheLayerMixin) and not isinstance(layer, CrossAttentionLayer)
    attributes = list(vars(layer).values())
    states = [list(value.values()) if isinstance(value, dict) else [value] for value in attributes]
    values = [value for group in states for value in group]
    tensors = [tensor for tensor in values if isinstance(tensor, Tensor) and tensor.numel() > 1]
    nbytes = storage_bytes(*tensors)
    return LayerStats(
        kind=type(layer).__name__,
        num_tokens=int(layer.get_seq_length()) if holds_text else 0,
        residual_bytes=nbytes,
        room_bytes=_room(layer) if holds_text and layer.is_compileable else 0,
        dense_bytes=nbytes,
        elements=sum(tensor.numel() for tensor in tensors),
    )


def _room(layer: Any) -> int:
    """Bytes that a layer of fixed size has for tokens still to come."""
    capacity = layer.keys.shape[-2] if layer.is_initialized else 0
    unused = max(0, capacity - int(layer.get_seq_length()))
    return unused * (layer.keys.nbytes + layer.values.nbytes) // capacity if capacity else 0


def layer_to_fields(layer: Any) -> dict[str, Field]:
    """The stored form of a spectral layer or of one of transformers' own.

    Raises:
        SpectralError: a layer of transformers' own has contents that cannot be stored.
    """
    contents = layer.to_fields() if isinstance(layer, SpectralCacheLayer) else transformers_layer_to_fields(layer)
    return {"kind": type(layer).__name__, "held": contents}


def restore_layer(layer: Any, fields: Fields, device: torch.device) -> None:
    """Fill the empty ``layer`` from its stored form, with tensors on ``device``.

    Raises:
        LoadError: the stored layer is of another kind, or a field does not fit the others.
    """
    kind = type(layer).__name__
    fields.require(fields.text("kind") == kind, f"a layer of kind {kind}, not {fields.text('kind')}")
    if not fields.has("held"):
        return
    contents = fields.sub("held").on(device)
    if isinstance(layer, SpectralCacheLayer):
        layer.restore(contents, device)
    else:
        restore_transformers_layer(layer, contents, device)
