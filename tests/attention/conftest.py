"""Fixtures of the attention tests: blocks of every kind, and a softmax that shares no code with the code under test."""

from collections.abc import Callable

import pytest
import torch

from unsloth_spectral.codec.block import Block, ExactBlock
from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.codec.rank.block import seal


@pytest.fixture(scope="session")
def make_blocks() -> Callable[..., list[Block]]:
    """``make_blocks(batch, heads, head_dim, layout, seed)``: ``layout`` lists ``("exact", tokens)``, ``("sealed",
    tokens)`` (one block) or ``("stacked", tokens)`` (two blocks of half the tokens each)."""

    def make(batch: int, heads: int, head_dim: int, layout: list[tuple[str, int]], seed: int = 0) -> list[Block]:
        generator = torch.Generator().manual_seed(seed)
        blocks: list[Block] = []
        for kind, num_tokens in layout:
            keys, values = torch.randn(2, batch, heads, num_tokens, head_dim, generator=generator)
            if kind == "exact":
                blocks.append(ExactBlock(keys, values))
                continue
            size = num_tokens // 2 if kind == "stacked" else num_tokens
            rank = min(4, size, head_dim)
            blocks.append(seal(keys, values, SpectralConfig(rank_keys=rank, rank_values=rank, block_size=size)))
        return blocks

    return make


@pytest.fixture(scope="session")
def reference() -> Callable[..., torch.Tensor]:
    """Softmax attention as in textbooks, in float64, heads repeated; rows that see nothing give zeros."""

    def attend(
        query: torch.Tensor,
        blocks: list[Block],
        mask: torch.Tensor | None,
        scaling: float,
        softcap: float | None = None,
        sink_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        keys, values = (torch.cat(part, -2).double() for part in zip(*(b.reconstruct() for b in blocks), strict=True))
        repeats = query.shape[1] // keys.shape[1]
        scores = query.double() @ keys.repeat_interleave(repeats, 1).mT * scaling
        if softcap is not None:
            scores = (scores / softcap).tanh() * softcap
        if mask is not None:
            scores = scores + (torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask).double()
        weights = scores.exp()
        total = weights.sum(-1, keepdim=True)
        if sink_logits is not None:
            total = total + sink_logits.double().exp()[:, None, None]
        return torch.where(total > 0, weights / total, 0.0) @ values.repeat_interleave(repeats, 1)

    return attend
