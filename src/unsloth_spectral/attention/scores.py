"""Steps that all attention paths share: head grouping, scaling, soft cap and masks."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    """How raw dot products become attention scores.

    Attributes:
        scaling: factor on the dot products, usually ``head_dim ** -0.5``.
        softcap: scores pass through ``softcap * tanh(score / softcap)`` (Gemma 2).
        sink_logits: ``[num_attention_heads]`` learned logits that join the softmax and carry no value (gpt-oss).
    """

    scaling: float
    softcap: float | None = None
    sink_logits: Tensor | None = None


def group_heads(query: Tensor, num_key_value_heads: int) -> Tensor:
    """``[B, num_attention_heads, Q, D]`` to ``[B, num_key_value_heads, group * Q, D]``: keys are never repeated."""
    return query.unflatten(1, (num_key_value_heads, -1)).flatten(2, 3)


def ungroup_heads(output: Tensor, query_length: int) -> Tensor:
    """The inverse of ``group_heads``."""
    return output.unflatten(2, (-1, query_length)).flatten(1, 2)


def causal_mask(query_length: int, kv_length: int, device: torch.device) -> Tensor:
    """``[1, 1, query_length, kv_length]`` bool, the last query aligned with the last key."""
    newest = torch.arange(kv_length - query_length, kv_length, dtype=torch.int64, device=device)
    tokens = torch.arange(kv_length, dtype=torch.int64, device=device)
    return (tokens <= newest[:, None])[None, None]


def apply_mask(scores: Tensor, mask: Tensor | None, query_length: int) -> Tensor:
    """Apply ``mask`` (bool, True = attend; or additive float), ``[B or 1, 1, query_length, n]``.

    ``scores`` is ``[B, num_key_value_heads, group * query_length, n]``; every query head sees the same mask.
    """
    if mask is None:
        return scores
    by_query = scores.unflatten(2, (-1, query_length))
    mask = mask.unsqueeze(2)
    is_bool = mask.dtype == torch.bool
    masked = by_query.masked_fill(~mask, -torch.inf) if is_bool else by_query + mask.to(scores.dtype)
    return masked.flatten(2, 3)


def scale_and_cap(scores: Tensor, options: ScoreOptions) -> Tensor:
    """``scores`` times the scaling, soft-capped if the model has a cap."""
    scores = scores * options.scaling
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    return scores


def grouped_sink_logits(options: ScoreOptions, num_key_value_heads: int, query_length: int) -> Tensor | None:
    """The learned sink logits as ``[1, num_key_value_heads, group * query_length, 1]`` float32, or None."""
    if options.sink_logits is None:
        return None
    grouped = options.sink_logits.float().view(1, num_key_value_heads, -1, 1)
    return grouped.repeat_interleave(query_length, dim=2)
