"""Half precision and lossy presets: as close to the dense cache as the dtype or the number of bits allows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families.lossless import BLOCK, LOSSLESS, dense_cache, sealed_tokens, token_ids
from families.models import FAMILIES, build, served
from transformers import PreTrainedModel

from unsloth_spectral import SpectralCache, SpectralConfig
from unsloth_spectral.codec.config import PRESETS
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument

Check = Callable[..., None]
STEPS, PADDING = 8, 40


@torch.no_grad()
def forced_logits(model: PreTrainedModel, past: Any, length: int, unseen: slice | None = None) -> torch.Tensor:
    """Logits ``[2, STEPS, vocabulary]`` of tokens given one by one after two prompts, in float32.

    One is padded on the left to the ``length`` of the other. Later ones do not see the tokens that are ``unseen``.
    """
    ids = token_ids(2, length)
    mask = torch.ones_like(ids)
    ids[1, :PADDING], mask[1, :PADDING] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    model(ids, **cache_argument(past), attention_mask=mask, position_ids=positions)
    if unseen is not None:
        mask[:, unseen] = 0
    tokens, steps = token_ids(2, STEPS, seed=1), []
    positions = positions[:, -1:]
    for step in range(STEPS):
        mask, positions = torch.cat([mask, mask.new_ones(2, 1)], -1), positions + 1
        steps.append(
            model(tokens[:, [step]], **cache_argument(past), attention_mask=mask, position_ids=positions).logits
        )
    return torch.cat(steps, 1).float()


def divergence(actual: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """KL of ``actual`` from ``exact`` for each token, in nats."""
    p, q = exact.double().log_softmax(-1), actual.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize(("family", "name"), [cell for name in ("bfloat16", "float16") for cell in served(name)])
@pytest.mark.usefixtures("unrounded")
def test_half_precision(family: str, name: str, cell: Check) -> None:
    cell(family, name, "works")
    dtype, length = getattr(torch, name), 86
    # All experts at once: two that are nearly as good would be chosen between by a rounding.
    row = FAMILIES[family]
    chosen = "num_experts_per_tok" in row.options and not row.is_materialised
    options = {"num_experts_per_tok": 4} if chosen else {}
    single = build(family, **options)
    exact = forced_logits(single, dense_cache(single), length)
    plain, model = build(family, **options).to(dtype), build(family, **options).to(dtype)
    dense = forced_logits(plain, dense_cache(plain), length)
    spectral = SpectralCache(model, config=LOSSLESS)
    spectral_logits = forced_logits(model, spectral, length)
    assert min(sealed_tokens(spectral)) >= 4 * BLOCK
    assert spectral_logits.isfinite().all()
    # What the dtype costs the dense cache, it may cost the spectral one, in the mean and at most.
    dtype_error, spectral_error = (dense - exact).abs(), (spectral_logits - exact).abs()
    assert dtype_error.max() > 0, "nothing was computed in half precision"
    assert spectral_error.mean() < 1.25 * dtype_error.mean()
    assert spectral_error.max() < 2 * dtype_error.max()
    # Where the best token leads by more than both can err, it is chosen.
    best = exact.topk(2, -1)
    unique = best.values[..., 0] - best.values[..., 1] > 2 * torch.maximum(dtype_error.max(), spectral_error.max())
    assert torch.equal(spectral_logits.argmax(-1)[unique], best.indices[..., 0][unique])


@pytest.mark.parametrize("family", served(quick=True))
def test_a_lossy_preset(family: str, cell: Check) -> None:
    cell(family, "balanced", "works")
    length = 4 + 16 + 3 * 128 + 20
    plain, model = build(family), build(family)
    exact = forced_logits(plain, dense_cache(plain), length)
    logits_by_bits = {}
    for bits in (PRESETS["balanced"], 8):
        config = SpectralConfig(bits_per_element=bits, block_size=128, residual_length=16)
        spectral = SpectralCache(model, config=config, use_profile=False)
        logits_by_bits[bits] = forced_logits(model, spectral, length)
        stats = spectral.stats()
        assert set(sealed_tokens(spectral)) == {3 * 128}
        assert stats.exact_blocks == 0
        assert stats.cold_bits_per_element < bits + 0.1
        assert logits_by_bits[bits].shape == exact.shape
        assert logits_by_bits[bits].isfinite().all()
    lost = forced_logits(plain, dense_cache(plain), length, slice(4 + PADDING, 4 + 3 * 128))
    dtype_error = divergence(lost, exact).mean()
    balanced, fine = (divergence(logits, exact).mean() for logits in logits_by_bits.values())
    # Random weights make white keys and values, the hardest to keep in two bits: measured is up to .44 of what it costs
    # to lose the sealed tokens, in eight bits 8e-4.
    assert 1e-7 < balanced < 0.5 * dtype_error
    assert fine < 2e-3 * dtype_error
