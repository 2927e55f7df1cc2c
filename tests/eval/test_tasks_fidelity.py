"""Fidelity of slices of a document, against numbers computed by hand, token by token, without the task's code."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from unsloth_spectral import SpectralCache, SpectralConfig
from unsloth_spectral.cache.stats import CacheStats, LayerStats
from unsloth_spectral.errors import InvalidArgumentError, LoadError
from unsloth_spectral.eval.methods.base import Footprint, Method
from unsloth_spectral.eval.methods.spectral import bits_by_layer, spectral_methods
from unsloth_spectral.eval.tasks.fidelity import Fidelity
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument
from unsloth_spectral.integrations.models import LoadedModel

LENGTH, REST = 200, 40
DENSE = Method(
    "dense", "dense", lambda model: DynamicCache(config=model.config),
    lambda cache: Footprint(cache.get_seq_length(), cache.get_seq_length(), None),
)  # fmt: skip


def spectral(rank: int) -> Method:
    config = SpectralConfig(rank_keys=rank, rank_values=rank, block_size=32, residual_length=16)

    def footprint(cache: Any) -> Footprint:
        stats = cache.stats()
        return Footprint(stats.stored_bytes, stats.dense_bytes, None)

    return Method(f"spectral {rank}", "spectral", lambda model: SpectralCache(model, config=config), footprint)


@pytest.fixture
def loaded(tiny_llama: Callable[..., LlamaForCausalLM], character_tokenizer: Any) -> LoadedModel:
    return LoadedModel(tiny_llama(initializer_range=0.2), character_tokenizer, "tiny")


@pytest.fixture
def task(document: str) -> Fidelity:
    return Fidelity(document=document, starts=(0, 700), context_length=LENGTH, continuation_length=REST)


def slice_of(loaded: LoadedModel, document: str, start: int) -> tuple[Tensor, Tensor]:
    """The beginning-of-sequence token and the document's, then the tokens to score."""
    ids = torch.tensor([loaded.tokenizer("^" + document[start:]).input_ids])
    return ids[:, :LENGTH], ids[0, LENGTH : LENGTH + REST + 1]


@torch.inference_mode()
def by_hand(loaded: LoadedModel, cache: Any, context: Tensor, rest: Tensor) -> Tensor:
    """Log-probabilities ``[REST, vocabulary]``."""
    loaded.model(context, **cache_argument(cache))
    rows = [loaded.model(rest[step : step + 1][None], **cache_argument(cache)).logits[0, -1] for step in range(REST)]
    return torch.stack(rows).double().log_softmax(-1)


@pytest.mark.parametrize(("case", "start"), [("start=0", 0), ("start=700", 700)])
def test_figures_are_those_worked_out_by_hand(
    loaded: LoadedModel, task: Fidelity, document: str, case: str, start: int
) -> None:
    context, rest = slice_of(loaded, document, start)
    # No dense cache: every token sees all others at once.
    with torch.inference_mode():
        whole = loaded.model(torch.cat([context, rest[None, :-1]], 1), use_cache=False).logits[0, LENGTH:]
    expected = whole.double().log_softmax(-1)
    # All of the rest at once, as the task has it: a token at a time seals at other places.
    cache = spectral(1).make_cache(loaded.model)
    with torch.inference_mode():
        loaded.model(context, **cache_argument(cache))
        actual = loaded.model(rest[None, :-1], **cache_argument(cache)).logits[0].double().log_softmax(-1)
    perplexity, dense_perplexity = ((-p[range(REST), rest[1:]]).mean().exp().item() for p in (actual, expected))
    dense = task.run(loaded, DENSE, case)
    assert dense.metrics == {
        "kl": 0, "top1_agreement": 1, "perplexity": pytest.approx(dense_perplexity, rel=1e-4), "perplexity_change": 0,
    }  # fmt: skip
    metrics = task.run(loaded, spectral(1), case).metrics
    kl = (expected.exp() * (expected - actual)).sum(-1).mean().item()
    assert kl > 0.01
    assert metrics["kl"] == pytest.approx(kl, rel=1e-3)
    assert metrics["top1_agreement"] == (expected.argmax(-1) == actual.argmax(-1)).double().mean().item() < 1
    assert metrics["perplexity"] == pytest.approx(perplexity, rel=1e-4)
    assert metrics["perplexity_change"] == pytest.approx(perplexity - dense_perplexity, rel=1e-3)


def test_token_by_token_the_dense_perplexity_is_the_same(loaded: LoadedModel, task: Fidelity, document: str) -> None:
    context, rest = slice_of(loaded, document, 700)
    logarithms = by_hand(loaded, DENSE.make_cache(loaded.model), context, rest)
    expected = (-logarithms[range(REST), rest[1:]]).mean().exp().item()
    assert task.run(loaded, DENSE, "start=700").metrics["perplexity"] == pytest.approx(expected, rel=1e-4)


def test_a_close_cache_scores_better_than_a_poor_one(loaded: LoadedModel, task: Fidelity) -> None:
    task.run(loaded, DENSE, "start=0")
    close, poor = (task.run(loaded, spectral(rank), "start=0") for rank in (16, 1))
    assert 0 < close.metrics["kl"] < 1e-3 < poor.metrics["kl"]
    assert close.metrics["top1_agreement"] > poor.metrics["top1_agreement"]
    assert poor.footprint.stored_bytes < close.footprint.stored_bytes < close.footprint.dense_bytes


