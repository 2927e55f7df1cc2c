"""Settings that lose nothing but the order of additions, and those that lose some."""

import torch
from families.models import DEVICE, HEAD_DIM
from transformers import DynamicCache, PreTrainedModel

from unsloth_spectral import SpectralCache, SpectralConfig
from unsloth_spectral.codec.rank.factors import RankFactors

BLOCK, SINKS, RESIDUAL = 16, 4, 8
# Full rank and short blocks: sealing happens within a hundred tokens and leaves nothing but the rounding to int8.
LOSSLESS = SpectralConfig(HEAD_DIM, HEAD_DIM, BLOCK, SINKS, RESIDUAL)


def unrounded_encode(block: torch.Tensor, rank: int) -> RankFactors:
    """The rank codec less its rounding to int8 and half precision."""
    left, singular_values, right = torch.linalg.svd(block.float(), full_matrices=False)
    codes, basis = left[..., :rank].mT.contiguous(), (singular_values[..., None] * right)[..., :rank, :]
    return RankFactors(codes, torch.ones_like(codes[..., :1, :1]), basis, torch.zeros_like(codes[..., 0, 0]))


def token_ids(batch: int = 1, length: int = 80, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def padded_batch(length: int = 80) -> dict[str, torch.Tensor]:
    """Three prompts, padded on the left by nothing, 30 tokens and all but 9."""
    ids = token_ids(3, length)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 30, length - 9)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def sealed_tokens(spectral: SpectralCache) -> list[int]:
    """Per spectral layer."""
    return [layer.sealed_tokens for layer in spectral.stats().layers if layer.kind == "spectral"]


def dense_cache(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config)
