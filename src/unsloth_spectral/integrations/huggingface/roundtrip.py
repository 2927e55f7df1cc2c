"""A dense transformers ``Cache`` whose old tokens have been encoded and decoded, which simulates a peer."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from unsloth_spectral.cache.stats import CacheStats, LayerStats
from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.integrations.huggingface.layer_plans import layers_of
from unsloth_spectral.integrations.huggingface.layers import layer_stats

# From keys and values ``[B, H, tokens, head_dim]`` to decoded ones of the same shapes, and the bits of both.
Codec: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, int]]


class RoundTripLayer(DynamicLayer):
    """One layer: exact sinks, then decoded tokens, then the exact newest tokens.

    ``keys`` and ``values`` are plain tensors ``[B, H, num_tokens, head_dim]``. Tokens ``num_sink_tokens`` to
    ``sealed_end`` have been replaced, each once.
    """

    def __init__(self, codec: Codec, num_sink_tokens: int, residual_length: int, group: int) -> None:
        super().__init__()
        self.codec = codec
        self.num_sink_tokens = num_sink_tokens
        self.residual_length = residual_length
        self.group = group
        self.sealed_end = num_sink_tokens
        self.num_bits = 0

    @property
    def sealed_tokens(self) -> int:
        return self.sealed_end - self.num_sink_tokens

    def __deepcopy__(self, memo: dict[int, Any]) -> "RoundTripLayer":
        # The copy shares the codec, which has no state but may have large tables; and the tensors, since every change
        # makes new ones.
        copied = type(self).__new__(type(self))
        copied.__dict__.update(vars(self))
        return copied

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the new tokens and return all tokens, the new ones exact; tokens that became old are replaced
        afterwards."""
        keys, values = super().update(key_states, value_states)
        self._seal()
        return keys, values

    def _seal(self) -> None:
        count = self.get_seq_length() - self.sealed_end - self.residual_length
        if count < self.group:
            return
        start = self.sealed_end
        stop = start + count - count % self.group
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        # Clones: the codec sees only the tokens it encodes, and cannot write to tensors that the model reads.
        keys_hat, values_hat, num_bits = self.codec(
            keys[..., start:stop, :].clone(), values[..., start:stop, :].clone()
        )
        self.keys = torch.cat([keys[..., :start, :], keys_hat.to(keys), keys[..., stop:, :]], dim=-2)
        self.values = torch.cat([values[..., :start, :], values_hat.to(values), values[..., stop:, :]], dim=-2)
        self.sealed_end = stop
        self.num_bits += num_bits

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest ``-tokens_to_remove`` tokens.

        Raises:
            InvalidArgumentError: the number is positive, or reaches into tokens that have been replaced.
        """
        removable = self.get_seq_length() - (self.sealed_end if self.sealed_tokens else 0)
        if tokens_to_remove > 0 or -tokens_to_remove > removable:
            raise InvalidArgumentError(
                "crop takes the number of tokens to remove as zero or a negative number, of which the newest "
                f"{removable} are not encoded yet and can be removed, got {tokens_to_remove}"
            )
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.sealed_end, self.num_bits = self.num_sink_tokens, 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.num_bits *= repeats

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.keys is not None:
            selected = torch.arange(self.keys.shape[0], dtype=torch.int64, device=indices.device)[indices]
            self.num_bits = self.num_bits * len(selected) // self.keys.shape[0]
        super().batch_select_indices(indices)

    def stats(self) -> LayerStats:
        """Bytes as they would be stored: sealed tokens as the codec counts them, others in the cache's dtype."""
        num_tokens = self.get_seq_length()
        if self.keys is None or self.values is None or not num_tokens:
            return LayerStats(kind="round trip", num_tokens=0)
        sinks = min(self.num_sink_tokens, num_tokens)
        elements = (self.keys.numel() + self.values.numel()) // num_tokens
        nbytes = elements * self.keys.element_size()
        return LayerStats(
            kind="round trip",
            num_tokens=num_tokens,
            sealed_tokens=self.sealed_tokens,
            sink_bytes=sinks * nbytes,
            cold_bytes=-(-self.num_bits // 8),
            residual_bytes=(num_tokens - sinks - self.sealed_tokens) * nbytes,
            dense_bytes=num_tokens * nbytes,
            elements=num_tokens * elements,
            cold_elements=self.sealed_tokens * elements,
        )


class RoundTripCache(Cache):
    """A cache that gives the results of a codec's cache, for ``model.generate(cache=cache)``.

    It uses a dense cache's memory and the model's own attention. It measures the codec's effect on the model, and the
    bits that the codec would take. Full-attention layers keep the sinks and the newest ``residual_length`` to
    ``residual_length + group`` tokens exact. A pass over new tokens sees them exact, a whole prefill too; older tokens
    are encoded after it, in multiples of ``group`` and each once. Other layers are transformers' own. Left padding
    counts as text and takes the place of the sinks.

    Args:
        model: any transformers model whose cache has full-attention layers; it is not changed.
        codec: a stateless function from keys and values ``[B, H, tokens, head_dim]`` to decoded ones and their bits.
        num_sink_tokens: first tokens kept exact.
        residual_length: newest tokens kept exact.
        group: tokens are encoded in multiples of it.

    Raises:
        InvalidArgumentError: a number is out of its range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        codec: Codec,
        num_sink_tokens: int = 4,
        residual_length: int = 64,
        group: int = 32,
    ) -> None:
        for name, value, least in (
            ("num_sink_tokens", num_sink_tokens, 0),
            ("residual_length", residual_length, 0),
            ("group", group, 1),
        ):
            if value < least:
                raise InvalidArgumentError(f"{name} must be at least {least}, got {value}")
        layers = [
            RoundTripLayer(codec, num_sink_tokens, residual_length, group)
            if plan.layer_type == "full_attention"
            else plan.transformers_layer()
            for plan in layers_of(model.config.get_text_config(decoder=True))
        ]
        super().__init__(layers=layers)

    def stats(self) -> CacheStats:
        """Bytes as they would be stored and bytes of a dense cache, per layer and in all."""
        return CacheStats.of(
            [layer.stats() if isinstance(layer, RoundTripLayer) else layer_stats(layer) for layer in self.layers]
        )
