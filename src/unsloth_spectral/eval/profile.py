"""Measure a model's profile: the KL divergence from errors in each layer's values and in each head's keys."""

import copy
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
from unsloth_spectral.eval.environment import environment
from unsloth_spectral.eval.head_damages import head_damages
from unsloth_spectral.eval.kinds_of_text import texts_by_kind
from unsloth_spectral.eval.model_bases import measure_bases
from unsloth_spectral.eval.progress import OnProgress
from unsloth_spectral.eval.recall_text import recall_text
from unsloth_spectral.eval.tasks.asking import continue_on, fill, ids_of, positions_of
from unsloth_spectral.integrations.huggingface.cache import SpectralCache, dense_cache
from unsloth_spectral.integrations.huggingface.layers import SpectralCacheLayer
from unsloth_spectral.integrations.models import LoadedModel
from unsloth_spectral.integrations.unsloth import unpatch_unsloth_attention
from unsloth_spectral.log import warn_once

# Tokens of the default document where the texts begin. The evaluation uses none of these texts.
STARTS = (5_000, 35_000, 65_000)
PREFIX, CONTINUATION = 2048, 128
# Texts that repeat facts, and the weight of their damages beside those of the other texts. The few heads that find far
# tokens again hardly matter in other texts.
NUM_RECALLS, RECALL_WEIGHT = 2, 0.05
# Of each text of the bases, at most.
BASIS_TOKENS = 1024
# About one bit each for keys and values.
_COARSE = SpectralConfig(bits_per_element=1.2)
# As a share of the mean, so that a head that did not matter in these texts still gets some bits.
_LEAST_SENSITIVITY = 0.002
_DRAWS = 4


@dataclass(frozen=True, slots=True)
class _Measured:
    """The measurements of texts, one entry per layer, in nats of KL to the dense cache.

    Attributes:
        value_damages: of the layer's values, quantized coarsely.
        key_damages: ``[H]`` of each head's keys, quantized coarsely.
        lost: ``[H]`` score variance that the coarse keys lose.
        variances: ``[H D]`` variances of the keys' components, each head's in falling order.
    """

    value_damages: list[Tensor]
    key_damages: list[Tensor]
    lost: list[Tensor]
    variances: list[Tensor]

    @property
    def key_sensitivities(self) -> list[Tensor]:
        """``[H]`` damage per unit of score variance; 0 for a head that loses nothing."""
        pairs = zip(self.key_damages, self.lost, strict=True)
        return [torch.where(lost > 0, damages / lost, 0.0) for damages, lost in pairs]

    @classmethod
    def mean(cls, texts: list["_Measured"]) -> "_Measured":
        columns = (zip(*(getattr(text, name) for text in texts), strict=True) for name in cls.__slots__)
        return cls(*([torch.stack(layer).mean(0) for layer in column] for column in columns))


def facts_of(loaded: LoadedModel) -> dict[str, Any]:
    """Facts about the measurement, ready for JSON, to be stored beside the profile of ``loaded``."""
    texts = {"starts": STARTS, "prefix": PREFIX, "continuation": CONTINUATION}
    recalls = {"recalls": NUM_RECALLS, "recall_weight": RECALL_WEIGHT, "basis_tokens": BASIS_TOKENS}
    return {"model": loaded.name, "texts": {**texts, **recalls}, "environment": environment()}


