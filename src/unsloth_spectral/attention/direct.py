"""One pass over the blocks as they are stored; partial results merge by log-sum-exp.

Per block the query is projected into component space once, scores come from the codes, values are summed in code space
and rotated back once. Nothing as long as the context is rebuilt.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from unsloth_spectral.attention.merge import Partial, exponentiate
from unsloth_spectral.attention.scores import (
    ScoreOptions,
    apply_mask,
    group_heads,
    grouped_sink_logits,
    scale_and_cap,
    ungroup_heads,
)
from unsloth_spectral.codec.block import Block


def attend(query: Tensor, blocks: Iterable[Block], mask: Tensor | None, options: ScoreOptions) -> Tensor:
    """Attention of ``query [B, num_attention_heads, Q, D]`` over one or more ``blocks``, in float32 or better.

    ``mask`` is ``[B or 1, 1, Q, kv_length]`` in the order of ``blocks``, or None for no mask at all. Returns
    ``[B, num_attention_heads, Q, D]`` in the computing dtype.
    """
    query_length = query.shape[2]
    query = query.to(torch.promote_types(query.dtype, torch.float32))
    merged: Partial | None = None
    start = 0
    for block in blocks:
        stop = start + block.num_tokens
        grouped = group_heads(query, block.num_key_value_heads)
        columns = None if mask is None else mask[..., start:stop]
        scores = apply_mask(scale_and_cap(block.scores(grouped), options), columns, query_length)
        weights, maximum, total = exponentiate(scores)
        partial = Partial(block.combine(weights), maximum, total)
        merged = partial if merged is None else merged.merge(partial)
        start = stop
    assert merged is not None, "attention over no tokens"
    sink_logits = grouped_sink_logits(options, merged.output.shape[1], query_length)
    if sink_logits is not None:
        # A sink logit acts like a token with that score and the value zero.
        maximum = sink_logits.to(query.dtype).expand_as(merged.maximum)
        merged = merged.merge(Partial(torch.zeros_like(merged.output), maximum, torch.ones_like(maximum)))
    return ungroup_heads(merged.finish(), query_length)
