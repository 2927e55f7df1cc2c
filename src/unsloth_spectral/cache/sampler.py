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
    """Scaled queries with the positions they were asked at."""

    def __init__(self) -> None:
        self._queries: list[Tensor] = []
        self._positions: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        return storage_bytes(*self._queries)

    def note(self, query: Tensor, num_tokens: int, missing: int, padding: int, scaling: float = 1.0) -> None:
        """See ``query [B, num_attention_heads, Q, D]``, yet to be scaled, of the newest of ``num_tokens`` tokens.

        ``missing`` tokens are still to come before the next sealing; none where it is due now. The first ``padding``
        tokens are not asked.
        """
        length = query.shape[2]
        first = num_tokens - length
        if missing > _DECODE_WINDOW:
            return
        if missing > 0:
            # Held until the sealing, so few. By their places: of the tokens that come together in assisted decoding
            # the newest may be taken back.
            oldest = max(first, num_tokens + missing - _DECODE_WINDOW, padding)
            asked = [place - first for place in range(oldest, num_tokens) if place % _DECODE_STRIDE == 0]
            places = torch.tensor(asked, dtype=torch.int64, device="cpu")
        else:
            count = min(length, _PREFILL_SAMPLES)
            evenly = torch.linspace(max(0, padding - first), length - 1, count, dtype=torch.float32, device="cpu")
            places = evenly.long()
        if not len(places):
            return
        picked = query[:, :, places.to(query.device)] * scaling
        picked = picked.half() if missing > 0 else picked
        # New lists, assigned together: an interruption leaves both or neither, and a copy of the sampler is its own.
        self._queries, self._positions = [*self._queries, picked], [*self._positions, first + places]

    def crop(self, num_tokens: int) -> None:
        """Forget the queries of all but the first ``num_tokens`` tokens."""
        kept = [positions < num_tokens for positions in self._positions]
        queries = [query[:, :, keep.to(query.device)] for query, keep in zip(self._queries, kept, strict=True)]
        positions = [positions[keep] for positions, keep in zip(self._positions, kept, strict=True)]
        self._queries, self._positions = queries, positions

    def map_batch(self, function: TensorFunction) -> None:
        """Apply ``function`` along the batch dimension."""
        self._queries = [function(query) for query in self._queries]

    def sample(self, start: int, num_tokens: int) -> tuple[Tensor | None, Tensor | None]:
        """Queries ``[B, heads, n, D]`` that saw any of the ``num_tokens`` tokens from ``start`` on, and how many of
        them each saw, ``[n]``; None and None if there are none."""
        if not self._queries:
            return None, None
        queries = torch.cat([query.float() for query in self._queries], dim=2)
        distances = torch.cat(self._positions) + 1 - start
        seen = distances > 0
        if not bool(seen.any()):
            return None, None
        return queries[:, :, seen.to(queries.device)], distances[seen].clamp(max=num_tokens)

    def to_fields(self) -> dict[str, Field]:
        return {"queries": self._queries, "positions": self._positions}

    @classmethod
    def from_fields(cls, fields: Fields, shape: TokenShape) -> "QuerySampler":
        sampler = cls()
        queries = fields.tensors("queries", None, (shape.batch, None, None, shape.key_dim))
        positions = fields.tensors("positions", torch.int64, (None,), on_host=True)
        fields.require([query.shape[2] for query in queries] == list(map(len, positions)), "a position for each query")
        sampler._queries, sampler._positions = queries, positions
        return sampler
