"""Rebuild all keys and values and take a dense softmax: the ground truth of every other path."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unsloth_spectral.attention.scores import (
    ScoreOptions,
    apply_mask,
    group_heads,
    grouped_sink_logits,
    scale_and_cap,
    ungroup_heads,
)
from unsloth_spectral.codec.block import Block


def attend(query: Tensor, blocks: Sequence[Block], mask: Tensor | None, options: ScoreOptions) -> Tensor:
    """Attention of ``query [B, num_attention_heads, Q, D]`` over ``blocks``, in float32 or better.

    ``mask`` is ``[B or 1, 1, Q, kv_length]`` in the order of ``blocks``, or None for no mask at all. Returns
    ``[B, num_attention_heads, Q, D]`` in the computing dtype.
    """
    rebuilt = [block.reconstruct() for block in blocks]
    dtype = torch.promote_types(query.dtype, torch.float32)
    keys = torch.cat([pair[0] for pair in rebuilt], dim=-2).to(dtype)
    values = torch.cat([pair[1] for pair in rebuilt], dim=-2).to(dtype)
    num_key_value_heads, query_length = keys.shape[1], query.shape[2]
    grouped = group_heads(query.to(dtype), num_key_value_heads)
    scores = apply_mask(scale_and_cap(grouped @ keys.mT, options), mask, query_length)
    sink_logits = grouped_sink_logits(options, num_key_value_heads, query_length)
    if sink_logits is not None:
        scores = torch.cat([scores, sink_logits.to(dtype).expand(*scores.shape[:-1], 1)], dim=-1)
    # A row masked throughout is 0/0 in a softmax; like torch's SDPA it gets zeros.
    masked_out = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.softmax(-1).masked_fill(masked_out, 0.0)
    return ungroup_heads(weights[..., : keys.shape[-2]] @ values, query_length)
