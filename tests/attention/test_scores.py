"""Head grouping, masks, scaling, soft cap and sink logits."""

from collections.abc import Callable

import pytest
import torch

from unsloth_spectral.attention.scores import (
    ScoreOptions,
    apply_mask,
    causal_mask,
    group_heads,
    grouped_sink_logits,
    scale_and_cap,
    ungroup_heads,
)


@pytest.mark.parametrize(("num_key_value_heads", "group"), [(1, 1), (1, 7), (3, 1), (3, 5)])
def test_query_heads_meet_the_key_head_that_repeating_would_give(num_key_value_heads: int, group: int) -> None:
    heads = num_key_value_heads * group
    query = torch.arange(2 * heads * 3 * 4.0).view(2, heads, 3, 4)
    grouped = group_heads(query, num_key_value_heads)
    assert grouped.shape == (2, num_key_value_heads, group * 3, 4)
    owner = torch.arange(num_key_value_heads).repeat_interleave(group)
    for head in range(heads):
        rows = slice((head % group) * 3, (head % group) * 3 + 3)
        assert torch.equal(grouped[:, owner[head], rows], query[:, head])
    assert torch.equal(ungroup_heads(grouped, 3), query)


@pytest.mark.parametrize(("query_length", "kv_length"), [(1, 1), (1, 9), (4, 4), (3, 9)])
def test_causal_mask(query_length: int, kv_length: int) -> None:
    mask = causal_mask(query_length, kv_length, torch.device("cpu"))
    assert mask.shape == (1, 1, query_length, kv_length)
    assert mask.dtype == torch.bool
    for row in range(query_length):
        visible = kv_length - query_length + row + 1
        assert mask[0, 0, row].tolist() == [True] * visible + [False] * (kv_length - visible)


def test_masks_reach_every_query_head_of_a_group() -> None:
    scores = torch.zeros(2, 3, 5 * 4, 7)
    mask = torch.rand(2, 1, 4, 7, generator=torch.Generator().manual_seed(0)) > 0.5
    masked = apply_mask(scores, mask, 4).unflatten(2, (5, 4))
    for head in range(3):
        for member in range(5):
            assert torch.equal(masked[:, head, member] == 0, mask[:, 0])
    assert torch.equal(scores, torch.zeros_like(scores))
    assert set(masked.unique().tolist()) == {-torch.inf, 0.0}


def test_additive_masks_are_added_and_one_row_serves_all() -> None:
    scores = torch.ones(2, 3, 5 * 4, 7)
    mask = torch.randn(1, 1, 4, 7, generator=torch.Generator().manual_seed(0))
    added = apply_mask(scores, mask, 4).unflatten(2, (5, 4))
    assert torch.equal(added, (1 + mask).unsqueeze(2).expand_as(added))
    assert apply_mask(scores, None, 4) is scores
    assert apply_mask(scores, mask.half(), 4).dtype == torch.float32


def test_scaling_comes_before_the_cap(assert_close: Callable[..., None]) -> None:
    scores = torch.tensor([0.0, 4.0, -100.0, 1e6])
    assert torch.equal(scale_and_cap(scores, ScoreOptions(0.5)), scores * 0.5)
    capped = scale_and_cap(scores, ScoreOptions(0.5, softcap=20.0))
    assert_close(capped, 20 * torch.tanh(scores * 0.5 / 20), 1e-6)
    assert capped.abs().max() <= 20


def test_sink_logits_belong_to_query_heads() -> None:
    sink_logits = torch.arange(6.0)
    logits = grouped_sink_logits(ScoreOptions(1.0, sink_logits=sink_logits.half()), 2, 4)
    assert logits.shape == (1, 2, 3 * 4, 1)
    assert logits.dtype == torch.float32
    by_head = ungroup_heads(logits, 4)
    for head in range(6):
        assert by_head[0, head].flatten().tolist() == [float(head)] * 4
    assert grouped_sink_logits(ScoreOptions(1.0), 2, 4) is None
