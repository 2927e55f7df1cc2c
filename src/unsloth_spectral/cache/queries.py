"""A sample of the queries that look at tokens about to be sealed, for the spectral codec's metric."""

import torch
from torch import Tensor

from unsloth_spectral.codec.tensors import TensorFunction, TokenShape, storage_bytes
from unsloth_spectral.fields import Field, Fields

_PREFILL_SAMPLES = 256
# While decoding: every fourth query of the last 128 before a sealing, in half precision, so that little is held and
# not for long.
_DECODE_WINDOW, _DECODE_STRIDE = 128, 4


class QuerySampler:
    """Scaled queries with the positions they were asked at, row by row; -1 where a row has fewer than others."""

    def __init__(self) -> None:
        self._queries: list[Tensor] = []
        self._positions: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        return storage_bytes(*self._queries, *self._positions)

    def note(
        self, query: Tensor, num_tokens: int, missing: int, scaling: float = 1.0, asking: Tensor | None = None
    ) -> None:
        """See ``query [B, num_attention_heads, Q, D]``, yet to be scaled, of the newest of ``num_tokens`` tokens.

        ``missing`` tokens are still to come before the next sealing; none where it is due now. ``asking [B, Q]`` bool,
        on the CPU, leaves out the queries of padding.
        """
        length = query.shape[2]
        first = num_tokens - length
        if missing > _DECODE_WINDOW:
            return
        wanted = torch.ones(1, length, dtype=torch.bool, device="cpu") if asking is None else asking
        if missing > 0:
            # Held until the sealing, so few. By their places: of the tokens that come together in assisted decoding
            # the newest may be taken back.
            positions = torch.arange(first, num_tokens, dtype=torch.int64, device="cpu")
            wanted = wanted & (positions >= num_tokens + missing - _DECODE_WINDOW) & (positions % _DECODE_STRIDE == 0)
        places, is_query = _evenly_picked(wanted, _PREFILL_SAMPLES)
        if not places.shape[1]:
            return
        picked = _picked(query, places, is_query) * scaling
        picked = picked.half() if missing > 0 else picked
        asked_at = torch.where(is_query, first + places, -1).expand(len(query), -1)
        # New lists, assigned together: an interruption leaves both or neither, and a copy of the sampler is its own.
        self._queries, self._positions = [*self._queries, picked], [*self._positions, asked_at]

    def crop(self, num_tokens: int) -> None:
        """Forget the queries of all but the first ``num_tokens`` tokens."""
        positions = [torch.where(positions < num_tokens, positions, -1) for positions in self._positions]
        kept = [(asked_at >= 0).any(0) for asked_at in positions]
        queries = [query[:, :, keep.to(query.device)] for query, keep in zip(self._queries, kept, strict=True)]
        positions = [asked_at[:, keep] for asked_at, keep in zip(positions, kept, strict=True)]
        self._queries, self._positions = queries, positions

    def map_batch(self, function: TensorFunction) -> None:
        """Apply ``function`` along the batch dimension."""
        queries = [function(query) for query in self._queries]
        self._queries, self._positions = queries, [function(positions) for positions in self._positions]

    def sample(self, start: int, num_tokens: int) -> tuple[Tensor | None, Tensor | None]:
        """Queries ``[B, heads, n, D]`` that saw any of the ``num_tokens`` tokens from ``start`` on, and how many of
        them each saw, ``[B, n]``, 0 for what is no query; None and None if there are none."""
        if not self._queries:
            return None, None
        queries = torch.cat([query.float() for query in self._queries], dim=2)
        distances = (torch.cat(self._positions, 1) + 1 - start).clamp(0, num_tokens)
        seen = (distances > 0).any(0)
        if not bool(seen.any()):
            return None, None
        return queries[:, :, seen.to(queries.device)], distances[:, seen]

    def to_fields(self) -> dict[str, Field]:
        return {"queries": self._queries, "positions": self._positions}

    @classmethod
    def from_fields(cls, fields: Fields, shape: TokenShape) -> "QuerySampler":
        sampler = cls()
        queries = fields.tensors("queries", None, (shape.batch, None, None, shape.key_dim))
        positions = fields.tensors("positions", torch.int64, (shape.batch, None), on_host=True)
        counts = [asked_at.shape[1] for asked_at in positions]
        fields.require([query.shape[2] for query in queries] == counts, "a position for each query")
        sampler._queries, sampler._positions = queries, positions
        return sampler


def _evenly_picked(wanted: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Places ``[B, n]`` int64 of at most ``most`` that are ``wanted [B, Q]`` bool in each row, spread evenly.

    The second, ``[B, n]`` bool, tells which of them are any, as rows may have fewer. A row's places do not depend on
    the other rows."""
    counts = wanted.sum(1, keepdim=True)
    taken = counts.clamp_max(most)
    numbers = torch.arange(int(taken.max()), dtype=torch.int64, device="cpu")
    ranks = numbers * (counts - 1).clamp_min(0) // (taken - 1).clamp_min(1)
    is_any = numbers < taken
    order = (~wanted).int().argsort(dim=1, stable=True)
    return order.gather(1, torch.where(is_any, ranks, 0)), is_any


def _picked(query: Tensor, places: Tensor, is_query: Tensor) -> Tensor:
    """``[B, heads, n, D]``: of ``query [B, heads, Q, D]`` those at ``places [B or 1, n]``, zeros for what is none."""
    places = places.to(query.device)
    if len(places) == 1:
        return query[:, :, places[0]]  # all of them are queries
    index = places[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    return query.gather(2, index) * is_query[:, None, :, None].to(query.device, query.dtype)
