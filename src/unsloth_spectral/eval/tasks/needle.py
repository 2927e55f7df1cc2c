"""Needle: retrieval of facts hidden in real text, after the needle test of Kamradt (2023) and its version with many
keys in RULER (Hsieh et al. 2024)."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.eval.methods.base import DENSE, Method
from unsloth_spectral.eval.progress import OnProgress
from unsloth_spectral.eval.tasks.asking import (
    ask,
    at_least,
    check_case,
    check_positions,
    prefill,
    prefill_dense,
)
from unsloth_spectral.eval.tasks.base import Outcome
from unsloth_spectral.eval.tasks.dense_reference import DenseReference
from unsloth_spectral.eval.tasks.haystack import CITIES, check_document, hide, numbers, spread
from unsloth_spectral.integrations.models import LoadedModel


@dataclass(frozen=True, slots=True)
class Fact:
    """A city and its number.

    The city is named again right before the number: this way a model of 135M parameters tells sixteen facts apart at
    4,096 tokens. With "The secret code of Paris is 4821." it confuses most of them.
    """

    city: str
    number: str

    @property
    def sentence(self) -> str:
        return f"{self.answer} {self.number}."

    @property
    def question(self) -> str:
        return f"What is the secret code of the city of {self.city}?"

    @property
    def answer(self) -> str:
        """The given first words of the answer."""
        return f"The secret code of the city of {self.city}: {self.city}"


def draw_facts(count: int, digits: int, generator: random.Random) -> list[Fact]:
    """Facts with different cities and different numbers."""
    cities = generator.sample(CITIES, count)
    return [Fact(city, number) for city, number in zip(cities, numbers(count, generator, digits), strict=True)]


def is_number(text: str, number: str) -> bool:
    """True if the first number in ``text`` is ``number``, whole."""
    match = re.search(r"\d+", text)
    return match is not None and match.group() == number


@dataclass(slots=True, kw_only=True)
class Needles:
    """Many facts in one context, each asked for separately on a copy of the same prefilled cache.

    A case is a seed that draws the facts and the part of the document. Metrics: ``retrieved`` (share of
    the facts whose number comes back exactly), ``facts_found`` (their count), ``kept`` (share of the facts that the
    dense cache finds which this cache finds too; 1 where the dense cache finds none).

    Args:
        document: the text to hide them in; None is the default document.
        num_facts: at most as many as there are ``CITIES``.
        num_cases: seeds 0, 1, ...
        context_length: tokens prefilled, facts and opening included.
        digits: of each number.

    Raises:
        InvalidArgumentError: an option is out of its range.
    """

    document: str | None = None
    num_facts: int = 16
    num_cases: int = 3
    context_length: int = 4096
    digits: int = 4
    _reference: DenseReference[frozenset[str]] = field(
        default_factory=DenseReference, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        at_least(1, num_facts=self.num_facts, num_cases=self.num_cases, context_length=self.context_length)
        at_least(2, digits=self.digits)
        if self.num_facts > len(CITIES):
            raise InvalidArgumentError(f"num_facts must be at most {len(CITIES)}, got {self.num_facts}")

    @property
    def name(self) -> str:
        return "needle"

    def cases(self, loaded: LoadedModel) -> Sequence[str]:
        check_positions(loaded, self.context_length + 128)
        check_document(loaded, self.document, self.context_length)
        return [f"seed={seed}" for seed in range(self.num_cases)]

    @torch.inference_mode()
    def run(self, loaded: LoadedModel, method: Method, case: str, on_progress: OnProgress | None = None) -> Outcome:
        generator = random.Random(check_case(case, self.cases(loaded)))
        facts = draw_facts(self.num_facts, self.digits, generator)
        context = hide(
            loaded,
            self.document,
            [fact.sentence for fact in facts],
            spread(len(facts)),
            context_length=self.context_length,
            generator=generator,
        )
        filled = prefill(loaded, method, context, on_progress)
        predictions = _ask_each(loaded, filled.cache, facts, method.name, on_progress)
        retrieved = _found(predictions)
        is_dense = method.name == DENSE

        def dense_found() -> frozenset[str]:
            if is_dense:
                return retrieved
            return _found(_ask_each(loaded, prefill_dense(loaded, context), facts, DENSE, on_progress))

        reference = self._reference.get(loaded, case, dense_found, anew=is_dense)
        metrics = {
            "retrieved": len(retrieved) / len(facts),
            "facts_found": float(len(retrieved)),
            "kept": len(retrieved & reference) / len(reference) if reference else 1.0,
        }
        return Outcome(metrics, filled.footprint, predictions)


@dataclass(slots=True, kw_only=True)
class NeedleDepth:
    """One fact in a context, for each of several lengths at each of several depths: metric ``retrieved``, 1 or 0.

    Case names such as ``length=2048 depth=0.30`` are what a heat map is drawn from.

    Args:
        document: the text to hide it in; None is the default document.
        lengths: tokens prefilled, fact and opening included.
        num_depths: from 0 (before all text) to 1 (behind it), at equal distances; at least 2.
        digits: of the number.

    Raises:
        InvalidArgumentError: an option is out of its range.
    """

    document: str | None = None
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    num_depths: int = 10
    digits: int = 4

    def __post_init__(self) -> None:
        at_least(2, num_depths=self.num_depths, digits=self.digits)
        at_least(1, lengths=len(self.lengths))
        for length in self.lengths:
            at_least(1, lengths=length)

    @property
    def name(self) -> str:
        return "needle-depth"

    def cases(self, loaded: LoadedModel) -> Sequence[str]:
        check_positions(loaded, max(self.lengths) + 128, option="lengths")
        check_document(loaded, self.document, max(self.lengths))
        return [f"length={length} depth={depth:.2f}" for length, depth in self._grid()]

    @torch.inference_mode()
    def run(self, loaded: LoadedModel, method: Method, case: str, on_progress: OnProgress | None = None) -> Outcome:
        index = check_case(case, self.cases(loaded))
        length, depth = self._grid()[index]
        generator = random.Random(index)
        facts = draw_facts(1, self.digits, generator)
        sentences = [facts[0].sentence]
        context = hide(loaded, self.document, sentences, [depth], context_length=length, generator=generator)
        filled = prefill(loaded, method, context, on_progress)
        predictions = _ask_each(loaded, filled.cache, facts, method.name, on_progress)
        return Outcome({"retrieved": float(len(_found(predictions)))}, filled.footprint, predictions)

    def _grid(self) -> list[tuple[int, float]]:
        depths = [step / (self.num_depths - 1) for step in range(self.num_depths)]
        return [(length, depth) for length in self.lengths for depth in depths]


def _ask_each(
    loaded: LoadedModel, cache: Any, facts: Sequence[Fact], name: str, on_progress: OnProgress | None
) -> list[dict[str, Any]]:
    """For each fact: the question, the right number, the model's text, and whether the text is right."""
    predictions = []
    for count, fact in enumerate(facts):
        # A space, at most one token per digit, and one more that shows where the number ends.
        text = ask(loaded, cache, fact.question, fact.answer, len(fact.number) + 2)
        predictions.append(
            {"question": fact.question, "wanted": fact.number, "text": text, "found": is_number(text, fact.number)}
        )
        if on_progress is not None:
            on_progress(f"{name}: facts", count + 1, len(facts))
    return predictions


def _found(predictions: Sequence[dict[str, Any]]) -> frozenset[str]:
    return frozenset(str(prediction["wanted"]) for prediction in predictions if prediction["found"])
