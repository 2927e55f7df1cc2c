"""Which layers of a model are spectral, and that ``stats`` says so."""

import pytest
import torch
from families.lossless import LOSSLESS, dense_cache, token_ids
from families.models import FAMILIES, build

from unsloth_spectral import SpectralCache
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument

WINDOW, STATE, NONE = "DynamicSlidingWindowLayer", "LinearAttentionLayer", "DummyLayer"
SPECTRAL = "spectral"
# Every other served family is spectral throughout.
HYBRIDS = {
    "Qwen3-Next": [STATE, SPECTRAL],
    "Gemma 2": [WINDOW, SPECTRAL] * 2,
    "Gemma 3": [WINDOW, SPECTRAL] * 2,
    "Gemma 4": [WINDOW, SPECTRAL] * 2,
    # The last two layers attend to the keys of those before them.
    "Gemma 4, shared keys": [WINDOW, SPECTRAL, WINDOW, SPECTRAL, NONE, NONE],
    "gpt-oss": [WINDOW, SPECTRAL] * 2,
    "Cohere 2": [WINDOW, SPECTRAL] * 2,
    "Llama 4": [WINDOW, SPECTRAL] * 2,  # chunked attention, to a cache a window
    "LFM2": [STATE, SPECTRAL],
    "Bamba": [STATE, SPECTRAL],
    "EXAONE 4": [WINDOW, SPECTRAL] * 2,
}


@pytest.mark.parametrize("family", [family for family, row in FAMILIES.items() if row.refusal is None])
@torch.no_grad()
def test_only_full_attention_is_spectral_and_stats_say_so(family: str) -> None:
    model = build(family)
    spectral, dense = SpectralCache(model, config=LOSSLESS), dense_cache(model)
    for past in (spectral, dense):
        model(token_ids(2, 90), **cache_argument(past))
    layers = spectral.stats().layers
    expected = HYBRIDS.get(family, [SPECTRAL] * len(layers))
    if len(dense.layers) < len(expected):  # the first supported releases leave out layers that hold nothing
        expected = [kind for kind in expected if kind != NONE]
    assert [layer.kind for layer in layers] == expected
    for stats, spectral_layer, dense_layer in zip(layers, spectral.layers, dense.layers, strict=True):
        if stats.kind == SPECTRAL:
            assert stats.sealed_tokens >= 64
            assert stats.dense_bytes == 90 * 2 * _bytes_a_token(dense_layer)
        else:
            assert type(spectral_layer) is type(dense_layer)
            assert stats.sealed_tokens == 0
            assert stats.stored_bytes == stats.dense_bytes
            assert (stats.stored_bytes > 0) == (stats.kind != NONE)


def _bytes_a_token(layer: torch.nn.Module) -> int:
    return sum(tensor[0, :, 0].numel() * tensor.element_size() for tensor in (layer.keys, layer.values))
