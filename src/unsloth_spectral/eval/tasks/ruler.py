"""RULER-style problems of ``ruler_kinds``, asked of a model."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.eval.methods.base import Method
from unsloth_spectral.eval.progress import OnProgress
from unsloth_spectral.eval.tasks.asking import (
    at_least,
    check_case,
    check_positions,
    closing_ids,
    decode_on,
    ids_of,
    opening_ids,
    prefill,
)
from unsloth_spectral.eval.tasks.base import Outcome
from unsloth_spectral.eval.tasks.haystack import check_document, hide, spread
from unsloth_spectral.eval.tasks.ruler_kinds import KINDS, Problem
from unsloth_spectral.integrations.models import LoadedModel

_NEW_TOKENS = 64


@dataclass(slots=True, kw_only=True)
class Ruler:
    """Retrieval, tracing and counting over a long context (RULER, Hsieh et al. 2024): metric ``score``.

    The score of a case is the share of the wanted strings in the answer, in any case and order. The context is
    prefilled before the question is known, as in use: a cache is compressed once and asked later.

    Args:
        document: the text to hide sentences in; None is the default document.
        kinds: names of ``KINDS``.
        num_cases: of each kind, from seeds 0, 1, ...
        context_length: tokens prefilled; word lists fill nearly as many.

    Raises:
        InvalidArgumentError: an option is out of its range.
    """

    document: str | None = None
    kinds: tuple[str, ...] = tuple(KINDS)
    num_cases: int = 3
    context_length: int = 2048

    def __post_init__(self) -> None:
        at_least(1, kinds=len(self.kinds), num_cases=self.num_cases, context_length=self.context_length)
        for kind in self.kinds:
            if kind not in KINDS:
                raise InvalidArgumentError(f"kinds must be among {', '.join(KINDS)}, got {kind!r}")

    @property
    def name(self) -> str:
        return "ruler"

    def cases(self, loaded: LoadedModel) -> Sequence[str]:
        check_positions(loaded, self.context_length + 256)
        check_document(loaded, self.document, self.context_length)
        return [f"{kind} seed={seed}" for kind in self.kinds for seed in range(self.num_cases)]

    @torch.inference_mode()
    def run(self, loaded: LoadedModel, method: Method, case: str, on_progress: OnProgress | None = None) -> Outcome:
        index = check_case(case, self.cases(loaded))
        kind, seed = self.kinds[index // self.num_cases], index % self.num_cases
        # A string, so that kinds with equal seeds draw different words.
        generator = random.Random(f"{kind} {seed}")
        room = self.context_length - opening_ids(loaded).shape[1]
        problem = KINDS[kind](generator, room)
        context = self._context(loaded, problem, generator)
        filled = prefill(loaded, method, context, on_progress)
        closing = closing_ids(loaded, problem.question, problem.answer)
        # This is the only question to this cache, so it needs no copy.
        stage = f"{method.name}: decode"
        text = decode_on(loaded, filled.cache, closing, _NEW_TOKENS, stage=stage, on_progress=on_progress)
        prediction = {"question": problem.question, "wanted": list(problem.wanted), "text": text}
        return Outcome({"score": score(text, problem.wanted)}, filled.footprint, [prediction])

    def _context(self, loaded: LoadedModel, problem: Problem, generator: random.Random) -> Tensor:
        """The context, at most ``context_length`` tokens ``[1, n]``; text fills it up around hidden sentences."""
        if problem.is_text:
            return hide(
                loaded,
                self.document,
                problem.sentences,
                spread(len(problem.sentences)),
                context_length=self.context_length,
                generator=generator,
            )
        context = torch.cat([opening_ids(loaded), ids_of(loaded, " ".join(problem.sentences))], dim=1)
        # This cuts off the end of a shuffled list, so the wanted words stay the most frequent ones.
        return context[:, : self.context_length]


def score(text: str, wanted: Sequence[str]) -> float:
    """The share of ``wanted`` strings in ``text``, ignoring case."""
    return sum(string.lower() in text.lower() for string in wanted) / len(wanted)
