"""Drift of a long generation, against greedy generation and divergences worked out by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from unsloth_spectral import SpectralCache, SpectralConfig
from unsloth_spectral.errors import InvalidArgumentError, LoadError
from unsloth_spectral.eval.methods.base import Footprint, Method
from unsloth_spectral.eval.tasks.drift import Drift
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument
from unsloth_spectral.integrations.models import LoadedModel

LENGTH, TOKENS = 100, 60
DENSE = Method(
    "dense", "dense", lambda model: DynamicCache(config=model.config),
    lambda cache: Footprint(cache.get_seq_length(), cache.get_seq_length(), None),
)  # fmt: skip


def spectral(rank: int, caches: list[Any] | None = None) -> Method:
    config = SpectralConfig(rank_keys=rank, rank_values=rank, block_size=32, residual_length=16)

    def make(model: Any) -> SpectralCache:
        cache = SpectralCache(model, config=config)
        if caches is not None:
            caches.append(cache)
        return cache

    return Method(f"spectral {rank}", "spectral", make, lambda cache: Footprint(cache.get_seq_length(), 1, None))


@pytest.fixture
def loaded(tiny_llama: Callable[..., LlamaForCausalLM], character_tokenizer: Any) -> LoadedModel:
    return LoadedModel(tiny_llama(initializer_range=0.2), character_tokenizer, "tiny")


@pytest.fixture
def task(document: str) -> Drift:
    return Drift(document=document, starts=(0, 50), context_length=LENGTH, num_tokens=TOKENS, request="Why?")


def prompt_of(loaded: LoadedModel, document: str, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    context = loaded.tokenizer("^" + document[start : start + LENGTH - 1]).input_ids
    question = loaded.tokenizer("\n\nQuestion: Why?\nAnswer:").input_ids
    return torch.tensor([context]), torch.tensor([question])


@torch.inference_mode()
def generate(loaded: LoadedModel, cache: Any, document: str) -> list[int]:
    """By ``generate``, its end token ruled out."""
    context, question = prompt_of(loaded, document)
    loaded.model(context, **cache_argument(cache))
    ids = torch.cat([context, question], 1)
    output = loaded.model.generate(
        ids, attention_mask=torch.ones_like(ids), **cache_argument(cache), max_new_tokens=TOKENS, do_sample=False,
        suppress_tokens=[2], pad_token_id=0,
    )  # fmt: skip
    return output[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("rank", [16, 2, 1])
def test_first_difference_is_that_of_two_greedy_generations(
    loaded: LoadedModel, task: Drift, document: str, rank: int
) -> None:
    dense = generate(loaded, DENSE.make_cache(loaded.model), document)
    other = generate(loaded, spectral(rank).make_cache(loaded.model), document)
    expected = next((step for step in range(TOKENS) if dense[step] != other[step]), TOKENS)
    task.run(loaded, DENSE, "start=0")
    outcome = task.run(loaded, spectral(rank), "start=0")
    assert outcome.metrics["first_difference"] == expected
    assert outcome.predictions[0]["dense"] == loaded.tokenizer.decode(dense)
    assert outcome.predictions[0]["same"] == loaded.tokenizer.decode(dense[:expected])
    assert rank > 1 or expected < TOKENS


def test_divergences_are_those_worked_out_by_hand(loaded: LoadedModel, task: Drift, document: str) -> None:
    tokens = generate(loaded, DENSE.make_cache(loaded.model), document)
    context, question = prompt_of(loaded, document)
    fed = torch.cat([question, torch.tensor([tokens[:-1]])], 1)
    with torch.inference_mode():
        whole = loaded.model(torch.cat([context, fed], 1), use_cache=False).logits[0, -TOKENS:].double()
        cache = spectral(1).make_cache(loaded.model)
        loaded.model(context, **cache_argument(cache))
        rows = [loaded.model(question, **cache_argument(cache)).logits[0, -1]]
        rows += [loaded.model(torch.tensor([[t]]), **cache_argument(cache)).logits[0, -1] for t in tokens[:-1]]
    allowed = [token for token in range(128) if token != 2]
    expected, actual = (logits[:, allowed].log_softmax(-1) for logits in (whole, torch.stack(rows).double()))
    divergences = (expected.exp() * (expected - actual)).sum(-1).tolist()
    outcome = task.run(loaded, spectral(1), "start=0")
    assert outcome.series["kl"] == pytest.approx(divergences, rel=1e-3, abs=1e-7)
    assert outcome.metrics["kl"] == pytest.approx(sum(divergences) / TOKENS, rel=1e-3)


def test_dense_never_drifts_and_a_close_cache_little(loaded: LoadedModel, task: Drift) -> None:
    dense = task.run(loaded, DENSE, "start=0")
    assert dense.metrics == {"first_difference": TOKENS, "kl": 0}
    assert dense.series == {"kl": [0] * TOKENS}
    assert dense.footprint.stored_bytes == LENGTH
    close, poor = (task.run(loaded, spectral(rank), "start=0").metrics for rank in (16, 1))
    assert 0 < close["kl"] < 1e-3 < poor["kl"]
    assert poor["first_difference"] < close["first_difference"]


def test_blocks_are_sealed_while_decoding(loaded: LoadedModel, task: Drift) -> None:
    caches: list[Any] = []
    sealed_at_prefill = LENGTH // 32 * 32
    task.run(loaded, spectral(16, caches), "start=0")
    assert caches[-1].stats().layers[0].sealed_tokens > sealed_at_prefill
    # The last generated token is fed to no one.
    assert caches[-1].get_seq_length() == LENGTH + len("\n\nQuestion: Why?\nAnswer:") + TOKENS - 1


def test_without_a_dense_run_of_this_case_it_is_made_up_for(loaded: LoadedModel, task: Drift, document: str) -> None:
    task.run(loaded, DENSE, "start=0")
    expected = task.run(loaded, spectral(1), "start=0")
    again = Drift(document=document, starts=(0, 50), context_length=LENGTH, num_tokens=TOKENS, request="Why?")
    alone = again.run(loaded, spectral(1), "start=0")
    assert alone.metrics == pytest.approx(expected.metrics, rel=1e-4)
    assert alone.predictions == expected.predictions
    assert task.run(loaded, spectral(1), "start=50").predictions != expected.predictions


def test_progress(loaded: LoadedModel, task: Drift) -> None:
    seen: list[tuple[str, int, int]] = []
    task.run(loaded, spectral(1), "start=0", lambda *step: seen.append(step))
    stages = list(dict.fromkeys(stage for stage, _, _ in seen))
    assert stages == ["spectral 1: prefill", "dense: generation", "spectral 1: decode"]
    assert seen[-1] == ("spectral 1: decode", TOKENS, TOKENS)


def test_refused(loaded: LoadedModel, task: Drift, document: str) -> None:
    assert task.cases(loaded) == ["start=0", "start=50"]
    with pytest.raises(InvalidArgumentError, match="case must be one of"):
        task.run(loaded, DENSE, "start=1")
    late = Drift(document=document, starts=(2901,), context_length=LENGTH)
    with pytest.raises(LoadError, match="3,001 are needed: choose --starts of at most 2,900, or give a longer"):
        late.cases(loaded)
    for options in ({"context_length": 0}, {"num_tokens": 0}, {"starts": ()}, {"starts": (-1,)}):
        with pytest.raises(InvalidArgumentError, match=f"{next(iter(options))} must be an integer of at least"):
            Drift(**options)
