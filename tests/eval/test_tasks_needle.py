"""Needles: a cache that remembers finds them all, one that forgets finds none, and cases are always the same."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from recall import recall_loaded, recall_method
from transformers import DynamicCache, LlamaForCausalLM

from unsloth_spectral import SpectralCache, SpectralConfig
from unsloth_spectral.errors import InvalidArgumentError, LoadError
from unsloth_spectral.eval.methods.base import Footprint, Method
from unsloth_spectral.eval.tasks.haystack import CITIES, hide, made_up_words, numbers, spread
from unsloth_spectral.eval.tasks.needle import NeedleDepth, Needles, draw_facts, is_number
from unsloth_spectral.eval.tasks.registry import TASKS
from unsloth_spectral.eval.tasks.ruler import Ruler
from unsloth_spectral.integrations.models import LoadedModel

DENSE, FORGETFUL = recall_method("dense", 10_000), recall_method("forgetful", 40)
LENGTH = 1500
# Spans that hold the newer half and quarter of the context once question and answer have taken their room.
HALF, QUARTER = LENGTH // 2 + 140, LENGTH // 4 + 140


@pytest.fixture
def loaded() -> LoadedModel:
    return recall_loaded()


@pytest.fixture
def task(document: str) -> Needles:
    return Needles(document=document, num_facts=8, num_cases=2, context_length=LENGTH)


class TestNeedles:
    def test_all_are_found_or_none(self, loaded: LoadedModel, task: Needles) -> None:
        dense = task.run(loaded, DENSE, "seed=0")
        assert dense.metrics == {"retrieved": 1, "facts_found": 8, "kept": 1}
        assert dense.footprint.stored_bytes == LENGTH
        assert task.run(loaded, FORGETFUL, "seed=0").metrics == {"retrieved": 0, "facts_found": 0, "kept": 0}

    def test_some_are_found(self, loaded: LoadedModel, task: Needles) -> None:
        """A cache that keeps the newer half of the context keeps half of the facts."""
        half = task.run(loaded, recall_method("half", HALF), "seed=0")
        assert half.metrics == {"retrieved": 0.5, "facts_found": 4, "kept": 0.5}
        assert [prediction["found"] for prediction in half.predictions] == [False] * 4 + [True] * 4

    def test_kept_is_a_share_of_what_dense_finds(self, loaded: LoadedModel, task: Needles) -> None:
        task.run(loaded, recall_method("dense", HALF), "seed=0")
        assert task.run(loaded, recall_method("quarter", QUARTER), "seed=0").metrics["kept"] == 0.5
        # Facts that the dense cache does not find are not counted.
        assert task.run(loaded, recall_method("all", 10_000), "seed=0").metrics["kept"] == 1
        # The other case has its own reference, here worked out anew as no dense run came before.
        assert task.run(loaded, recall_method("half", HALF), "seed=1").metrics["kept"] == 0.5
        task.run(loaded, recall_method("dense", 40), "seed=0")
        assert task.run(loaded, FORGETFUL, "seed=0").metrics["kept"] == 1

    def test_each_fact_is_asked_of_the_cache_as_prefilled(self, loaded: LoadedModel, task: Needles) -> None:
        caches = []
        method = Method("dense", "dense", lambda model: caches.append(DENSE.make_cache(model)) or caches[-1],
                        DENSE.footprint)  # fmt: skip
        predictions = task.run(loaded, method, "seed=0").predictions
        assert len(caches) == 1
        assert len(caches[0].text) == LENGTH
        assert [p["text"].split(".")[0].strip() for p in predictions] == [p["wanted"] for p in predictions]
        for prediction in predictions:
            city = prediction["question"].split()[-1].rstrip("?")
            assert f"{city}: {city} {prediction['wanted']}." in caches[0].text

    def test_cases_are_the_same_every_time(self, loaded: LoadedModel, task: Needles, document: str) -> None:
        again = Needles(document=document, num_facts=8, num_cases=2, context_length=LENGTH)
        assert task.cases(loaded) == again.cases(loaded) == ["seed=0", "seed=1"]
        first, second = (tested_task.run(loaded, DENSE, "seed=0").predictions for tested_task in (task, again))
        assert first == second != task.run(loaded, DENSE, "seed=1").predictions

    def test_progress(self, loaded: LoadedModel, task: Needles) -> None:
        seen: list[tuple[str, int, int]] = []
        task.run(loaded, DENSE, "seed=0", lambda *step: seen.append(step))
        assert seen == [("dense: facts", done, 8) for done in range(1, 9)]

    def test_a_spectral_cache_that_loses_nothing(
        self, tiny_llama: Callable[..., LlamaForCausalLM], character_tokenizer: Any, document: str
    ) -> None:
        """A random model finds nothing, but writes the same text after both caches, and another after a poor one."""
        loaded = LoadedModel(tiny_llama(initializer_range=0.2), character_tokenizer, "tiny")
        task = Needles(document=document, num_facts=3, context_length=400)
        texts = []
        for tail in (None, 1024, 16):
            # A tail longer than the text loses nothing.
            config = SpectralConfig(rank_keys=1, rank_values=1, block_size=32, residual_length=tail or 16)
            method = Method(
                "dense" if tail is None else f"spectral {tail}", "any",
                lambda model, config=config, tail=tail: (
                    DynamicCache(config=model.config) if tail is None else SpectralCache(model, config=config)
                ),
                lambda cache: Footprint(cache.get_seq_length(), 1, None),
            )  # fmt: skip
            outcome = task.run(loaded, method, "seed=0")
            assert outcome.footprint.stored_bytes == 400
            texts.append([prediction["text"] for prediction in outcome.predictions])
        assert texts[0] == texts[1] != texts[2]


class TestDepth:
    def test_grid(self, loaded: LoadedModel, document: str) -> None:
        task = NeedleDepth(document=document, lengths=(300, 600), num_depths=3)
        cases = task.cases(loaded)
        assert cases == [
            f"length={length} depth={depth}" for length in (300, 600) for depth in ("0.00", "0.50", "1.00")
        ]
        for case in cases:
            outcome = task.run(loaded, DENSE, case)
            assert outcome.metrics == {"retrieved": 1}
            assert outcome.footprint.stored_bytes == int(case.split()[0].removeprefix("length="))
        retrieved = [task.run(loaded, recall_method("half", 300), case).metrics["retrieved"] for case in cases]
        # Question and answer take room of the 300 tokens too: what stands first is pushed out.
        assert retrieved == [0, 1, 1, 0, 0, 1]
        assert all(task.run(loaded, FORGETFUL, case).metrics["retrieved"] == 0 for case in cases[:2])

    def test_default_has_ten_depths_of_three_lengths(self, loaded: LoadedModel) -> None:
        cases = NeedleDepth(lengths=(128, 256, 512)).cases(loaded)
        assert len(cases) == len(set(cases)) == 30


class TestHaystack:
    def test_whole_sentences_at_their_places(self, loaded: LoadedModel, document: str) -> None:
        def build(depths: list[float]) -> str:
            ids = hide(
                loaded, document, ["First.", "Second."], depths, context_length=200, generator=random.Random(3)
            )  # fmt: skip
            assert ids.shape == (1, 200)
            return loaded.tokenizer.decode(ids[0].tolist())

        assert build([0, 1]).startswith("\n\nFirst.\n\n")
        assert build([0, 1]).endswith("\n\nSecond.\n\n")
        text = build(spread(2))
        assert text.index("First") == pytest.approx(50, abs=6)
        assert text.index("Second") == pytest.approx(147, abs=6)
        assert text.replace("\n\nFirst.\n\n", "").replace("\n\nSecond.\n\n", "") in document

    def test_no_room(self, loaded: LoadedModel, document: str) -> None:
        with pytest.raises(InvalidArgumentError, match="at least 10 for the hidden sentences, got 9"):
            hide(loaded, document, ["First."], [0.5], context_length=9, generator=random.Random(0))
        with pytest.raises(LoadError, match="has 5 tokens and 90 are needed"):
            hide(loaded, "short", ["First."], [0.5], context_length=100, generator=random.Random(0))

    def test_names_and_numbers_differ(self) -> None:
        generator = random.Random(0)
        words, drawn = made_up_words(500, generator), numbers(500, generator, 3)
        assert len(set(words)) == len(set(drawn)) == 500
        assert all(100 <= int(number) < 1000 for number in drawn)
        facts = draw_facts(len(CITIES), 4, generator)
        assert len({fact.city for fact in facts}) == len(CITIES)


@pytest.mark.parametrize(
    ("text", "right"),
    [(" 4821.", True), ("4821", True), (" 48210", False), (" 482", False), ("", False), (" 1, 4821", False)],
)
def test_the_whole_first_number_counts(text: str, right: bool) -> None:
    assert is_number(text, "4821") is right


def test_the_registry_makes_fresh_tasks_under_their_names() -> None:
    assert list(TASKS) == ["fidelity", "needle", "needle-depth", "ruler", "drift", "lengths"]
    for name, make in TASKS.items():
        assert make().name == name
        assert make() is not make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_facts": 0}, "num_facts must be an integer of at least 1, got 0"),
        ({"num_facts": 1000}, "num_facts must be at most"),
        ({"digits": 1}, "digits must be an integer of at least 2, got 1"),
        ({"num_cases": True}, "num_cases must be an integer of at least 1, got True"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        Needles(**options)


def test_what_the_model_or_the_user_has_not(loaded: LoadedModel, task: Needles) -> None:
    with pytest.raises(InvalidArgumentError, match=r"needs 4,224 positions, but recall has 4,096: lower"):
        Needles(context_length=4096).cases(loaded)
    with pytest.raises(InvalidArgumentError, match="case must be one of seed=0, seed=1, got 'seed=2'"):
        task.run(loaded, DENSE, "seed=2")
    with pytest.raises(InvalidArgumentError, match=r"needs 8,320 positions, but recall has 4,096: lower its lengths"):
        NeedleDepth(lengths=(1024, 8192)).cases(loaded)
    with pytest.raises(InvalidArgumentError, match="lengths must be an integer of at least 1, got 0"):
        NeedleDepth(lengths=())


def test_a_document_too_short_is_refused_before_anything_runs(loaded: LoadedModel) -> None:
    for task in (Needles(document="a" * 3999, context_length=2048), Ruler(document="a" * 2048)):
        assert task.cases(loaded)
    for task in (Needles(document="a" * 2047, context_length=2048), Ruler(document="a" * 2047),
                 NeedleDepth(document="a" * 2047, lengths=(512, 2048))):  # fmt: skip
        with pytest.raises(LoadError, match="has 2,047 tokens and 2,048 are needed: give a longer document"):
            task.cases(loaded)
