"""Operations on a cache between two passes, and several turns of a conversation with one cache: as on a dense cache."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families.lossless import BLOCK, LOSSLESS, dense_cache, sealed_tokens, token_ids
from families.models import DEVICE, FAMILIES, build, served
from transformers.cache_utils import LinearAttentionLayer

from unsloth_spectral import SpectralCache
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument

Check = Callable[..., None]
PROMPT = 86


def crop(cache: Any) -> Any:
    cache.crop(-30)
    return cache


def reorder(cache: Any) -> Any:
    cache.reorder_cache(torch.tensor([2, 0, 0], device=DEVICE))
    return cache


def repeat(cache: Any) -> Any:
    cache.batch_repeat_interleave(2)
    return cache


def select(cache: Any) -> Any:
    cache.batch_select_indices(torch.tensor([2, 0], device=DEVICE))
    return cache


def reset(cache: Any) -> Any:
    cache.reset()
    return cache


# What is done, the rows there are afterwards, and the tokens.
OPERATIONS: dict[str, tuple[Callable[[Any], Any], int, int]] = {
    "crop": (crop, 3, PROMPT - 30),
    "reorder": (reorder, 3, PROMPT),
    "repeat": (repeat, 6, PROMPT),
    "select": (select, 2, PROMPT),
    "reset": (reset, 3, 0),
    "deepcopy": (copy.deepcopy, 3, PROMPT),
}
# The library's layers with a state have neither.
BATCH_OPERATIONS = ("repeat", "select")


@pytest.mark.parametrize(("family", "operation"), [cell for name in OPERATIONS for cell in served(name)])
@pytest.mark.usefixtures("unrounded")
@torch.no_grad()
def test_operations_on_the_cache(family: str, operation: str, cell: Check, assert_close: Check) -> None:
    operate, batch, length = OPERATIONS[operation]
    plain, model = build(family), build(family)
    dense, spectral = dense_cache(plain), SpectralCache(model, config=LOSSLESS)
    has_state = any(isinstance(layer, LinearAttentionLayer) for layer in dense.layers)
    refused = FAMILIES[family].is_recurrent if operation == "crop" else has_state and operation in BATCH_OPERATIONS
    cell(family, operation, "refused by transformers" if refused else "works")
    for candidate, past in ((plain, dense), (model, spectral)):
        if operation == "crop":  # layers with a window or a state can go back only so
            past.activate_past_recording()
        candidate(token_ids(3, PROMPT), **cache_argument(past))
    if refused and operation == "crop":
        assert not dense.is_croppable
        assert not spectral.is_croppable
        return
    if refused:
        for past in (dense, spectral):
            with pytest.raises(AttributeError, match="'LinearAttentionLayer' object has no attribute"):
                operate(past)
        return
    if operation != "crop":  # which seals
        assert min(sealed_tokens(spectral)) >= 4 * BLOCK
    # In the first supported releases of transformers a dense cache that was reset goes on counting.
    dense = dense_cache(plain) if operation == "reset" else operate(dense)
    first, spectral = spectral, operate(spectral)
    assert min(sealed_tokens(spectral), default=0) >= (0 if operation == "reset" else 2 * BLOCK)
    assert spectral.get_seq_length() == dense.get_seq_length() == length
    if operation == "deepcopy":
        first.reset()
    # Several tokens in one pass, many in one pass, then one by one.
    for step, count in enumerate((5, 40, 1, 1)):
        ids = token_ids(batch, count, seed=10 + step)
        actual, expected = model(ids, **cache_argument(spectral)), plain(ids, **cache_argument(dense))
        assert_close(actual.logits, expected.logits, 1e-4)
        if operation == "crop":
            spectral.crop(0), dense.crop(0)
        assert spectral.get_seq_length() == dense.get_seq_length()
    assert min(sealed_tokens(spectral)) >= 2 * BLOCK


@pytest.mark.parametrize("family", served())
@pytest.mark.usefixtures("unrounded")
def test_one_cache_serves_several_turns(family: str, cell: Check) -> None:
    cell(family, "several turns", "works")
    plain, model = build(family), build(family)
    dense, spectral = dense_cache(plain), SpectralCache(model, config=LOSSLESS)
    text = expected = token_ids(length=30)
    for turn in range(3):
        question = token_ids(length=15, seed=20 + turn)
        text, expected = torch.cat([text, question], -1), torch.cat([expected, question], -1)
        text = model.generate(text, **cache_argument(spectral), max_new_tokens=12, do_sample=False)
        expected = plain.generate(expected, **cache_argument(dense), max_new_tokens=12, do_sample=False)
        assert torch.equal(text, expected)
        # The last token of each turn is not in the cache yet.
        assert spectral.get_seq_length() == text.shape[1] - 1 == dense.get_seq_length()
    assert min(sealed_tokens(spectral)) >= 5 * BLOCK
