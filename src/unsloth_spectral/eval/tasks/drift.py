"""Drift: how far a long greedy generation stays equal to the dense cache's."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unsloth_spectral.eval.agreement import compare_logits
from unsloth_spectral.eval.methods.base import DENSE, Method
from unsloth_spectral.eval.progress import OnProgress
from unsloth_spectral.eval.prompt import row_of
from unsloth_spectral.eval.tasks.asking import (
    at_least,
    check_case,
    check_positions,
    continue_on,
    end_tokens,
    prefill,
    prefill_dense,
)
from unsloth_spectral.eval.tasks.base import Outcome
from unsloth_spectral.eval.tasks.dense_reference import DenseReference
from unsloth_spectral.eval.tasks.forced import check_starts, slice_of
from unsloth_spectral.integrations.models import LoadedModel


@dataclass(frozen=True, slots=True)
class _Generated:
    """The dense cache's generation: tokens and the logits ``[num_tokens, vocabulary]`` that chose them."""

    tokens: list[int]
    logits: Tensor


@dataclass(slots=True, kw_only=True)
class Drift:
    """``num_tokens`` tokens generated greedily after a prefix of a document and a request.

    The dense cache's tokens are then fed to each cache one at a time, so that it seals while decoding, as in use.
    Metrics: ``first_difference``, the index of the first token at which this cache prefers another token
    (``num_tokens`` if there is none); up to there its own greedy generation equals the dense one, so it need not be
    run. ``kl``, the mean Kullback-Leibler divergence from the dense cache's distribution, in nats. Series: ``kl`` of
    each token. End tokens are never chosen, so that all caches read the same tokens.

    Args:
        document: the text; None is the default document.
        starts: tokens of the document where the prefixes begin.
        context_length: tokens prefilled.
        num_tokens: tokens generated.
        request: the request behind the prefix.

    Raises:
        InvalidArgumentError: an option is out of its range.
    """

    document: str | None = None
    starts: tuple[int, ...] = (20_000,)
    context_length: int = 4096
    num_tokens: int = 512
    request: str = "Explain the text above in detail."
    _reference: DenseReference[_Generated] = field(
        default_factory=DenseReference, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        at_least(1, starts=len(self.starts), context_length=self.context_length, num_tokens=self.num_tokens)
        for start in self.starts:
            at_least(0, starts=start)

    @property
    def name(self) -> str:
        return "drift"

    def cases(self, loaded: LoadedModel) -> Sequence[str]:
        check_positions(loaded, self.context_length + self.num_tokens + 128)
        check_starts(loaded, self.document, self.starts, self.context_length)
        return [f"start={start}" for start in self.starts]

    @torch.inference_mode()
    def run(self, loaded: LoadedModel, method: Method, case: str, on_progress: OnProgress | None = None) -> Outcome:
        start = self.starts[check_case(case, self.cases(loaded))]
        prompt = slice_of(
            loaded,
            self.document,
            start,
            context_length=self.context_length,
            continuation_length=0,
            request=self.request,
        )
        filled, is_dense = prefill(loaded, method, prompt.context, on_progress), method.name == DENSE

        def generate() -> _Generated:
            cache = filled.cache if is_dense else prefill_dense(loaded, prompt.context)
            return self._generate(loaded, cache, prompt.question, on_progress)

        dense, ends = self._reference.get(loaded, case, generate, anew=is_dense), _end_ids(loaded)
        divergence: list[float] = []
        first = self.num_tokens
        step_ids = prompt.question
        for step, token in enumerate(dense.tokens):
            dense_row = dense.logits[step : step + 1]
            # These rows come from the dense cache itself.
            row = dense_row if is_dense else _next(loaded, filled.cache, step_ids, ends)
            target = row_of([token])[0].to(row.device)
            divergence.append(compare_logits(dense_row, row, target).kl)
            if first == self.num_tokens and int(row.argmax()) != token:
                first = step
            step_ids = row_of([token])
            if on_progress is not None:
                on_progress(f"{method.name}: decode", step + 1, self.num_tokens)
        metrics = {"first_difference": float(first), "kl": sum(divergence) / len(divergence)}
        same = str(loaded.tokenizer.decode(dense.tokens[:first]))
        prediction = {"dense": str(loaded.tokenizer.decode(dense.tokens)), "same": same}
        return Outcome(metrics, filled.footprint, [prediction], {"kl": divergence})

    def _generate(
        self, loaded: LoadedModel, cache: Any, question: Tensor, on_progress: OnProgress | None
    ) -> _Generated:
        ends, tokens, rows = _end_ids(loaded), [], []
        step_ids = question
        for step in range(self.num_tokens):
            rows.append(_next(loaded, cache, step_ids, ends))
            tokens.append(int(rows[-1].argmax()))
            step_ids = row_of(tokens[-1:])
            if on_progress is not None:
                on_progress(f"{DENSE}: generation", step + 1, self.num_tokens)
        return _Generated(tokens, torch.cat(rows))


def _end_ids(loaded: LoadedModel) -> Tensor:
    return torch.tensor(sorted(end_tokens(loaded)), dtype=torch.int64, device=loaded.model.device)


def _next(loaded: LoadedModel, cache: Any, tokens: Tensor, ends: Tensor) -> Tensor:
    """Logits ``[1, vocabulary]`` of the token after ``tokens [1, n]``, with end tokens ruled out."""
    row = continue_on(loaded, cache, tokens)[-1:].clone()
    row[:, ends] = -torch.inf
    return row
