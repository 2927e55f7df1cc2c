"""The dense cache and this library's own codecs, as methods of the evaluation."""

import math
from functools import partial
from typing import Any

from unsloth_spectral.codec.codec import CodecConfig
from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.codec.registry import codecs
from unsloth_spectral.codec.tensors import storage_bytes
from unsloth_spectral.eval.methods.base import DENSE, Footprint, Method
from unsloth_spectral.integrations.huggingface import SpectralCache
from unsloth_spectral.integrations.huggingface.cache import dense_cache


def spectral_methods() -> dict[str, Method]:
    """By name: ``dense``; ``rank 16/32`` ...; ``spectral balanced`` ..."""
    methods = [Method(DENSE, DENSE, dense_cache, _dense_footprint)]
    for codec in codecs():
        for family, configs in codec.compared.items():
            methods += [_method(config.title, family, config) for config in configs]
    for preset in ("balanced", "small"):
        make = partial(_make, SpectralConfig(preset=preset), use_profile=False)
        name = f"spectral {preset} without profile"
        methods.append(Method(name, "spectral without profile", make, Footprint.counted, bits_by_layer))
    return {method.name: method for method in methods}


def _method(name: str, family: str, config: CodecConfig) -> Method:
    return Method(name, family, partial(_make, config), Footprint.counted, bits_by_layer)


def _make(config: CodecConfig, model: Any, use_profile: bool = True) -> SpectralCache:
    return SpectralCache(model, config=config, use_profile=use_profile)


def bits_by_layer(cache: SpectralCache) -> dict[str, list[float]]:
    """``bits_keys`` and ``bits_values`` of every layer, NaN where a layer has sealed nothing with the spectral codec.

    A row is left out where no layer has a number.
    """
    layers = cache.stats().layers
    rows = {name: [getattr(layer, name) for layer in layers] for name in ("bits_keys", "bits_values")}
    return {
        name: [math.nan if bits is None else bits for bits in row]
        for name, row in rows.items()
        if any(bits is not None for bits in row)
    }


def _dense_footprint(cache: Any) -> Footprint:
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    nbytes = storage_bytes(*tensors)
    return Footprint(nbytes, nbytes, None)
