"""Every supported transformers: both names of the cache's argument, and a line about an untested release."""

import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from families.lossless import LOSSLESS, token_ids
from transformers import DynamicCache, LlamaForCausalLM

from unsloth_spectral import SpectralCache, patch_unsloth_attention
from unsloth_spectral.integrations.huggingface.cache_argument import CACHE_NAME, CACHE_NAMES, cache_in, cache_of
from unsloth_spectral.integrations.huggingface.versions import NEWEST_TESTED

ROOT = Path(__file__).parents[2]
OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}


@pytest.fixture
def llama(tiny_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    model = tiny_llama()
    model.generation_config.eos_token_id = None
    return model


def names_taken() -> tuple[str, ...]:
    """The names under which the installed transformers takes a cache from a user."""
    return CACHE_NAMES[CACHE_NAMES.index(CACHE_NAME) :]


@pytest.mark.parametrize("name", names_taken())
def test_a_users_own_cache_is_seen_under_either_name(name: str, llama: LlamaForCausalLM) -> None:
    patch_unsloth_attention(llama, preset="small")
    cache = SpectralCache(llama, config=LOSSLESS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the user's own, for the old name
        output = llama.generate(token_ids(), **OPTIONS, **{name: cache})
    assert cache_of(output) is cache
    assert cache.get_seq_length() == output.sequences.shape[1] - 1


@pytest.mark.parametrize("name", names_taken())
def test_a_cache_of_another_kind_is_left_alone_under_either_name(name: str, llama: LlamaForCausalLM) -> None:
    patch_unsloth_attention(llama, config=LOSSLESS)
    cache = DynamicCache(config=llama.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        output = llama.generate(token_ids(), **OPTIONS, **{name: cache})
    assert cache_of(output) is cache


@pytest.mark.parametrize("name", names_taken())
def test_a_forward_pass_takes_a_cache_under_either_name(name: str, llama: LlamaForCausalLM) -> None:
    cache = SpectralCache(llama, config=LOSSLESS)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)
        output = llama(token_ids(), **{name: cache})
    assert cache_of(output) is cache
    assert cache.get_seq_length() == token_ids().shape[1]


def test_a_cache_among_arguments() -> None:
    assert cache_in({"cache": 1}) == cache_in({"past_key_values": 1, "cache": None}) == 1
    assert cache_in({"use_cache": True}) is None
    assert cache_of(SimpleNamespace()) is None


def test_a_newer_transformers_gives_one_line(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(transformers, "__version__", "5.99.0.dev0")
    with caplog.at_level(logging.WARNING, logger="unsloth_spectral"):
        SpectralCache(llama, config=LOSSLESS)
        patch_unsloth_attention(llama, config=LOSSLESS)
    assert len(caplog.messages) == 1
    assert "5.99.0.dev0 is newer than" in caplog.messages[0]


def test_a_tested_transformers_gives_none(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(transformers, "__version__", f"{NEWEST_TESTED}.7")
    with caplog.at_level(logging.WARNING, logger="unsloth_spectral"):
        SpectralCache(llama, config=LOSSLESS)
    assert caplog.messages == []


def test_the_newest_tested_release_is_the_pinned_one() -> None:
    pinned = re.findall(r"^transformers==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    assert NEWEST_TESTED in pinned