def test_a_cache_that_forgets_is_told_apart(loaded: LoadedModel, task: Fidelity) -> None:
    class Forgetful(DynamicCache):
        """Zeroes all tokens before the newest."""

        def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **options: Any) -> Any:
            all_keys, all_values = super().update(keys, values, layer_idx, *args, **options)
            all_values[:, :, : -keys.shape[-2]] = 0
            return all_keys, all_values

    method = Method("forgetful", "forgetful", lambda model: Forgetful(config=model.config), DENSE.footprint)
    metrics = task.run(loaded, method, "start=0").metrics
    assert metrics["kl"] > 0.05
    assert metrics["top1_agreement"] < 0.9


def test_the_footprint_is_that_of_the_prefill(loaded: LoadedModel, task: Fidelity) -> None:
    assert task.run(loaded, DENSE, "start=0").footprint.stored_bytes == LENGTH


def test_without_a_dense_run_of_this_case_it_is_made_up_for(loaded: LoadedModel, task: Fidelity, document: str) -> None:
    task.run(loaded, DENSE, "start=0")
    expected = task.run(loaded, spectral(1), "start=0").metrics
    other = Fidelity(document=document, starts=(0, 700), context_length=LENGTH, continuation_length=REST)
    assert other.run(loaded, spectral(1), "start=0").metrics == pytest.approx(expected, rel=1e-4)
    # What is kept of one case never serves another.
    late, alone = task.run(loaded, spectral(1), "start=700"), other.run(loaded, spectral(1), "start=700")
    assert late.metrics == pytest.approx(alone.metrics, rel=1e-4)
    assert late.metrics["kl"] != pytest.approx(expected["kl"], rel=1e-3)


def test_bits_by_layer_of_caches_that_know_them(loaded: LoadedModel, task: Fidelity) -> None:
    config = SpectralConfig(bits_per_element=6.0, block_size=128, residual_length=16)
    caches: list[SpectralCache] = []

    def make(model: Any) -> SpectralCache:
        caches.append(SpectralCache(model, config=config))
        return caches[-1]

    series = task.run(loaded, Method("spectral", "spectral", make, Footprint.counted, bits_by_layer), "start=0").series
    layers = caches[0].stats().layers
    assert series == {
        "bits_keys": [layer.bits_keys for layer in layers], "bits_values": [layer.bits_values for layer in layers]
    }  # fmt: skip
    assert len(layers) == 2
    assert task.run(loaded, spectral(1), "start=0").series == {}
    assert task.run(loaded, DENSE, "start=0").series == {}
    # The rank codec has ranks and no bits.
    ranks = Method("rank", "rank", spectral(1).make_cache, spectral(1).footprint, bits_by_layer)
    assert task.run(loaded, ranks, "start=0").series == {}


def test_a_layer_without_bits_keeps_its_place() -> None:
    layers = [LayerStats("spectral", 9, bits_keys=2.5, bits_values=3), LayerStats("DynamicSlidingWindowLayer", 9)]
    cache: Any = SimpleNamespace(stats=lambda: CacheStats.of(layers))
    assert bits_by_layer(cache) == {
        "bits_keys": [2.5, pytest.approx(math.nan, nan_ok=True)],
        "bits_values": [3, pytest.approx(math.nan, nan_ok=True)],
    }
    layers[0] = layers[1]
    assert bits_by_layer(cache) == {}


def test_with_and_without_a_profile_tell_their_bits() -> None:
    methods = spectral_methods()
    for name in ("spectral balanced", "spectral balanced without profile"):
        assert methods[name].by_layer is bits_by_layer
    assert methods["dense"].by_layer(None) == {}


def test_progress(loaded: LoadedModel, task: Fidelity) -> None:
    seen: list[tuple[str, int, int]] = []
    task.run(loaded, DENSE, "start=0", lambda *step: seen.append(step))
    assert seen == [(f"dense: {stage}", done, 2) for stage in ("prefill", "continuation") for done in (0, 1, 2)]


def test_refused(loaded: LoadedModel, task: Fidelity, document: str) -> None:
    assert task.cases(loaded) == ["start=0", "start=700"]
    with pytest.raises(InvalidArgumentError, match="case must be one of start=0, start=700, got 'start=1'"):
        task.run(loaded, DENSE, "start=1")
    with pytest.raises(InvalidArgumentError, match="needs 4,352 positions, but tiny has 4,096"):
        Fidelity().cases(loaded)
    # Before anything is run, and with what would help.
    with pytest.raises(LoadError) as caught:
        Fidelity(document=document, context_length=100, continuation_length=40).cases(loaded)
    assert str(caught.value) == (
        "the document has 3,000 tokens and 80,141 are needed: choose --starts of at most 2,859, or give a longer "
        "document"
    )
    last = Fidelity(document=document, starts=(2859,), context_length=100, continuation_length=40)
    assert last.run(loaded, DENSE, "start=2859").metrics["kl"] == 0
    with pytest.raises(LoadError, match="has 3,000 tokens and 3,041 are needed: give a longer document"):
        Fidelity(document=document, starts=(0,), context_length=3000, continuation_length=40).cases(loaded)
    for options in ({"context_length": 0}, {"continuation_length": 0}, {"starts": ()}, {"starts": (-1,)}):
        with pytest.raises(InvalidArgumentError, match=f"{next(iter(options))} must be an integer of at least"):
            Fidelity(**options)
