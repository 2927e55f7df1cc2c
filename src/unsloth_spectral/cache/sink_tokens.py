"""The first tokens of each sequence, kept exact because every later token attends to them strongly."""

from dataclasses import dataclass

import torch
from torch import Tensor

from unsloth_spectral.codec.block import ExactBlock
from unsloth_spectral.codec.tensors import TensorFunction, TokenShape, storage_bytes
from unsloth_spectral.fields import Field, Fields


@dataclass(frozen=True, slots=True, eq=False)
class SinkTokens:
    """Exact first tokens, one set per row.

    Attributes:
        block: ``[B, H, num_sink_tokens, head_dim]``.
        positions: ``[B, num_sink_tokens]`` if padding gives each row its own sinks; None if they are the first tokens
            of all rows. With positions, the tokens here are copies: the originals stay in the cold tier, masked.
    """

    block: ExactBlock
    positions: Tensor | None = None

    @classmethod
    def of(cls, tokens: ExactBlock, count: int, padding: Tensor | None) -> "SinkTokens":
        """The first ``count`` tokens of each row behind its ``padding [B]`` (None: no row is padded)."""
        if padding is None:
            return cls(ExactBlock(tokens.keys[..., :count, :].clone(), tokens.values[..., :count, :].clone()))
        # A row padded almost to its end takes its sinks from its last tokens.
        first = padding.to(tokens.keys.device).clamp_max(tokens.num_tokens - count)
        positions = first[:, None] + torch.arange(count, dtype=torch.int64, device=first.device)
        return cls(tokens.map_batch(lambda tensor: tensor.gather(-2, _index(positions, tensor))), positions)

    def renewed(self, tokens: ExactBlock, before: int, padding: Tensor) -> "SinkTokens":
        """The sinks, renewed for rows whose text begins among ``tokens``, before which there are ``before`` tokens.

        ``padding [B]`` is where the text of each row begins.
        """
        if self.positions is None:
            return self
        padding = padding.to(self.positions.device)
        late = SinkTokens.of(tokens, self.block.num_tokens, (padding - before).clamp_min(0))
        assert late.positions is not None
        is_late = padding >= before

        def choose(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(is_late.view(-1, *[1] * (new.ndim - 1)), new, old)

        block = ExactBlock(choose(late.block.keys, self.block.keys), choose(late.block.values, self.block.values))
        return SinkTokens(block, choose(late.positions + before, self.positions))

    @property
    def nbytes(self) -> int:
        return self.block.nbytes + (0 if self.positions is None else storage_bytes(self.positions))

    @property
    def num_leading(self) -> int:
        """How many tokens at the start of the sequence are stored here and nowhere else."""
        return self.block.num_tokens if self.positions is None else 0

    def crop(self, num_tokens: int) -> "SinkTokens":
        """The sinks of a sequence cut to ``num_tokens``, no fewer than there are sinks.

        Copies of tokens that were cut get position 0, which is padding in their rows.
        """
        if self.positions is None:
            return self
        return SinkTokens(self.block, self.positions.masked_fill(self.positions >= num_tokens, 0))

    def arrange_mask(self, mask: Tensor | None, num_tokens: int) -> Tensor | None:
        """Columns of ``mask [B or 1, 1, Q, num_tokens]`` with the sinks first and their originals masked."""
        if self.positions is None:
            return mask
        if mask is None:
            batch = len(self.positions)
            mask = torch.ones(batch, 1, 1, num_tokens, dtype=torch.bool, device=self.positions.device)
        return copies_first(mask, self.positions)

    def put_back(self, tokens: ExactBlock) -> ExactBlock:
        """Dense ``tokens`` from position ``num_leading`` on, with the sinks exact in their places."""
        positions = self.positions
        if positions is None:
            return ExactBlock(
                torch.cat([self.block.keys, tokens.keys], -2), torch.cat([self.block.values, tokens.values], -2)
            )
        sinks = ExactBlock(self.block.keys.to(tokens.keys.dtype), self.block.values.to(tokens.values.dtype))
        return ExactBlock(
            tokens.keys.scatter(-2, _index(positions, sinks.keys), sinks.keys),
            tokens.values.scatter(-2, _index(positions, sinks.values), sinks.values),
        )

    def map_batch(self, function: TensorFunction) -> "SinkTokens":
        """The sinks with ``function`` applied along the batch dimension."""
        return SinkTokens(self.block.map_batch(function), None if self.positions is None else function(self.positions))

    def to_fields(self) -> dict[str, Field]:
        return {"block": self.block.to_fields(), "positions": self.positions}

    @classmethod
    def from_fields(cls, fields: Fields, shape: TokenShape, num_tokens: int) -> "SinkTokens":
        """The sinks of a sequence of ``num_tokens``."""
        block, positions = ExactBlock.from_fields(fields.sub("block"), shape), None
        if fields.has("positions"):
            positions = fields.tensor("positions", torch.int64, (shape.batch, block.num_tokens))
            inside = bool(((positions >= 0) & (positions < num_tokens)).all())
            fields.require(inside, f"positions below {num_tokens}")
        return cls(block, positions)


def copies_first(mask: Tensor, positions: Tensor) -> Tensor:
    """``mask [B or 1, 1, Q, n]`` with columns of the tokens at ``positions [B, S]`` in front, hidden at their own."""
    batch, count = positions.shape
    mask = mask.expand(batch, -1, -1, -1)
    places = positions[:, None, None, :].expand(-1, *mask.shape[1:3], count)
    nothing = False if mask.dtype == torch.bool else -torch.inf
    return torch.cat([mask.gather(-1, places), mask.scatter(-1, places, nothing)], dim=-1)


def _index(positions: Tensor, tensor: Tensor) -> Tensor:
    return positions[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[-1])
