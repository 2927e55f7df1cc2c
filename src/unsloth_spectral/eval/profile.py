"""Measuring a model once: how much each layer's values matter."""

from typing import Any

import torch
from torch import Tensor

from unsloth_spectral.codec import values as value_codec
from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.errors import UnsupportedModelError
from unsloth_spectral.eval.documents import default_document, tokens_of
from unsloth_spectral.eval.fidelity import compare_logits
from unsloth_spectral.eval.progress import OnProgress
from unsloth_spectral.integrations.huggingface.cache import dense_cache
from unsloth_spectral.integrations.models import LoadedModel
from unsloth_spectral.integrations.unsloth import unpatch_unsloth_attention

# Where the texts begin in the default document, in tokens: none of them is one that the evaluation uses.
STARTS = (5_000, 35_000, 65_000)
PREFIX, CONTINUATION = 2048, 128


@torch.inference_mode()
def measure_profile(
    loaded: LoadedModel,
    *,
    document: str | None = None,
    starts: tuple[int, ...] = STARTS,
    prefix: int = PREFIX,
    continuation: int = CONTINUATION,
    on_progress: OnProgress | None = None,
) -> ModelProfile:
    """KL to the dense cache with one layer's values at one bit and all else exact, for every full-attention layer.

    The mean over the texts that begin at tokens ``starts`` of ``document`` (the default one if None): ``continuation``
    tokens after a prefix.

    Raises:
        LoadError: the document is too short.
        UnsupportedModelError: no layer keeps the whole context.
    """
    text = default_document() if document is None else document
    ids = tokens_of(text, loaded.tokenizer, max(starts) + prefix + continuation + 1).to(loaded.model.device)
    unpatch_unsloth_attention(loaded.model)
    total: Tensor | None = None
    for number, start in enumerate(starts):
        part = ids[:, start : start + prefix + continuation + 1]
        found = torch.tensor(_sensitivities(loaded.model, part, prefix, number, len(starts), on_progress))
        total = found if total is None else total + found
    assert total is not None
    return ModelProfile(tuple((total / len(starts)).tolist()))


def _sensitivities(
    model: Any, ids: Tensor, prefix: int, number: int, count: int, on_progress: OnProgress | None
) -> list[float]:
    cache: Any = dense_cache(model)
    model(input_ids=ids[:, :prefix], past_key_values=cache, use_cache=True, logits_to_keep=1)
    layers = [
        index for index, layer in enumerate(cache.layers) if getattr(layer, "keys", None) is not None
        and layer.keys.ndim == 4 and layer.keys.shape[-2] == prefix
    ]  # fmt: skip
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no layer that keeps the whole context: nothing to measure"
        )
    dense = _logits(model, ids, prefix, _with(model, cache, -1))
    damages = []
    for done, index in enumerate(layers, 1):
        logits = _logits(model, ids, prefix, _with(model, cache, index))
        damages.append(max(0.0, compare_logits(dense, logits, ids[0, prefix + 1 :]).kl))
        if on_progress is not None:
            on_progress("profile: each layer's values at one bit", number * len(layers) + done, count * len(layers))
    return damages


def _with(model: Any, cache: Any, coarse: int) -> Any:
    """A copy of ``cache`` with the values of layer ``coarse`` at one bit; the tensors of the others are shared."""
    options = SpectralConfig()
    fresh: Any = dense_cache(model)
    for index, (old, new) in enumerate(zip(cache.layers, fresh.layers, strict=True)):
        values = old.values
        if index == coarse:
            first = options.num_sink_tokens
            cold = slice(first, first + (values.shape[-2] - first - options.residual_length) // 8 * 8)
            values = values.clone()
            values[..., cold, :] = value_codec.encode(values[..., cold, :], 1).reconstruct().to(values.dtype)
        new.update(old.keys, values)
    return fresh


def _logits(model: Any, ids: Tensor, prefix: int, cache: Any) -> Tensor:
    logits: Tensor = model(input_ids=ids[:, prefix:-1], past_key_values=cache).logits[0]
    return logits
