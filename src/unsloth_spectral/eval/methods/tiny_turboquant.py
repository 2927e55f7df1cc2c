"""The package tiny-turboquant: from version 0.15 a KIVI quantizer, in spite of its name."""

from functools import partial
from importlib import import_module
from typing import Any

from unsloth_spectral.errors import UnsupportedModelError
from unsloth_spectral.eval.methods.base import Footprint, Method

FAMILY = "tiny-turboquant"
# Its presets: bits of keys and of values 4 and 4, 4 and 3, 3 and 3, 3 and 2.
PRESETS = ("safe", "balanced", "compact", "aggressive")


def tiny_turboquant() -> list[Method]:
    """One method per preset; the package is imported when a cache is made."""
    return [Method(f"{FAMILY} {preset}", FAMILY, partial(_make_cache, preset), _footprint) for preset in PRESETS]


def _make_cache(preset: str, model: Any) -> Any:
    """The package's own cache, with the newest 64 tokens exact as in the other methods.

    The cache has no sinks, and even a prefill's own attention sees quantized tokens.
    """
    kinds = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise UnsupportedModelError(
            f"{FAMILY} takes models with full-attention layers only; {type(model).__name__} has layers of type "
            f"{', '.join(sorted(kinds))}"
        )
    # Imported by name: the package has no types and is optional.
    base: Any = import_module("tiny_turboquant").TinyKVCache

    class TinyTurboquantCache(base):  # type: ignore[misc]
        def update(self, key_states: Any, value_states: Any, layer_idx: int, **_: Any) -> Any:
            # Since 5.24 transformers passes more than the package takes.
            return super().update(key_states, value_states, layer_idx)

    return TinyTurboquantCache.for_model(model, compression=preset, residual_len=64)


def _footprint(cache: Any) -> Footprint:
    dense_bytes = stored_bytes = cold_bytes = cold_elements = 0
    for layer in cache.layers:
        residual = layer._residual_keys
        if residual is None:
            continue
        batch, heads, _, head_dim = residual.shape
        per_token = 2 * batch * heads * head_dim
        report = layer.memory_report()
        stored_bytes += report["total_storage_bytes"]
        cold_bytes += report["compressed_storage_bytes"]
        cold_elements += layer._n_quantized * per_token
        dense_bytes += layer.get_seq_length() * per_token * residual.element_size()
    return Footprint(stored_bytes, dense_bytes, 8 * cold_bytes / cold_elements if cold_elements else None)
