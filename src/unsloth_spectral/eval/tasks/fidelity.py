"""How close the model stays to itself on real text it is forced to read."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unsloth_spectral.eval.documents import default_document, tokens_of
from unsloth_spectral.eval.fidelity import compare_logits
from unsloth_spectral.eval.methods.base import Method
from unsloth_spectral.eval.progress import OnProgress, layers_reported
from unsloth_spectral.eval.prompt import Prompt, build_prompt
from unsloth_spectral.eval.tasks.asking import (
    DENSE,
    at_least,
    check_case,
    check_positions,
    continue_on,
    prefill,
    prefill_dense,
)
from unsloth_spectral.eval.tasks.base import Outcome
from unsloth_spectral.integrations.models import LoadedModel


@dataclass(frozen=True, slots=True)
class _Kept:
    """Logits ``[continuation_length, vocabulary]`` of the dense cache, and what they belong to."""

    loaded: LoadedModel
    case: str
    logits: Tensor


@dataclass(slots=True, kw_only=True)
class Fidelity:
    """Teacher-forced agreement with the dense cache: each case is a slice of a document.

    ``context_length`` tokens are prefilled, the chat format's opening included, and the next ``continuation_length``
    follow in one forward pass, each seeing the true ones before it. Metrics, over those positions: ``kl`` (mean
    Kullback-Leibler divergence from the dense cache's distribution, nats), ``top1_agreement`` (share of positions
    where both prefer the same token), ``perplexity`` of the true next tokens, ``perplexity_change`` (less the dense
    cache's).

    Args:
        document: the text; None is the default document.
        starts: the document's tokens where the slices begin.
        context_length, continuation_length: tokens.

    Raises:
        InvalidArgumentError: an option is out of its range.
    """

    document: str | None = None
    starts: tuple[int, ...] = (20_000, 50_000, 80_000)
    context_length: int = 4096
    continuation_length: int = 256
    _kept: _Kept | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        at_least(1, context_length=self.context_length, continuation_length=self.continuation_length)
        at_least(1, starts=len(self.starts))
        for start in self.starts:
            at_least(0, starts=start)

    @property
    def name(self) -> str:
        return "fidelity"

    def cases(self, loaded: LoadedModel) -> Sequence[str]:
        check_positions(loaded, self.context_length + self.continuation_length)
        return [f"start={start}" for start in self.starts]

    @torch.inference_mode()
    def run(self, loaded: LoadedModel, method: Method, case: str, on_progress: OnProgress | None = None) -> Outcome:
        start = self.starts[check_case(case, self.cases(loaded))]
        prompt = self._slice(loaded, start)
        context, continuation = prompt.context, prompt.continuation
        filled = prefill(loaded, method, context, on_progress)
        with layers_reported(loaded.model, f"{method.name}: continuation", on_progress):
            logits = continue_on(loaded, filled.cache, continuation[:, :-1])
        if method.name == DENSE:
            self._kept = _Kept(loaded, case, logits)
        elif self._kept is None or self._kept.loaded is not loaded or self._kept.case != case:
            dense = continue_on(loaded, prefill_dense(loaded, context), continuation[:, :-1])
            self._kept = _Kept(loaded, case, dense)
        result = compare_logits(self._kept.logits, logits, continuation[0, 1:].to(logits.device))
        return Outcome(result.to_dict(), filled.footprint)

    def _slice(self, loaded: LoadedModel, start: int) -> Prompt:
        needed = start + self.context_length + self.continuation_length + 1
        document = default_document() if self.document is None else self.document
        return build_prompt(
            loaded.tokenizer,
            tokens_of(document, loaded.tokenizer, needed),
            "",
            context_length=self.context_length,
            start=start,
            continuation_length=self.continuation_length + 1,
        )
