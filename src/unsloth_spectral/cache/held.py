"""All that a layer holds at one time, so that a change of several tiers is one assignment."""

from copy import copy
from dataclasses import dataclass, field, replace

from torch import Tensor

from unsloth_spectral.cache.buffer import TokenBuffer
from unsloth_spectral.cache.counting import Tally
from unsloth_spectral.cache.positions import PositionLog
from unsloth_spectral.cache.sampler import QuerySampler
from unsloth_spectral.cache.sinks import Sinks
from unsloth_spectral.codec.block import Block
from unsloth_spectral.codec.tensors import TensorFunction


@dataclass(slots=True, eq=False)
class Held:
    """Attributes:
    sinks: the exact first tokens; None before the first sealing, and where none are wanted.
    cold: sealed tokens, oldest first.
    residual: the newest tokens; None in an empty layer.
    padding: ``[B]`` masked tokens at the start of each row, until the first sealing.
    positions, queries: what is known of the residual's tokens.
    newest: how many tokens came last.
    tally: what the sealings came to.
    """

    sinks: Sinks | None = None
    cold: list[Block] = field(default_factory=list)
    residual: TokenBuffer | None = None
    padding: Tensor | None = None
    positions: PositionLog = field(default_factory=PositionLog)
    queries: QuerySampler = field(default_factory=QuerySampler)
    newest: int = 0
    tally: Tally = field(default_factory=Tally)

    @property
    def num_before_residual(self) -> int:
        leading = 0 if self.sinks is None else self.sinks.num_leading
        return leading + sum(block.num_tokens for block in self.cold)

    def crop(self, num_tokens: int) -> "Held":
        """The first ``num_tokens`` tokens, no fewer than there are sinks. Sealed blocks are cut, not encoded again."""
        assert self.residual is not None, "an empty layer has no tokens to keep"
        kept_residual = max(0, num_tokens - self.num_before_residual)
        positions, queries = copy(self.positions), copy(self.queries)
        positions.crop(kept_residual)
        queries.crop(num_tokens)
        sinks = None if self.sinks is None else self.sinks.crop(num_tokens)
        cold: list[Block] = []
        room = num_tokens - (0 if sinks is None else sinks.num_leading)
        for block in self.cold:
            if room > 0:
                cold.extend([block] if room >= block.num_tokens else block.first_tokens(room))
            room -= block.num_tokens
        residual = self.residual.copy(0, kept_residual)
        return replace(self, sinks=sinks, cold=cold, residual=residual, positions=positions, queries=queries)

    def map_batch(self, function: TensorFunction) -> "Held":
        """The same with ``function`` applied along the batch dimension."""
        positions, queries = copy(self.positions), copy(self.queries)
        positions.map_batch(function)
        queries.map_batch(function)
        return replace(
            self,
            sinks=None if self.sinks is None else self.sinks.map_batch(function),
            cold=[block.map_batch(function) for block in self.cold],
            residual=None if self.residual is None else self.residual.map_batch(function),
            padding=None if self.padding is None else function(self.padding),
            positions=positions,
            queries=queries,
        )
