"""What attention has seen of tokens about to be sealed: where they stand, and which queries look at them."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from unsloth_spectral.codec.spectral.statistics import query_metric
from unsloth_spectral.rope import Rotation, rotate

_KEYS_PER_QUERY = 4
_SEED = 0


@dataclass(frozen=True, slots=True, eq=False)
class Observed:
    """Attributes:
    rotation: positions of the tokens to be sealed; None for a model without rotary embeddings.
    queries: ``[B, num_attention_heads, n, D]`` a sample, rotated and scaled as for the scores, zeros where a row has
        fewer than others; None where none were seen.
    distances: ``[B, n]`` int64 on the CPU, how many of the tokens to be sealed came before each query; 0 where it is
        none.
    padding: ``[B]`` int64 on the CPU, how many of the tokens to be sealed are padding at the start of each row; None
        where none are.
    """

    rotation: Rotation | None = None
    queries: Tensor | None = None
    distances: Tensor | None = None
    padding: Tensor | None = None

    def metric(self, num_key_value_heads: int, head_dim: int, is_rotated: bool) -> Tensor:
        """``W = E[R(n)^T q q^T R(n)]`` over sampled queries and key positions ``n`` before them; ``E[q q^T]`` for
        rotated keys. ``[B or 1, H, D, D]`` float32, with the trace that the queries have; the identity where no query
        was seen, times the mean of the other rows' where a row alone has none."""
        eye = torch.eye(head_dim, dtype=torch.float32, device="cpu")
        if self.queries is None or self.distances is None:
            return eye.expand(1, num_key_value_heads, -1, -1)
        grouped = self.queries.float().unflatten(1, (num_key_value_heads, -1))
        # Of each row, in all heads of a group.
        counts = ((self.distances > 0).sum(1) * grouped.shape[2]).to(grouped.device)
        has_any = (counts > 0)[:, None, None, None]
        turned = grouped if is_rotated or self.rotation is None else self._turned_back(grouped, self.rotation)
        counts = counts.clamp_min(1)
        repeats = turned.shape[3] // grouped.shape[3]
        metric = query_metric(turned.flatten(2, 3), counts[:, None], repeats)
        # The floor for scarce queries adds to the trace, many times over for a handful: a block sealed soon after the
        # prefill would be held to the prefill's water level with variances that much too large.
        power = grouped.square().sum((2, 3, 4)) / counts[:, None]
        trace = metric.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(torch.finfo(metric.dtype).tiny)
        metric = metric * (power / trace)[..., None, None]
        typical = power.sum(0) / has_any.sum().clamp_min(1) / head_dim
        return torch.where(has_any, metric, typical[:, None, None] * eye.to(metric.device))

    def _turned_back(self, grouped: Tensor, rotation: Rotation) -> Tensor:
        """``grouped [B, H, G, n, D]``, turned back by the rotations of several keys per query, one after another."""
        assert self.distances is not None
        is_query = self.distances > 0
        shares = torch.zeros(_KEYS_PER_QUERY, *is_query.shape, dtype=torch.float32, device="cpu")
        for row, is_any in enumerate(is_query):
            shares[:, row, is_any] = _drawn(int(is_any.sum()))
        table, turned = rotation.table(), []
        first = 0 if self.padding is None else self.padding[:, None]
        for share in shares:
            keys = (first + share * (self.distances - first).clamp_min(0)).long().clamp(max=table.shape[1] - 1)
            rows = torch.arange(len(table), dtype=torch.int64, device="cpu")[:, None]
            picked = table[rows.to(table.device), keys.to(table.device)]
            turned.append(rotate(grouped, picked[:, None, None].conj(), rotation))
        return torch.cat(turned, dim=3)


@lru_cache(maxsize=64)
def _drawn(count: int) -> Tensor:
    """Random numbers ``[_KEYS_PER_QUERY, count]`` from 0 to 1. On the CPU, so that every device and run draws the same;
    a row's do not depend on the other rows."""
    generator = torch.Generator().manual_seed(_SEED)
    draws = [torch.rand(count, dtype=torch.float32, device="cpu", generator=generator) for _ in range(_KEYS_PER_QUERY)]
    return torch.stack(draws)
