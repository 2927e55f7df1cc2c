"""transformers' own ``QuantizedCache`` as a peer: its best settings, any prompt length, and its bytes counted."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    HQQQuantizedLayer,
    QuantizedCache,
    QuantizedLayer,
    QuantoQuantizedLayer,
)

from unsloth_spectral.cache.stats import CacheStats, LayerStats
from unsloth_spectral.codec.tensors import storage_bytes
from unsloth_spectral.errors import InvalidArgumentError, UnsupportedModelError
from unsloth_spectral.integrations.huggingface.private_api import (
    dequantize_by_hqq,
    layer_types,
    quantize_by_hqq,
    quantize_by_quanto,
    quantized_states,
)

GROUP_SIZE = 64
RESIDUAL_LENGTH = 64
NBITS = {"quanto": (2, 4), "hqq": (1, 2, 3, 4, 8)}


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A backend's stored keys or values ``[B, H, tokens, head_dim]``: ``tensors``, and ``payload`` to decode them.

    ``shape`` and ``dtype`` are those of the tokens, without the filling of the last groups.
    """

    payload: Any
    tensors: tuple[Tensor, ...]
    shape: torch.Size
    dtype: torch.dtype

    def __deepcopy__(self, memo: dict[int, Any]) -> "Stored":
        # Quantized states are replaced and never changed; and quanto's tensors can't be deep-copied under torch 2.13.
        return self


class CountedLayer(QuantizedLayer):
    """A backend's layer that takes any number of tokens, keeps its metadata in float16 and counts its bytes.

    The backend itself refuses lengths that its groups don't divide, and keeps metadata in the model's dtype, which on a
    float32 model would charge it double.
    """

    backend: str
    channel_axis: int  # the value of ``axis`` that groups the tokens of one channel
    groups_at_once: int  # groups that the backend packs together; it loses groups if there are fewer

    def _quantize(self, tensor: Tensor, axis: int = 0) -> Stored:
        # Each head's tokens are filled up to whole groups, so that no group spans two heads.
        unit = self.q_group_size
        if axis != self.channel_axis:  # a group covers the channels of a few tokens, or a part of one token's
            unit *= self.groups_at_once
            unit //= math.gcd(unit, tensor.shape[-1])
        missing = -tensor.shape[-2] % unit
        filled = torch.cat([tensor, tensor[..., -1:, :].expand(-1, -1, missing, -1)], dim=-2)
        payload, tensors = self._encode(filled, axis)
        return Stored(payload, tensors, tensor.shape, tensor.dtype)

    def _dequantize(self, stored: Stored) -> Tensor:
        *outer, num_tokens, head_dim = stored.shape
        filled = self._decode(stored.payload).reshape(*outer, -1, head_dim)
        return filled[..., :num_tokens, :].to(stored.dtype)

    def _encode(self, filled: Tensor, axis: int) -> tuple[Any, tuple[Tensor, ...]]:
        raise NotImplementedError

    def _decode(self, payload: Any) -> Tensor:
        raise NotImplementedError

    def stats(self) -> LayerStats:
        """Bytes of the tensors held, metadata and filling included."""
        keys: Stored | None
        values: Stored | None
        keys, values = quantized_states(self)
        if keys is None or values is None:
            return LayerStats(kind=self.backend, num_tokens=0)
        residual = [tensor for tensor in (self.keys, self.values) if tensor is not None]
        num_tokens, cold_tokens = self.get_seq_length(), keys.shape[-2]
        per_token = (keys.shape.numel() + values.shape.numel()) // cold_tokens
        return LayerStats(
            kind=self.backend,
            num_tokens=num_tokens,
            sealed_tokens=cold_tokens,
            cold_bytes=storage_bytes(*keys.tensors, *values.tensors),
            residual_bytes=storage_bytes(*residual),
            dense_bytes=num_tokens * per_token * keys.dtype.itemsize,
            elements=num_tokens * per_token,
            cold_elements=cold_tokens * per_token,
        )


