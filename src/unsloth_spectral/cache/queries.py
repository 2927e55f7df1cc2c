"""A sample of the queries that look at tokens about to be sealed, for the spectral codec's metric."""

import torch
from torch import Tensor

from unsloth_spectral.codec.tensors import TensorFunction, TokenShape, storage_bytes
from unsloth_spectral.fields import Field, Fields

_PREFILL_SAMPLES = 256
# While decoding: every fourth query of the last 128 before a sealing, in half precision, to keep few bytes for a short
# time.
DECODE_WINDOW, DECODE_STRIDE = 128, 4


class QuerySampler:
    """Scaled queries with their positions, row by row; position -1 fills up rows with fewer queries."""

    def __init__(self) -> None:
        self._queries: list[Tensor] = []
        self._positions: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        return storage_bytes(*self._queries, *self._positions)

    def note(
        self, query: Tensor, num_tokens: int, missing: int, scaling: float = 1.0, asking: Tensor | None = None
    ) -> None:
        """Sample ``query [B, num_attention_heads, Q, D]``, not yet scaled, of the newest of ``num_tokens`` tokens.

        ``missing`` tokens are still to come before the next sealing, 0 if it is due now. ``asking [B, Q]`` bool, on the
        CPU, is False for the queries of padding.
        """
        length = query.shape[2]
        first = num_tokens - length
        if missing > DECODE_WINDOW:
            return
        wanted = torch.ones(1, length, dtype=torch.bool, device="cpu") if asking is None else asking
        is_few = missing > 0 or length == 1
        if is_few:
            # They are kept until the sealing, so take few. Pick by position: assisted decoding may remove the newest of
            # the tokens that come together.
            positions = torch.arange(first, num_tokens, dtype=torch.int64, device="cpu")
            is_last_of_stride = positions % DECODE_STRIDE == DECODE_STRIDE - 1
            wanted = wanted & (positions >= num_tokens + missing - DECODE_WINDOW) & is_last_of_stride
        places, is_query = _evenly_picked(wanted, _PREFILL_SAMPLES)
        if not places.shape[1]:
            return
        picked = _picked(query, places, is_query) * scaling
        picked = picked.half() if is_few else picked
        asked_at = torch.where(is_query, first + places, -1).expand(len(query), -1)
        # New lists, assigned together: an interruption changes both or neither, and copies keep the old lists.
        self._queries, self._positions = [*self._queries, picked], [*self._positions, asked_at]

    def note_each(self, queries: Tensor, positions: Tensor) -> None:
        """Note scaled ``queries [B, num_attention_heads, n, D]`` of single tokens at ``positions [n]``."""
        if not len(positions):
            return
        asked_at = positions.expand(len(queries), -1)
        self._queries, self._positions = [*self._queries, queries], [*self._positions, asked_at]

    def crop(self, num_tokens: int) -> None:
        """Forget the queries of all but the first ``num_tokens`` tokens."""
        positions = [torch.where(positions < num_tokens, positions, -1) for positions in self._positions]
        keeps = [(asked_at >= 0).any(0) for asked_at in positions]
        queries = [query[:, :, keep.to(query.device)] for query, keep in zip(self._queries, keeps, strict=True)]
        positions = [asked_at[:, keep] for asked_at, keep in zip(positions, keeps, strict=True)]
        self._queries, self._positions = queries, positions

    def map_batch(self, function: TensorFunction) -> None:
        """Apply ``function`` along the batch dimension."""
        queries = [function(query) for query in self._queries]
        self._queries, self._positions = queries, [function(positions) for positions in self._positions]

    def sample(self, start: int, num_tokens: int) -> tuple[Tensor | None, Tensor | None]:
        """Queries ``[B, heads, n, D]`` that saw any of the ``num_tokens`` tokens from ``start`` on, and how many of
        these tokens each saw, ``[B, n]``, 0 for entries that are no query; None and None if there are no queries."""
        if not self._queries:
            return None, None
        queries = torch.cat([query.float() for query in self._queries], dim=2)
        distances = (torch.cat(self._positions, 1) + 1 - start).clamp(0, num_tokens)
        is_query = (distances > 0).any(0)
        if not bool(is_query.any()):
            return None, None
        return queries[:, :, is_query.to(queries.device)], distances[:, is_query]

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
    """Places ``[B, n]`` int64 of at most ``most`` True entries of ``wanted [B, Q]`` per row, spread evenly.

    The second result, ``[B, n]`` bool, is False for the filling of rows with fewer. A row's places do not depend on the
    other rows."""
    counts = wanted.sum(1, keepdim=True)
    num_picked = counts.clamp_max(most)
    numbers = torch.arange(int(num_picked.max()), dtype=torch.int64, device="cpu")
    ranks = numbers * (counts - 1).clamp_min(0) // (num_picked - 1).clamp_min(1)
    is_picked = numbers < num_picked
    order = (~wanted).int().argsort(dim=1, stable=True)
    return order.gather(1, torch.where(is_picked, ranks, 0)), is_picked


def _picked(query: Tensor, places: Tensor, is_query: Tensor) -> Tensor:
    """The queries of ``query [B, heads, Q, D]`` at ``places [B or 1, n]``, ``[B, heads, n, D]``, zeros for filling."""
    places = places.to(query.device)
    if len(places) == 1:
        return query[:, :, places[0]]  # all of them are queries
    index = places[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    return query.gather(2, index) * is_query[:, None, :, None].to(query.device, query.dtype)
