"""The synthetic tasks: problems can be solved from their context, and scores are shares of what is wanted."""

import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from recall import recall_loaded, recall_method
from transformers import DynamicCache, LlamaForCausalLM

from unsloth_spectral import SpectralCache, SpectralConfig
from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.eval.methods.base import Footprint, Method
from unsloth_spectral.eval.tasks.ruler import Ruler, score
from unsloth_spectral.eval.tasks.ruler_kinds import KINDS, Problem
from unsloth_spectral.integrations.models import LoadedModel

DENSE, FORGETFUL = recall_method("dense", 10_000), recall_method("forgetful", 1)


def problems(kind: str, room: int = 2000) -> list[Problem]:
    return [KINDS[kind](random.Random(seed), room) for seed in range(20)]


@pytest.fixture
def loaded() -> LoadedModel:
    return recall_loaded()


@pytest.fixture
def task(document: str) -> Ruler:
    return Ruler(document=document, num_cases=2, context_length=2500)


class TestProblems:
    @pytest.mark.parametrize("kind", KINDS)
    def test_equal_seeds_give_equal_problems(self, kind: str) -> None:
        assert problems(kind) == problems(kind)
        assert len({problem.wanted for problem in problems(kind)}) == 20

    @pytest.mark.parametrize("kind", ["multi-value", "multi-query"])
    def test_numbers_belong_to_the_keys_asked_for(self, kind: str) -> None:
        for problem in problems(kind):
            pairs = [
                re.fullmatch(r"The magic number of (\w+): \1 (\d+)\.", text).groups() for text in problem.sentences
            ]
            expected = [number for key, number in pairs if key in problem.question]
            assert sorted(expected) == sorted(problem.wanted)
            assert len(expected) == 4
            assert len(pairs) == len({number for _, number in pairs}) == 8

    def test_variables_can_be_traced_in_order(self) -> None:
        for problem in problems("variable-tracking"):
            values: dict[str, str] = {}
            for text in problem.sentences:
                name, value = re.fullmatch(r"VAR (\w+) = (?:VAR )?(\w+)", text).groups()
                values[name] = values.get(value, value)
            expected = re.search(r"\d{5}", problem.question).group()
            assert {name for name, value in values.items() if value == expected} == set(problem.wanted)
            assert len(values) == 10

    def test_common_words_are_the_most_common(self) -> None:
        for problem in problems("common-words"):
            counts = Counter(text.split()[1] for text in problem.sentences)
            assert {word for word, _ in counts.most_common(10)} == set(problem.wanted)
            assert sorted(counts.values())[-11] * 10 <= counts[problem.wanted[0]]
            assert problem.sentences[0].startswith("1. ")

    def test_frequent_words_are_the_most_frequent(self) -> None:
        for problem in problems("frequent-words"):
            counts = Counter(problem.sentences).most_common(4)
            assert tuple(word for word, _ in counts[:3]) == problem.wanted
            assert counts[2][1] > counts[3][1]


class TestTask:
    def test_cases(self, loaded: LoadedModel, task: Ruler) -> None:
        assert task.cases(loaded) == [f"{kind} seed={seed}" for kind in KINDS for seed in (0, 1)]
        assert Ruler(kinds=("multi-query",), num_cases=1).cases(loaded) == ["multi-query seed=0"]

    @pytest.mark.parametrize("kind", KINDS)
    def test_all_or_nothing(self, loaded: LoadedModel, task: Ruler, kind: str) -> None:
        wanted = task.run(loaded, FORGETFUL, f"{kind} seed=0").predictions[0]["wanted"]
        loaded.model.reply = " ".join(wanted)
        outcomes = {method.name: task.run(loaded, method, f"{kind} seed=0") for method in (DENSE, FORGETFUL)}
        fits = [word for word in wanted if word in " ".join(wanted)[:64]]
        # Ten words are longer than the answer of 64 characters: those that do not fit are not found.
        assert outcomes["dense"].metrics["score"] == len(fits) / len(wanted) > 0
        assert outcomes["forgetful"].metrics == {"score": 0}
        assert outcomes["dense"].predictions[0]["wanted"] == outcomes["forgetful"].predictions[0]["wanted"] == wanted

    @pytest.mark.parametrize("kind", KINDS)
    def test_context_is_as_long_as_asked_for(self, loaded: LoadedModel, task: Ruler, kind: str) -> None:
        seen = task.run(loaded, DENSE, f"{kind} seed=1").footprint.stored_bytes
        assert 0.7 * 2500 < seen <= 2500
        if kind in ("multi-value", "multi-query", "variable-tracking"):
            assert seen == 2500

    def test_progress(self, loaded: LoadedModel, task: Ruler) -> None:
        loaded.model.reply, seen = "nowhere", []
        task.run(loaded, DENSE, "multi-query seed=0", lambda *step: seen.append(step))
        assert seen == [("dense: decode", 1, 64)]

    def test_the_answer_must_come_from_this_case(self, loaded: LoadedModel, task: Ruler) -> None:
        loaded.model.reply = " ".join(task.run(loaded, DENSE, "multi-query seed=0").predictions[0]["wanted"])
        assert task.run(loaded, DENSE, "multi-query seed=0").metrics["score"] == 1
        assert task.run(loaded, DENSE, "multi-query seed=1").metrics["score"] == 0

    def test_a_spectral_cache_that_loses_nothing(
        self, tiny_llama: Callable[..., LlamaForCausalLM], character_tokenizer: Any, document: str
    ) -> None:
        loaded = LoadedModel(tiny_llama(initializer_range=0.2), character_tokenizer, "tiny")
        task = Ruler(document=document, kinds=("multi-value",), num_cases=1, context_length=700)

        def text(make: Callable[[Any], Any]) -> str:
            method = Method("any", "any", make, lambda cache: Footprint(cache.get_seq_length(), 1, None))
            outcome = task.run(loaded, method, "multi-value seed=0")
            assert outcome.footprint.stored_bytes == 700
            return outcome.predictions[0]["text"]

        def spectral(tail: int) -> Callable[[Any], Any]:
            config = SpectralConfig(rank_keys=1, rank_values=1, block_size=32, residual_length=tail)
            return lambda model: SpectralCache(model, config=config)

        dense = text(lambda model: DynamicCache(config=model.config))
        # A tail longer than the text loses nothing.
        assert dense == text(spectral(2048))
        assert dense != text(spectral(16))


@pytest.mark.parametrize(
    ("text", "expected"), [("", 0), ("Alpha", 0.5), ("beta, alpha", 1), ("alphabeta", 1), ("gamma alph", 0)]
)
def test_score(text: str, expected: float) -> None:
    assert score(text, ("alpha", "BETA")) == expected


def test_options_out_of_range(loaded: LoadedModel, task: Ruler) -> None:
    with pytest.raises(InvalidArgumentError, match=r"kinds must be among multi-value, .*, got 'needle'"):
        Ruler(kinds=("needle",))
    with pytest.raises(InvalidArgumentError, match="num_cases must be an integer of at least 1, got 0"):
        Ruler(num_cases=0)
    with pytest.raises(InvalidArgumentError, match=r"context_length must be at least \d+ for the hidden sentences"):
        Ruler(context_length=50).run(loaded, DENSE, "multi-value seed=0")
    with pytest.raises(InvalidArgumentError, match="case must be one of"):
        task.run(loaded, DENSE, "multi-value")