class QuantoLayer(CountedLayer, QuantoQuantizedLayer):
    """Keys by channel and values by token, as in KIVI: the best of quanto's four settings at 2 and at 4 bits."""

    backend = "quanto"
    channel_axis = -1
    groups_at_once = 1

    def __init__(self, nbits: int) -> None:
        QuantoQuantizedLayer.__init__(
            self, nbits, axis_key=-1, axis_value=0, q_group_size=GROUP_SIZE, residual_length=RESIDUAL_LENGTH
        )

    def _encode(self, filled: Tensor, axis: int) -> tuple[Any, tuple[Tensor, ...]]:
        half = filled.half() if filled.dtype == torch.float32 else filled
        payload = quantize_by_quanto(self, half, axis)
        return payload, (payload._data._data, payload._scale, payload._shift)

    def _decode(self, payload: Any) -> Tensor:
        # The same as `payload.dequantize()`, but without the extension that quanto compiles on first use, which needs
        # a compiler and a minute; and in float32, because float16 would round the result once more.
        packed, rows = payload._data._data, payload._data.shape[0]
        codes = torch.cat([packed >> shift & 2**self.nbits - 1 for shift in range(0, 8, self.nbits)])[:rows]
        decoded = codes * payload._scale.float() - payload._shift.float()
        if payload.axis == 0:
            return decoded  # [groups, group size], in the order of the tensor
        return decoded.view(self.q_group_size, payload.shape[-1], -1).permute(2, 0, 1)


class HQQLayer(CountedLayer, HQQQuantizedLayer):
    """Half-quadratic quantization: values by token, and keys by token too from 3 bits on, by channel below.

    These are the best of hqq's settings at each number of bits, measured on SmolLM2. By channel, hqq groups tokens that
    lie far apart, partly of other heads, so it gains less than KIVI with its groups of neighbours.
    """

    backend = "hqq"
    channel_axis = 0
    groups_at_once = 8

    def __init__(self, nbits: int) -> None:
        axis_key = 1 if nbits >= 3 else 0
        HQQQuantizedLayer.__init__(
            self, nbits, axis_key=axis_key, axis_value=1, q_group_size=GROUP_SIZE, residual_length=RESIDUAL_LENGTH
        )

    def _encode(self, filled: Tensor, axis: int) -> tuple[Any, tuple[Tensor, ...]]:
        # As a matrix: hqq's unpacking of 3 bits restores only two dimensions.
        codes, meta = quantize_by_hqq(self, filled.flatten(0, -2), axis)
        meta |= {name: meta[name].half() for name in ("scale", "zero") if meta[name].dtype == torch.float32}
        return (codes, meta), (codes, meta["scale"], meta["zero"])

    def _decode(self, payload: Any) -> Tensor:
        return dequantize_by_hqq(self, payload)


class CountedQuantizedCache(QuantizedCache):
    """transformers' quantized cache, for ``model.generate(cache=cache)``.

    It has no sinks and quantizes a whole prefill, the newest tokens too; later tokens stay exact until there are
    ``RESIDUAL_LENGTH`` of them, whereupon everything is quantized anew.

    Args:
        model: a model with full-attention layers only.
        backend: ``"quanto"`` or ``"hqq"``, whose package must be installed.
        nbits: one of ``NBITS[backend]``.

    Raises:
        InvalidArgumentError: there is no such backend, or it doesn't offer ``nbits``.
        UnsupportedModelError: some layer of the model isn't a full-attention layer.
        ImportError: the backend isn't installed.
    """

    def __init__(self, model: PreTrainedModel, backend: str, nbits: int) -> None:
        if nbits not in NBITS.get(backend, ()):
            raise InvalidArgumentError(f"backend and nbits must be among {NBITS}, got {backend!r} and {nbits}")
        types, _ = layer_types(model.config.get_text_config(decoder=True))
        others = sorted(set(types) - {"full_attention"})
        if others:
            raise UnsupportedModelError(
                f"transformers' quantized cache takes models with full-attention layers only; {type(model).__name__} "
                f"has layers of type {', '.join(others)}"
            )
        layer_class = QuantoLayer if backend == "quanto" else HQQLayer
        Cache.__init__(self, layers=[layer_class(nbits) for _ in types])

    def stats(self) -> CacheStats:
        """Bytes held and bytes of a dense cache, per layer and in all."""
        return CacheStats.of([layer.stats() for layer in self.layers if isinstance(layer, CountedLayer)])
