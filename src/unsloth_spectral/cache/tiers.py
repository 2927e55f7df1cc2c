"""The contents of a layer in one object, so that a change of several tiers is one assignment."""

from copy import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from unsloth_spectral.cache.layer_stats import Tally
from unsloth_spectral.cache.positions import PositionLog
from unsloth_spectral.cache.queries import QuerySampler
from unsloth_spectral.cache.residual import ResidualBuffer
from unsloth_spectral.cache.sink_tokens import SinkTokens
from unsloth_spectral.codec.block import Block, ExactBlock
from unsloth_spectral.codec.registry import block_from_fields, block_to_fields
from unsloth_spectral.codec.tensors import TensorFunction, TokenShape
from unsloth_spectral.fields import Field, Fields

# The position of a row's first seen token, if no token of the row was seen.
NEVER = torch.iinfo(torch.int64).max


def padding_within(padding: Tensor, num_tokens: int) -> Tensor:
    """``padding [B]`` after a crop to ``num_tokens`` tokens: a row without seen tokens among them has yet to begin."""
    return torch.where(padding < num_tokens, padding, NEVER)


@dataclass(slots=True, eq=False)
class Tiers:
    """Attributes:
    sinks: the exact first tokens; None before the first sealing, or if ``num_sink_tokens`` is 0.
    cold: sealed tokens, oldest first.
    residual: the newest tokens; None in an empty layer.
    padding: ``[B]`` on the CPU, tokens at the start of each row that no query has seen so far, more than the row has if
        none was seen; None before the first query, and once the sealed part of every row has text.
    positions, queries: positions of the residual's tokens, and sampled queries.
    newest: the number of tokens in the last ``append``.
    tally: running totals over the sealings.
    """

    sinks: SinkTokens | None = None
    cold: list[Block] = field(default_factory=list)
    residual: ResidualBuffer | None = None
    padding: Tensor | None = None
    positions: PositionLog = field(default_factory=PositionLog)
    queries: QuerySampler = field(default_factory=QuerySampler)
    newest: int = 0
    tally: Tally = field(default_factory=Tally)

    @property
    def num_before_residual(self) -> int:
        leading = 0 if self.sinks is None else self.sinks.num_leading
        return leading + sum(block.num_tokens for block in self.cold)

    def crop(self, num_tokens: int) -> "Tiers":
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
        return replace(
            self,
            sinks=sinks,
            cold=cold,
            residual=self.residual.copy(0, kept_residual),
            padding=None if self.padding is None else padding_within(self.padding, num_tokens),
            positions=positions,
            queries=queries,
        )

    def map_batch(self, function: TensorFunction) -> "Tiers":
        """The tiers with ``function`` applied along the batch dimension."""
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

    @property
    def shape(self) -> TokenShape:
        """The common shape of the tokens; the layer must not be empty."""
        assert self.residual is not None, "an empty layer has no shape"
        keys, values = self.residual.block.keys, self.residual.block.values
        return TokenShape(keys.shape[0], keys.shape[1], keys.shape[-1], values.shape[-1], keys.dtype, values.dtype)

    def to_fields(self) -> dict[str, Field]:
        """The stored form; the layer must not be empty."""
        assert self.residual is not None, "an empty layer is stored as none"
        shape = self.shape
        return {
            "shape": [shape.batch, shape.heads, shape.key_dim, shape.value_dim],
            "dtype": str(shape.dtype).removeprefix("torch."),
            "value_dtype": str(shape.value_dtype).removeprefix("torch."),
            "sinks": None if self.sinks is None else self.sinks.to_fields(),
            "cold": [block_to_fields(block) for block in self.cold],
            "residual": self.residual.block.to_fields(),
            "padding": self.padding,
            "positions": self.positions.to_fields(),
            "queries": self.queries.to_fields(),
            "newest": self.newest,
            "tally": self.tally.to_fields(),
        }

    @classmethod
    def from_fields(cls, fields: Fields) -> "Tiers":
        """The tiers that ``to_fields`` stored.

        Raises:
            LoadError: a field is missing, or does not fit the others.
        """
        sizes = fields.integers("shape", 1)
        fields.require(len(sizes) == 4, "a shape of four sizes")
        batch, heads, key_dim, value_dim = sizes
        shape = TokenShape(batch, heads, key_dim, value_dim, fields.dtype("dtype"), fields.dtype("value_dtype"))
        residual = ExactBlock.from_fields(fields.sub("residual"), shape)
        cold = [block_from_fields(block, shape) for block in fields.subs("cold")]
        tiers = cls(None, cold, ResidualBuffer(residual.keys, residual.values))
        num_tokens = tiers.num_before_residual + residual.num_tokens
        if fields.has("sinks"):
            tiers.sinks = SinkTokens.from_fields(fields.sub("sinks"), shape, num_tokens)
        if fields.has("padding"):
            tiers.padding = fields.tensor("padding", torch.int64, (shape.batch,), on_host=True)
        tiers.positions = PositionLog.from_fields(fields.sub("positions"), shape)
        tiers.queries = QuerySampler.from_fields(fields.sub("queries"), shape)
        tiers.newest, tiers.tally = fields.integer("newest"), Tally.from_fields(fields.sub("tally"))
        return tiers
