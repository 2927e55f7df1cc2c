"""Lengths: compression factor and fidelity by prefix length."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unsloth_spectral.eval.methods.base import Method
from unsloth_spectral.eval.progress import OnProgress
from unsloth_spectral.eval.tasks.asking import at_least, check_case, check_positions, positions_of
from unsloth_spectral.eval.tasks.base import Outcome
from unsloth_spectral.eval.tasks.dense_reference import DenseReference
from unsloth_spectral.eval.tasks.forced import check_starts, read_on, slice_of
from unsloth_spectral.integrations.models import LoadedModel


@dataclass(slots=True, kw_only=True)
class Lengths:
    """Bytes and agreement with the dense cache behind prefixes of several lengths.

    All prefixes of a slice end at the same token, so that the same ``continuation_length`` tokens are scored at every
    length. Metrics: ``factor`` (bytes of a dense cache over stored bytes of the whole cache after the prefill, exact
    tiers included), ``cold_bits_per_element`` (of the compressed tokens, where there are any), ``kl`` (mean
    Kullback-Leibler divergence from the dense cache's distribution, nats).

    Args:
        document: the text; None is the default document.
        lengths: tokens prefilled, the chat format's opening included. Lengths beyond the model's positions are left
            out. The longest leaves room for the continuation in SmolLM2's 8,192.
        starts: tokens of the document where the longest prefixes begin.
        continuation_length: tokens scored.

    Raises:
        InvalidArgumentError: an option is out of its range.
    """

    document: str | None = None
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8064)
    starts: tuple[int, ...] = (20_000,)
    continuation_length: int = 128
    _reference: DenseReference[Tensor] = field(default_factory=DenseReference, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        at_least(1, lengths=len(self.lengths), starts=len(self.starts), continuation_length=self.continuation_length)
        for length in self.lengths:
            at_least(1, lengths=length)
        for start in self.starts:
            at_least(0, starts=start)

    @property
    def name(self) -> str:
        return "lengths"

    def cases(self, loaded: LoadedModel) -> Sequence[str]:
        grid = self._grid(loaded)
        check_starts(loaded, self.document, self.starts, grid[-1][0] + self.continuation_length + 1)
        named = [f"length={length}" for length, _ in grid]
        return named if len(self.starts) == 1 else [f"{n} start={s}" for n, (_, s) in zip(named, grid, strict=True)]

    @torch.inference_mode()
    def run(self, loaded: LoadedModel, method: Method, case: str, on_progress: OnProgress | None = None) -> Outcome:
        grid = self._grid(loaded)
        length, start = grid[check_case(case, self.cases(loaded))]
        longest = grid[-1][0]
        prompt = slice_of(
            loaded,
            self.document,
            start + longest - length,
            context_length=length,
            continuation_length=self.continuation_length + 1,
        )
        filled, agreement = read_on(loaded, method, case, prompt, self._reference, on_progress)
        footprint = filled.footprint
        metrics = {"factor": footprint.dense_bytes / footprint.stored_bytes, "kl": agreement.kl}
        if footprint.cold_bits_per_element is not None:
            metrics["cold_bits_per_element"] = footprint.cold_bits_per_element
        return Outcome(metrics, footprint)

    def _grid(self, loaded: LoadedModel) -> list[tuple[int, int]]:
        """Length and start of each case, the longest last."""
        check_positions(loaded, min(self.lengths) + self.continuation_length, option="lengths")
        limit = positions_of(loaded)
        lengths = sorted(n for n in set(self.lengths) if limit is None or n + self.continuation_length <= limit)
        return [(length, start) for length in lengths for start in self.starts]
