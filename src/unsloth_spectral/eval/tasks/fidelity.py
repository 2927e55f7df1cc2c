"""Fidelity: agreement with the dense cache on real text, under teacher forcing."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unsloth_spectral.eval.methods.base import Method
from unsloth_spectral.eval.progress import OnProgress
from unsloth_spectral.eval.tasks.asking import at_least, check_case, check_positions
from unsloth_spectral.eval.tasks.base import Outcome
from unsloth_spectral.eval.tasks.dense_reference import DenseReference
from unsloth_spectral.eval.tasks.forced import check_starts, read_on, slice_of
from unsloth_spectral.integrations.models import LoadedModel


@dataclass(slots=True, kw_only=True)
class Fidelity:
    """Teacher-forced agreement with the dense cache: each case is a slice of a document.

    ``context_length`` tokens are prefilled, the chat format's opening included, and the next ``continuation_length``
    follow in one forward pass, each seeing the true tokens before it. Metrics, over those positions: ``kl`` (mean
    Kullback-Leibler divergence from the dense cache's distribution, nats), ``top1_agreement`` (share of positions
    where both prefer the same token), ``perplexity`` of the true next tokens, ``perplexity_change`` (from the dense
    cache's). Series: the method's figures of each layer, such as ``bits_keys``.

    Args:
        document: the text; None is the default document.
        starts: tokens of the document where the slices begin.
        context_length: tokens prefilled.
        continuation_length: tokens scored.

    Raises:
        InvalidArgumentError: an option is out of its range.
    """

    document: str | None = None
    starts: tuple[int, ...] = (20_000, 50_000, 80_000)
    context_length: int = 4096
    continuation_length: int = 256
    _reference: DenseReference[Tensor] = field(default_factory=DenseReference, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        at_least(1, context_length=self.context_length, continuation_length=self.continuation_length)
        at_least(1, starts=len(self.starts))
        for start in self.starts:
            at_least(0, starts=start)

    @property
    def name(self) -> str:
        return "fidelity"

    def cases(self, loaded: LoadedModel) -> Sequence[str]:
        needed = self.context_length + self.continuation_length
        check_positions(loaded, needed)
        check_starts(loaded, self.document, self.starts, needed + 1)
        return [f"start={start}" for start in self.starts]

    @torch.inference_mode()
    def run(self, loaded: LoadedModel, method: Method, case: str, on_progress: OnProgress | None = None) -> Outcome:
        start = self.starts[check_case(case, self.cases(loaded))]
        prompt = slice_of(
            loaded,
            self.document,
            start,
            context_length=self.context_length,
            continuation_length=self.continuation_length + 1,
        )
        filled, agreement = read_on(loaded, method, case, prompt, self._reference, on_progress)
        return Outcome(agreement.to_dict(), filled.footprint, series=filled.by_layer)