class _RecordingBudget(Budget):
    """A budget that records the variances of its allocations in ``variances``, by layer, ``[H, D]`` float32 each."""

    def __init__(self, plain: Budget, variances: dict[int, Tensor]) -> None:
        super().__init__(plain.bits_per_element, plain.num_layers)
        self.variances = variances

    def allocate(self, layer: int, variances: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.variances[layer] = variances.float()
        return super().allocate(layer, variances, *args, **kwargs)


@torch.inference_mode(False)  # the damages need gradients
@torch.no_grad()
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

    KL is measured on ``continuation`` tokens behind a prefix, for each layer in turn; gradients divide the damage of a
    layer's keys among its heads. Figures are means over the texts that begin at tokens ``starts`` of ``document``
    (None: the default one). Texts that repeat facts from everywhere in their prefix, measured by gradients alone, are
    added with a small weight. Bases and means of the keys come from texts of many kinds.

    Raises:
        LoadError: the document is too short.
        UnsupportedModelError: no layer keeps the whole context.
    """
    whole_text = default_document() if document is None else document
    ids = tokens_of(whole_text, loaded.tokenizer, max(starts) + prefix + continuation + 1).to(loaded.model.device)
    texts = [ids[:, start : start + prefix + continuation + 1] for start in starts]
    recalls = [recall_text(loaded, texts[seed % len(texts)], prefix, continuation, seed) for seed in range(NUM_RECALLS)]
    count = len(texts) + len(recalls)
    prose = _Measured.mean(
        [_Text(loaded, text, prefix, on_progress, number, count).measure() for number, text in enumerate(texts)]
    )
    recall = _Measured.mean(
        [
            _Text(loaded, text, prefix, on_progress, len(texts) + number, count).estimate()
            for number, text in enumerate(recalls)
        ]
    )
    values = _with_recalls(prose.value_damages, recall.value_damages)
    keys = _with_recalls(prose.key_sensitivities, recall.key_sensitivities)
    kinds = texts_by_kind(str(loaded.tokenizer.decode(texts[0][0])))
    most = min(BASIS_TOKENS, positions_of(loaded) or BASIS_TOKENS)
    basis_texts = [ids_of(loaded, text)[:, :most] for text in kinds.values()]
    shared = measure_bases(loaded, basis_texts, on_progress)
    least = max(_LEAST_SENSITIVITY * float(torch.cat(keys).mean()), torch.finfo(torch.float32).tiny)
    return ModelProfile(
        tuple(map(float, values)),
        tuple(tuple(heads.clamp_min(least).tolist()) for heads in keys),
        tuple(tuple(variances.tolist()) for variances in prose.variances),
        shared.bases,
        tuple(tuple(means.flatten().tolist()) for means in shared.means),
        shared.rope_steps,
    )


def _with_recalls(prose: list[Tensor], recall: list[Tensor]) -> list[Tensor]:
    return [in_prose + RECALL_WEIGHT * in_recall for in_prose, in_recall in zip(prose, recall, strict=True)]


class _Text:
    """A text, its dense cache and its coarse one.

    Raises:
        UnsupportedModelError: no layer of the model keeps the whole context.
    """

    def __init__(
        self, loaded: LoadedModel, ids: Tensor, prefix: int, on_progress: OnProgress | None, number: int, count: int
    ) -> None:
        self.loaded, self._on_progress, self._number, self._count = loaded, on_progress, number, count
        self.continuation, self.targets = ids[:, prefix:-1], ids[0, prefix + 1 :]
        model = loaded.model
        coarse = SpectralCache(model, config=_COARSE, use_profile=False)
        assert isinstance(coarse.codec, SpectralCodec)
        variances: dict[int, Tensor] = {}
        codec = coarse.codec
        codec.budget, codec.short_budget = (
            _RecordingBudget(budget, variances) for budget in (codec.budget, codec.short_budget)
        )
        fill(loaded, coarse, ids[:, :prefix], "profile: coarse prefill", None)
        unpatch_unsloth_attention(model)
        self.layers = [index for index, layer in enumerate(coarse.layers) if isinstance(layer, SpectralCacheLayer)]
        if not self.layers:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no layer that keeps the whole context: nothing to measure"
            )
        self.dense: Any = dense_cache(model)
        fill(loaded, self.dense, ids[:, :prefix], "profile: dense prefill", None)
        self.rebuilt: dict[int, dict[str, Tensor]] = {}
        self.lost: list[Tensor] = []
        self.variances: list[Tensor] = []
        for place, index in enumerate(self.layers):
            layer: Any = coarse.layers[index]
            self.rebuilt[index] = dict(zip(("keys", "values"), layer.spectral.reconstruct(), strict=True))
            layer_variances = variances[place].cpu()
            errors = [block.keys.relative_error for block in layer.spectral.blocks if isinstance(block, SpectralBlock)]
            self.lost.append(errors[0].float().cpu().square().mean(0) * layer_variances.sum(-1))
            self.variances.append(layer_variances.flatten())

    def measure(self) -> _Measured:
        """Damages of whole layers, those of keys divided among heads by gradients."""
        (estimated,) = self._by_gradients("keys")
        dense = continue_on(self.loaded, self._cache({}), self.continuation)
        damages: dict[str, list[float]] = {"values": [], "keys": []}
        for done, index in enumerate(self.layers):
            for step, name in enumerate(damages):
                logits = continue_on(
                    self.loaded, self._cache({(index, name): self.rebuilt[index][name]}), self.continuation
                )
                damages[name].append(max(0.0, compare_logits(dense, logits, self.targets).kl))
                self._report(2 * done + step + 1)
        values, keys = (list(torch.tensor(numbers, dtype=torch.float32, device="cpu")) for numbers in damages.values())
        # Heads share equally where gradients are zero.
        positive = [heads.clamp_min(torch.finfo(torch.float32).tiny) for heads in estimated]
        key_damages = [damage * heads / heads.sum() for damage, heads in zip(keys, positive, strict=True)]
        return _Measured(values, key_damages, self.lost, self.variances)

    def estimate(self) -> _Measured:
        """Damages by gradients alone."""
        values, keys = self._by_gradients("values", "keys")
        self._report(2 * len(self.layers))
        return _Measured([heads.sum() for heads in values], keys, self.lost, self.variances)

    def _by_gradients(self, *names: str) -> list[list[Tensor]]:
        """For each of ``names``, "values" or "keys": for each layer, the damages of its heads ``[H]``; zeros without
        gradients."""
        places = [(index, name) for name in names for index in self.layers]
        cached = [getattr(self.dense.layers[index], name) for index, name in places]
        errors = [self.rebuilt[index][name] - exact for (index, name), exact in zip(places, cached, strict=True)]

        def logits_of(tensors: list[Tensor]) -> Tensor:
            return continue_on(self.loaded, self._cache(dict(zip(places, tensors, strict=True))), self.continuation)

        try:
            damages = head_damages(logits_of, cached, errors, _DRAWS)
        except RuntimeError as failure:  # operations without a derivative, or too little memory
            warn_once("the profile does not tell a layer's heads apart: there are no gradients (%s)", failure)
            damages = [torch.zeros(error.shape[1], dtype=torch.float32, device="cpu") for error in errors]
        count = len(self.layers)
        return [damages[place : place + count] for place in range(0, len(damages), count)]

    def _report(self, step: int) -> None:
        if self._on_progress is not None:
            steps = 2 * len(self.layers)
            self._on_progress(
                "profile: each layer and head at one bit", self._number * steps + step, self._count * steps
            )

    def _cache(self, replaced: dict[tuple[int, str], Tensor]) -> Any:
        """A copy of the dense cache with the keys or values at ``replaced``; the tensors of the others are shared.

        Layers of other kinds, which may change their state in place, are copied whole.
        """
        fresh = copy.copy(self.dense)
        fresh.layers = [(copy.copy if i in self.rebuilt else copy.deepcopy)(old) for i, old in enumerate(fresh.layers)]
        for (index, name), states in replaced.items():
            setattr(fresh.layers[index], name, states)
        return fresh
