"""Measure a model's bases and means of keys, averaged over texts: axes are principal under the queries' metric."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.codec.model_basis import ModelBasis
from unsloth_spectral.codec.spectral.codec import SpectralCodec
from unsloth_spectral.codec.spectral.statistics import KeyStatistics, principal_basis
from unsloth_spectral.eval.progress import OnProgress
from unsloth_spectral.eval.tasks.asking import fill
from unsloth_spectral.integrations.huggingface.cache import SpectralCache
from unsloth_spectral.integrations.models import LoadedModel
from unsloth_spectral.integrations.unsloth import unpatch_unsloth_attention
from unsloth_spectral.rope import Rotation


class SharedKeys(NamedTuple):
    """Attributes:
    bases: for each full-attention layer, the basis of its keys.
    means: for each layer, the mean ``[H, D]`` float32 of its un-rotated keys.
    rope_steps: as in ``ModelProfile``.
    """

    bases: tuple[ModelBasis, ...] = ()
    means: tuple[Tensor, ...] = ()
    rope_steps: tuple[float, ...] = ()


def measure_bases(loaded: LoadedModel, texts: Sequence[Tensor], on_progress: OnProgress | None = None) -> SharedKeys:
    """The bases and means of all layers, from the prefills of ``texts``, ``[1, n]`` token ids each.

    Empty if the texts are too short to be sealed. Means of the keys, covariances around each text's own mean, and
    metrics of the queries are averaged over the texts.
    """
    means: dict[int, list[Tensor]] = defaultdict(list)
    covariances: dict[int, list[Tensor]] = defaultdict(list)
    metrics: dict[int, list[Tensor]] = defaultdict(list)
    steps: set[tuple[float, ...]] = set()

    def note(layer: int, statistics: KeyStatistics) -> None:
        steps.add(_steps(statistics.rotation))
        means[layer].append(statistics.mean[0].float().cpu())
        covariances[layer].append(statistics.covariance[0].cpu())
        metrics[layer].append(statistics.metric[0].cpu())

    num_layers = 0
    for number, text in enumerate(texts):
        cache: Any = SpectralCache(loaded.model, config=SpectralConfig(), use_profile=False)
        assert isinstance(cache.codec, SpectralCodec)
        cache.codec.on_statistics, num_layers = note, cache.codec.budget.num_layers
        fill(loaded, cache, text.to(loaded.model.device), "profile: prefill", None)
        if on_progress is not None:
            on_progress("profile: a basis over texts", number + 1, len(texts))
    unpatch_unsloth_attention(loaded.model)
    bases = [principal_basis(_mean(covariances[layer]), _mean(metrics[layer])) for layer in sorted(covariances)]
    # Texts that are too short are not sealed, and what is not finite stays exact.
    is_whole = len(bases) == num_layers and all(bool(torch.isfinite(basis.vectors).all()) for basis in bases)
    if not is_whole:
        return SharedKeys()
    return SharedKeys(
        bases=tuple(ModelBasis.rounded(*basis) for basis in bases),
        means=tuple(_mean(means[layer]) for layer in sorted(means)),
        rope_steps=steps.pop() if len(steps) == 1 else (),
    )


def _steps(rotation: Rotation | None) -> tuple[float, ...]:
    """The rotation's steps; none if they are unknown, along several axes, or of pairs whose parts are no halves."""
    if rotation is None or rotation.step is None or len(set(rotation.axes or (0,))) > 1:
        return ()
    pairs, first, second = rotation.num_pairs, rotation.first, rotation.second
    if not isinstance(first, slice) or not isinstance(second, slice):
        return ()
    are_halves = (first, second) == (slice(0, pairs, 1), slice(pairs, 2 * pairs, 1))
    return tuple(rotation.step.tolist()) if are_halves else ()


def _mean(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).mean(0)
