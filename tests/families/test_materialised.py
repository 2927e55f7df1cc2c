"""Models that compute with their keys and values themselves: stored compressed, handed out dense."""

import logging

import pytest
import torch
from families.lossless import BLOCK, LOSSLESS, dense_cache, sealed_tokens, token_ids
from families.models import FAMILIES, build

from unsloth_spectral import SpectralCache, SpectralConfig, patch_unsloth_attention, unpatch_unsloth_attention
from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument, cache_of
from unsloth_spectral.integrations.huggingface.switch import is_enabled

MATERIALISED = [family for family, row in FAMILIES.items() if row.is_materialised]
families = pytest.mark.parametrize("family", MATERIALISED)


def test_who_is_materialised() -> None:
    assert "DeepSeek-V3" in MATERIALISED
    assert "Llama" not in MATERIALISED


@families
def test_one_warning_a_model_says_what_it_means(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = build(family)
    with caplog.at_level(logging.WARNING, logger="unsloth_spectral"):
        for _ in range(2):
            SpectralCache(model, config=LOSSLESS)
    (record,) = caplog.records
    assert record.name == "unsloth_spectral"
    message = record.getMessage()
    assert message.startswith(type(model).__name__)
    assert "memory falls" in message
    assert "not faster" in message
    with caplog.at_level(logging.WARNING, logger="unsloth_spectral"):
        SpectralCache(build(family), config=LOSSLESS)
    assert len(caplog.records) == 2, "another model"


def test_no_warning_where_the_attention_function_serves(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="unsloth_spectral"):
        SpectralCache(build("Llama"), config=LOSSLESS)
    assert caplog.records == []


@families
@torch.no_grad()
def test_it_stores_less_and_hands_out_dense(family: str) -> None:
    model = build(family)
    config = SpectralConfig(preset="balanced", block_size=128, residual_length=16)
    spectral, dense = SpectralCache(model, config=config), dense_cache(model)
    ids = token_ids(1, 4 + 16 + 8 * 128)
    # A prefill is attended to exactly, then sealed.
    assert torch.equal(model(ids, **cache_argument(spectral)).logits, model(ids, **cache_argument(dense)).logits)
    stats = spectral.stats()
    assert set(sealed_tokens(spectral)) == {8 * 128}
    assert stats.compression_factor > 5
    layer, dense_layer = spectral.layers[0], dense.layers[0]
    widest = max(dense_layer.keys.shape[-1], dense_layer.values.shape[-1])
    new = torch.randn(2, *dense_layer.keys[:, :, :1].shape[:3], widest, device=dense_layer.keys.device)
    keys, values = layer.update(new[0][..., : dense_layer.keys.shape[-1]], new[1][..., : dense_layer.values.shape[-1]])
    for handed, exact in ((keys, dense_layer.keys), (values, dense_layer.values)):
        assert type(handed) is torch.Tensor
        assert handed.shape[:2] == exact.shape[:2]
        assert handed.shape[-2] == exact.shape[-2] + 1
        assert torch.equal(handed[..., :4, :], exact[..., :4, :])
        assert torch.equal(handed[..., -17:-1, :], exact[..., -16:, :])
        assert not torch.equal(handed[..., 4:-17, :], exact[..., 4:-16, :])


@families
@pytest.mark.usefixtures("unrounded")
def test_patching_works_and_leaves_the_attention_alone(family: str) -> None:
    model = build(family)
    before = model.config._attn_implementation
    expected = build(family).generate(token_ids(length=120), max_new_tokens=8, do_sample=False)
    patch_unsloth_attention(model, block_size=BLOCK, k_rank_keys=16, k_rank_values=16)
    result = model.generate(
        token_ids(length=120), max_new_tokens=8, do_sample=False, return_dict_in_generate=True, use_cache=True
    )
    assert min(sealed_tokens(cache_of(result))) >= 3 * BLOCK
    assert torch.equal(result.sequences, expected)
    assert not is_enabled(model)
    assert model.config._attn_implementation == before
    # The patch watches the model's steps; nothing is put on its modules.
    assert not any(module._forward_pre_hooks for module in model.modules() if module is not model)
    unpatch_unsloth_attention(model)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_a_rank_larger_than_what_latent_attention_caches() -> None:
    # Of a latent of 32 and a rotated key of 16, which no configuration calls head_dim.
    model = build("DeepSeek-V3")
    spectral = SpectralCache(model, config=SpectralConfig(24, 24, 32))
    with pytest.raises(InvalidArgumentError, match="head_dim, 16; got 24"):
        model(token_ids(), **cache_argument(spectral))
    assert spectral.get_seq_length() == 0


def test_ranks_are_held_against_the_heads_of_full_attention() -> None:
    # Gemma 4's full-attention layers have larger heads than its others, which is what a rank is held against.
    model = build("Gemma 4")
    with pytest.raises(InvalidArgumentError, match="head_dim, 32; got 33"):
        SpectralCache(model, config=SpectralConfig(33, 16, 64))
    SpectralCache(model, config=SpectralConfig(32, 16, 64))
