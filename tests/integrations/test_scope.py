"""``with spectral(model):`` and the options of the patch: which codec runs, and that nothing is left behind."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_patch import OPTIONS, generate, llama, state, token_ids
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM

from unsloth_spectral import (
    SpectralCache,
    SpectralConfig,
    patch_unsloth_attention,
    spectral,
    unpatch_unsloth_attention,
)
from unsloth_spectral.errors import InvalidArgumentError, UnsupportedModelError
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument, cache_of
from unsloth_spectral.integrations.huggingface.switch import ATTENTION_NAME

Build = Callable[..., LlamaForCausalLM]


@pytest.fixture
def model(tiny_llama: Build) -> LlamaForCausalLM:
    return llama(tiny_llama)


@pytest.mark.parametrize("before", ["sdpa", "eager"])
def test_the_model_is_spectral_within_and_as_before_afterwards(model: LlamaForCausalLM, before: str) -> None:
    model.set_attn_implementation(before)
    ids, then = token_ids(length=300), state(model)
    expected = generate(model, input_ids=ids).sequences
    with spectral(model, preset="small") as within:
        assert within is model
        assert state(model) != then
        result = generate(model, input_ids=ids)
        assert cache_of(result).config == SpectralConfig(preset="small")
        assert [layer.sealed_tokens for layer in cache_of(result).stats().layers] == [128, 128]
        SpectralCache(model, preset="quality")
    assert state(model) == then
    after = generate(model, input_ids=ids)
    assert isinstance(cache_of(after), DynamicCache)
    assert torch.equal(after.sequences, expected)


def test_an_exception_within_passes_and_the_model_is_as_before(model: LlamaForCausalLM) -> None:
    then = state(model)

    def interrupted() -> None:
        with spectral(model):
            generate(model)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert state(model) == then


def test_scopes_nest(model: LlamaForCausalLM) -> None:
    then = state(model)
    with spectral(model, preset="quality"):
        with spectral(model, config=SpectralConfig(4, 4, 32)):
            assert cache_of(generate(model)).config.rank_keys == 4
        assert cache_of(generate(model)).config.preset == "quality"
    assert state(model) == then


def test_a_scope_within_a_patch_gives_the_patch_back(model: LlamaForCausalLM) -> None:
    then = state(model)
    patch_unsloth_attention(model, **OPTIONS)
    with spectral(model):
        assert cache_of(generate(model)).config == SpectralConfig()
    assert cache_of(generate(model)).config.rank_keys == 16
    unpatch_unsloth_attention(model)
    assert state(model) == then


def test_a_cache_from_before_the_scope_goes_on_after_it(model: LlamaForCausalLM) -> None:
    cache = SpectralCache(model, config=SpectralConfig(16, 16, 16))
    with torch.no_grad():
        model(token_ids(), **cache_argument(cache))
    then = state(model)
    with spectral(model):
        generate(model)
    assert state(model) == then
    assert model.config._attn_implementation == ATTENTION_NAME
    with torch.no_grad():
        model(token_ids(length=3, seed=1), **cache_argument(cache))
    assert cache.get_seq_length() == 123


@pytest.mark.parametrize("anew", ["eager", "sdpa"])
def test_an_attention_set_anew_before_or_within_the_scope(model: LlamaForCausalLM, anew: str) -> None:
    then = state(model)
    with spectral(model):
        model.set_attn_implementation(anew)
        assert isinstance(cache_of(generate(model)), SpectralCache)
    assert state(model) == then
    SpectralCache(model)
    model.set_attn_implementation(anew)
    then = state(model)
    with spectral(model):
        generate(model)
    assert state(model) == then
    assert model.config._attn_implementation == anew


def test_unpatching_within_the_scope_does_no_harm(model: LlamaForCausalLM) -> None:
    then = state(model)
    with spectral(model):
        unpatch_unsloth_attention(model)
        assert isinstance(cache_of(generate(model)), DynamicCache)
    assert state(model) == then


def test_what_cannot_be_switched_is_refused_at_the_start(model: LlamaForCausalLM) -> None:
    then = state(model)
    for options in (
        {"preset": "huge"},
        {"preset": "small", "config": SpectralConfig()},
        {"config": {"preset": "small"}},
    ):
        with pytest.raises(InvalidArgumentError), spectral(model, **options):
            pytest.fail("entered")
    with pytest.raises(InvalidArgumentError, match="head_dim"), spectral(model, config=SpectralConfig(17)):
        pytest.fail("entered")
    assert state(model) == then
    with pytest.raises(UnsupportedModelError, match="Linear"), spectral(nn.Linear(2, 2)):  # type: ignore[arg-type]
        pytest.fail("entered")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, SpectralConfig()),
        ({"block_size": 256}, SpectralConfig(block_size=256)),
        ({"preset": "quality"}, SpectralConfig(preset="quality")),
        ({"preset": "small", "block_size": 128}, SpectralConfig(preset="small", block_size=128)),
        ({"config": SpectralConfig(bits_per_element=2.5)}, SpectralConfig(bits_per_element=2.5)),
        ({"k_rank_keys": 8}, SpectralConfig(rank_keys=8, rank_values=32)),
        ({"k_rank_values": 8}, SpectralConfig(rank_keys=16, rank_values=8)),
    ],
)
def test_the_options_of_the_patch_choose_the_codec(
    tiny_llama: Build, options: dict[str, Any], expected: SpectralConfig
) -> None:
    model = llama(tiny_llama, head_dim=32)
    patch_unsloth_attention(model, **options)
    result = generate(model, input_ids=token_ids(length=600))
    assert cache_of(result).config == expected
    assert min(layer.sealed_tokens for layer in cache_of(result).stats().layers) >= 512


def test_block_size_and_ranks_by_position(model: LlamaForCausalLM) -> None:
    patch_unsloth_attention(model, 32, 3, 5)
    assert cache_of(generate(model)).config == SpectralConfig(rank_keys=3, rank_values=5, block_size=32)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preset": "small", "k_rank_keys": 8}, "ranks choose the rank codec, preset belongs to the spectral one"),
        ({"config": SpectralConfig(), "preset": "small"}, "preset and config both say how to compress"),
        ({"config": SpectralConfig(), "block_size": 128}, "block_size and config both say"),
        ({"config": "small"}, "config must be a SpectralConfig, got str"),
        ({"block_size": 100}, "block_size must be a multiple of 128"),
    ],
)
def test_options_that_exclude_each_other_are_refused(
    model: LlamaForCausalLM, options: dict[str, Any], words: str
) -> None:
    then = state(model)
    with pytest.raises(InvalidArgumentError, match=words):
        patch_unsloth_attention(model, **options)
    assert state(model) == then
