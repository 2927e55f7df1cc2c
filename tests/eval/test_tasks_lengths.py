"""Bytes and fidelity by the prefix's length, against numbers worked out by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from unsloth_spectral import SpectralCache, SpectralConfig
from unsloth_spectral.errors import InvalidArgumentError, LoadError
from unsloth_spectral.eval.methods.base import Footprint, Method
from unsloth_spectral.eval.tasks.fidelity import Fidelity
from unsloth_spectral.eval.tasks.lengths import Lengths
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument
from unsloth_spectral.integrations.models import LoadedModel

REST, START, LONGEST = 20, 30, 200
DENSE = Method(
    "dense", "dense", lambda model: DynamicCache(config=model.config),
    lambda cache: Footprint(cache.get_seq_length(), cache.get_seq_length(), None),
)  # fmt: skip


def spectral(rank: int) -> Method:
    config = SpectralConfig(rank_keys=rank, rank_values=rank, block_size=32, residual_length=16)
    return Method(
        f"spectral {rank}", "spectral", lambda model: SpectralCache(model, config=config), Footprint.counted
    )  # fmt: skip


@pytest.fixture
def loaded(tiny_llama: Callable[..., LlamaForCausalLM], character_tokenizer: Any) -> LoadedModel:
    return LoadedModel(tiny_llama(initializer_range=0.2), character_tokenizer, "tiny")


@pytest.fixture
def task(document: str) -> Lengths:
    return Lengths(document=document, lengths=(40, 100, LONGEST), starts=(START,), continuation_length=REST)


@pytest.mark.parametrize("length", [100, LONGEST])
def test_figures_are_those_worked_out_by_hand(loaded: LoadedModel, task: Lengths, document: str, length: int) -> None:
    # Of every length the prefix ends where the longest does: the beginning-of-sequence token, then the document's.
    stop = START + LONGEST - 1
    context = torch.tensor([loaded.tokenizer("^" + document[stop - length + 1 : stop]).input_ids])
    rest = torch.tensor([loaded.tokenizer(document[stop : stop + REST]).input_ids])
    cache = spectral(1).make_cache(loaded.model)
    with torch.inference_mode():
        whole = loaded.model(torch.cat([context, rest], 1), use_cache=False).logits[0, length:]
        loaded.model(context, **cache_argument(cache))
        stats = cache.stats()
        actual = loaded.model(rest, **cache_argument(cache)).logits[0].double().log_softmax(-1)
    expected = whole.double().log_softmax(-1)
    kl = (expected.exp() * (expected - actual)).sum(-1).mean().item()
    assert kl > 0.01
    assert task.run(loaded, DENSE, f"length={length}").metrics == {"factor": 1, "kl": 0}
    outcome = task.run(loaded, spectral(1), f"length={length}")
    assert outcome.metrics == {
        "factor": stats.dense_bytes / stats.stored_bytes,
        "cold_bits_per_element": stats.cold_bits_per_element,
        "kl": pytest.approx(kl, rel=1e-3),
    }
    assert outcome.footprint.stored_bytes == stats.stored_bytes


def test_the_longest_is_a_slice_of_fidelity(loaded: LoadedModel, task: Lengths, document: str) -> None:
    other = Fidelity(document=document, starts=(START,), context_length=LONGEST, continuation_length=REST)
    expected = other.run(loaded, spectral(1), f"start={START}").metrics["kl"]
    assert task.run(loaded, spectral(1), f"length={LONGEST}").metrics["kl"] == pytest.approx(expected, rel=1e-6)


def test_where_nothing_is_sealed_there_are_no_cold_bits(loaded: LoadedModel, task: Lengths) -> None:
    task.run(loaded, DENSE, "length=40")
    metrics = task.run(loaded, spectral(1), "length=40").metrics
    assert set(metrics) == {"factor", "kl"}
    assert metrics["kl"] == pytest.approx(0, abs=1e-9)


def test_longer_prefixes_shrink_more(loaded: LoadedModel, task: Lengths) -> None:
    factors = [task.run(loaded, spectral(1), case).metrics["factor"] for case in task.cases(loaded)]
    assert factors == sorted(set(factors))


def test_lengths_without_positions_are_left_out(loaded: LoadedModel, document: str) -> None:
    assert Lengths().cases(loaded) == ["length=512", "length=1024", "length=2048"]
    task = Lengths(document=document, lengths=(4096, 64, 4096 - 20, 128), starts=(0,), continuation_length=20)
    with pytest.raises(LoadError, match="has 3,000 tokens and 4,097 are needed: give a longer document"):
        task.cases(loaded)
    short = Lengths(document=document, lengths=(9000, 128, 64), starts=(0,), continuation_length=20)
    assert short.cases(loaded) == ["length=64", "length=128"]
    # The prefixes end where the longest that is left ends.
    alone = Lengths(document=document, lengths=(128, 64), starts=(0,), continuation_length=20)
    assert short.run(loaded, spectral(1), "length=64").metrics == alone.run(loaded, spectral(1), "length=64").metrics
    with pytest.raises(InvalidArgumentError, match="needs 4,097 positions, but tiny has 4,096: lower its lengths"):
        Lengths(lengths=(4096,), continuation_length=1).cases(loaded)


def test_the_defaults_fit_models_of_8192_positions(tiny_llama: Callable[..., Any], character_tokenizer: Any) -> None:
    loaded = LoadedModel(tiny_llama(max_position_embeddings=8192), character_tokenizer, "tiny")
    assert Lengths().cases(loaded) == [f"length={length}" for length in (512, 1024, 2048, 4096, 8064)]


def test_several_starts_are_cases_of_their_own(loaded: LoadedModel, document: str) -> None:
    options: dict[str, Any] = {"document": document, "lengths": (40, 100), "continuation_length": REST}
    task = Lengths(starts=(0, 500), **options)
    assert task.cases(loaded) == [f"length={length} start={start}" for length in (40, 100) for start in (0, 500)]
    metrics = task.run(loaded, spectral(1), "length=100 start=500").metrics
    alone = Lengths(starts=(500,), **options).run(loaded, spectral(1), "length=100").metrics
    assert metrics == pytest.approx(alone, rel=1e-6)
    assert metrics != pytest.approx(task.run(loaded, spectral(1), "length=100 start=0").metrics, rel=1e-3)


def test_refused(loaded: LoadedModel, task: Lengths, document: str) -> None:
    with pytest.raises(InvalidArgumentError, match="case must be one of length=40, length=100, length=200, got"):
        task.run(loaded, DENSE, "length=41")
    late = Lengths(document=document, lengths=(40,), starts=(0, 2950), continuation_length=REST)
    with pytest.raises(LoadError, match="has 3,000 tokens and 3,011 are needed: choose --starts of at most 2,939, or"):
        late.cases(loaded)
    for options in ({"continuation_length": 0}, {"lengths": ()}, {"lengths": (0,)}, {"starts": ()}, {"starts": (-1,)}):
        with pytest.raises(InvalidArgumentError, match=f"{next(iter(options))} must be an integer of at least"):
            Lengths(**options)
