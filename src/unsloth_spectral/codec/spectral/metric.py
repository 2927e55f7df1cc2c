"""The metric of the queries: ``E[q q^T]``, averaged over the positions of keys and queries."""

from functools import lru_cache

import torch
from torch import Tensor

from unsloth_spectral.codec.observed import Observed
from unsloth_spectral.rope import Spans, unrotate

# Directions without a sampled query still get this share of the mean weight, for later queries.
_FLOOR = 1e-2
_SCARCITY = 1.0
_KEYS_PER_QUERY = 4
_SEED = 0


def metric_of(observed: Observed, num_key_value_heads: int, head_dim: int, spans: Spans) -> Tensor:
    """``W = E[R(n)^T q q^T R(n)]`` over sampled queries and key positions ``n`` before them, where ``R(n)`` does not
    rotate pairs without anchors. ``[B or 1, H, D, D]`` float32, with the trace of the queries. Without queries it is
    the identity; a row without queries among others gets the identity times their mean."""
    eye = torch.eye(head_dim, dtype=torch.float32, device="cpu")
    if observed.queries is None or observed.distances is None:
        return eye.expand(1, num_key_value_heads, -1, -1)
    grouped = observed.queries.float().unflatten(1, (num_key_value_heads, -1))
    # Queries of each row, in all heads of a group.
    counts = ((observed.distances > 0).sum(1) * grouped.shape[2]).to(grouped.device)
    has_any = (counts > 0)[:, None, None, None]
    unrotated = grouped if not any(spans) or observed.rotation is None else _unrotated(observed, grouped, spans)
    counts = counts.clamp_min(1)
    repeats = unrotated.shape[3] // grouped.shape[3]
    metric = query_metric(unrotated.flatten(2, 3), counts[:, None], repeats)
    # The floor raises the trace, many times if there is only a handful of queries. Without this correction the
    # variances of a block sealed soon after the prefill would be too large for the prefill's water level.
    power = grouped.square().sum((2, 3, 4)) / counts[:, None]
    trace = metric.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(torch.finfo(metric.dtype).tiny)
    metric = metric * (power / trace)[..., None, None]
    typical = power.sum(0) / has_any.sum().clamp_min(1) / head_dim
    return torch.where(has_any, metric, typical[:, None, None] * eye.to(metric.device))


def _unrotated(observed: Observed, grouped: Tensor, spans: Spans) -> Tensor:
    """``grouped [B, H, G, n, D]``, un-rotated by the positions of several keys per query; the results are
    concatenated."""
    rotation = observed.rotation
    assert observed.distances is not None
    assert rotation is not None
    is_query = observed.distances > 0
    shares = torch.zeros(_KEYS_PER_QUERY, *is_query.shape, dtype=torch.float32, device="cpu")
    for row, is_row_query in enumerate(is_query):
        shares[:, row, is_row_query] = _drawn(int(is_row_query.sum()))
    table = rotation.table()
    first = 0 if observed.padding is None else observed.padding[:, None]
    keys = (first + shares * (observed.distances - first).clamp_min(0)).long().clamp(max=table.shape[1] - 1)
    rows = torch.arange(len(table), dtype=torch.int64, device=table.device)[:, None]
    picked = table[rows, keys.to(table.device)].movedim(0, 1)
    if not all(spans):
        has_no_anchors = torch.tensor([span == 0 for span in spans], dtype=torch.bool, device=table.device)
        picked = picked.masked_fill(has_no_anchors, 1)
    repeated = grouped[:, :, :, None].expand(-1, -1, -1, len(shares), -1, -1)
    return unrotate(repeated, (picked / picked.abs())[:, None, None], rotation).flatten(3, 4)


def query_metric(queries: Tensor, counts: Tensor | None = None, repeats: int = 1) -> Tensor:
    """``E[q q^T]`` of ``queries [..., n, D]``, with a floor on its diagonal, ``[..., D, D]`` float32.

    The fewer the queries, the higher the floor: fewer than ``D`` queries do not span the space. ``counts`` is the
    number of queries, 1 or more, if zeros fill up ``n``; each query occurs ``repeats`` times.
    """
    head_dim, num_queries = queries.shape[-1], queries.shape[-2] // repeats
    if counts is None:
        counts = torch.tensor(num_queries, dtype=torch.float32, device=queries.device)
    # As float32: a number divided by an integer tensor would have the process's default dtype.
    counts = counts[..., None, None].float()
    metric = queries.mT @ queries / (counts * repeats)
    floor = metric.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(metric.dtype).tiny)
    eye = torch.eye(metric.shape[-1], dtype=metric.dtype, device=metric.device)
    return metric + (_FLOOR + _SCARCITY * (head_dim / counts) ** 2) * floor[..., None, None] * eye


@lru_cache(maxsize=64)
def _drawn(count: int) -> Tensor:
    """Random numbers ``[_KEYS_PER_QUERY, count]`` from 0 to 1. Drawn on the CPU, so that every device and run gets the
    same numbers; a row's numbers do not depend on the other rows."""
    generator = torch.Generator().manual_seed(_SEED)
    draws = [torch.rand(count, dtype=torch.float32, device="cpu", generator=generator) for _ in range(_KEYS_PER_QUERY)]
    return torch.stack(draws)
