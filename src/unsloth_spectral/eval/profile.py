"""Measure a model's profile: how much errors in each layer's keys and values matter."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.codec.spectral.allocate import Budget
from unsloth_spectral.codec.spectral.block import SpectralBlock
from unsloth_spectral.codec.spectral.codec import SpectralCodec
from unsloth_spectral.errors import UnsupportedModelError
from unsloth_spectral.eval.agreement import compare_logits
from unsloth_spectral.eval.documents import default_document, tokens_of
from unsloth_spectral.eval.progress import OnProgress
from unsloth_spectral.eval.tasks.asking import continue_on, fill
from unsloth_spectral.integrations.huggingface.cache import SpectralCache, dense_cache
from unsloth_spectral.integrations.huggingface.layers import SpectralCacheLayer
from unsloth_spectral.integrations.models import LoadedModel
from unsloth_spectral.integrations.unsloth import unpatch_unsloth_attention

# Tokens of the default document where the texts begin. The evaluation uses none of these texts.
STARTS = (5_000, 35_000, 65_000)
PREFIX, CONTINUATION = 2048, 128
# About one bit each for keys and values.
_COARSE = SpectralConfig(bits_per_element=1.2)
# As a share of the mean, so that a layer that did not matter in these texts still gets some bits.
_LEAST_SENSITIVITY = 0.02


@dataclass(frozen=True, slots=True)
class _Measured:
    """The measurements of one text, one entry per layer.

    Attributes:
        value_damages, key_damages: KL with this layer's values or keys alone quantized coarsely.
        lost: score variance that the coarse keys lose.
        variances: ``[num_components]`` variances of the keys' components, each head's in falling order.
    """

    value_damages: Tensor
    key_damages: Tensor
    lost: Tensor
    variances: Tensor


class _RecordingBudget(Budget):
    """A budget that records the variances of its allocations.

    Attributes:
        variances: by layer, ``[H, D]`` float32, of its keys' components.
    """

    def __init__(self, bits_per_element: float, num_layers: int) -> None:
        super().__init__(bits_per_element, num_layers)
        self.variances: dict[int, Tensor] = {}

    def allocate(self, layer: int, variances: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.variances[layer] = variances.float()
        return super().allocate(layer, variances, *args, **kwargs)


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
    """Quantize one layer's keys or values to about one bit, keep all else exact, and measure KL to the dense cache.

    KL is measured on ``continuation`` tokens behind a prefix, for each layer in turn. Figures are means over the texts
    that begin at tokens ``starts`` of ``document`` (None: the default one).

    Raises:
        LoadError: the document is too short.
        UnsupportedModelError: no layer keeps the whole context.
    """
    whole_text = default_document() if document is None else document
    ids = tokens_of(whole_text, loaded.tokenizer, max(starts) + prefix + continuation + 1).to(loaded.model.device)
    measured = []
    for number, start in enumerate(starts):
        text_ids = ids[:, start : start + prefix + continuation + 1]
        measured.append(_measure(loaded, text_ids, prefix, number, len(starts), on_progress))
    values = torch.stack([text.value_damages for text in measured]).mean(0)
    lost = torch.stack([text.lost for text in measured]).sum(0)
    keys = torch.stack([text.key_damages for text in measured]).sum(0) / lost
    keys = keys.clamp_min(_LEAST_SENSITIVITY * float(keys.mean())).clamp_min(torch.finfo(keys.dtype).tiny)
    variances = torch.stack([text.variances for text in measured]).mean(0)
    return ModelProfile(tuple(values.tolist()), tuple(keys.tolist()), tuple(map(tuple, variances.tolist())))


def _measure(
    loaded: LoadedModel, ids: Tensor, prefix: int, number: int, count: int, on_progress: OnProgress | None
) -> _Measured:
    model = loaded.model
    context, continuation, targets = ids[:, :prefix], ids[:, prefix:-1], ids[0, prefix + 1 :]
    coarse = SpectralCache(model, config=_COARSE, use_profile=False)
    assert isinstance(coarse.codec, SpectralCodec)
    plain_budget = coarse.codec.budget
    budget = coarse.codec.budget = _RecordingBudget(plain_budget.bits_per_element, plain_budget.num_layers)
    fill(loaded, coarse, context, "profile: coarse prefill", None)
    unpatch_unsloth_attention(model)
    layers = [index for index, layer in enumerate(coarse.layers) if isinstance(layer, SpectralCacheLayer)]
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no layer that keeps the whole context: nothing to measure"
        )
    cache: Any = dense_cache(model)
    fill(loaded, cache, context, "profile: dense prefill", None)
    dense = continue_on(loaded, _with(model, cache), continuation)
    damages: dict[str, list[float]] = {"values": [], "keys": []}
    lost, variances = [], []
    for done, index in enumerate(layers):
        layer: Any = coarse.layers[index]
        layer_variances = budget.variances[done].cpu()
        errors = [block.keys.relative_error for block in layer.spectral.blocks if isinstance(block, SpectralBlock)]
        lost.append(float((errors[0].float().square().mean(0) * layer_variances.sum(-1)).sum()))
        variances.append(layer_variances.flatten())
        rebuilt = dict(zip(("keys", "values"), layer.spectral.reconstruct(), strict=True))
        for step, name in enumerate(damages):
            logits = continue_on(loaded, _with(model, cache, index, **{name: rebuilt[name]}), continuation)
            damages[name].append(max(0.0, compare_logits(dense, logits, targets).kl))
            if on_progress is not None:
                steps = 2 * len(layers)
                on_progress("profile: each layer at one bit", number * steps + 2 * done + step + 1, count * steps)
    by_layer = torch.tensor([damages["values"], damages["keys"], lost], dtype=torch.float32, device="cpu")
    value_damages, key_damages, lost_variances = by_layer
    return _Measured(value_damages, key_damages, lost_variances, torch.stack(variances))


def _with(model: Any, cache: Any, coarse: int = -1, **replaced: Tensor) -> Any:
    """A copy of ``cache`` with keys or values of layer ``coarse`` replaced; the tensors of the others are shared."""
    fresh: Any = dense_cache(model)
    for index, (old, new) in enumerate(zip(cache.layers, fresh.layers, strict=True)):
        states = {"keys": old.keys, "values": old.values} | (replaced if index == coarse else {})
        new.update(states["keys"], states["values"])
    return fresh
