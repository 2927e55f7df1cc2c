"""Streaming, pipelines, threads and training, with a lossless spectral cache and with a dense one."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families.lossless import BLOCK, LOSSLESS, padded_batch, sealed_tokens, token_ids
from families.models import FAMILIES, HEAD_DIM, build, served
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedModel, PreTrainedTokenizerFast, pipeline
from transformers.generation.streamers import BaseStreamer

from unsloth_spectral import SpectralCache, patch_unsloth_attention
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument

Check = Callable[..., None]
families = pytest.mark.parametrize("family", served())
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


class Collected(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.is_ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens.extend(value.flatten().tolist())

    def end(self) -> None:
        self.is_ended = True


@families
@pytest.mark.usefixtures("unrounded")
def test_streaming(family: str, cell: Check) -> None:
    cell(family, "streaming", "works")
    model = build(family)
    expected = build(family).generate(token_ids(), **GREEDY)
    spectral, streamer = SpectralCache(model, config=LOSSLESS), Collected()
    model.generate(token_ids(), **GREEDY, **cache_argument(spectral), streamer=streamer)
    assert min(sealed_tokens(spectral)) >= 4 * BLOCK
    assert streamer.tokens == expected[0].tolist()
    assert streamer.is_ended


def words(ids: torch.Tensor) -> str:
    return " ".join(f"w{number}" for number in ids.tolist())


def text_pipeline(model: PreTrainedModel) -> Any:
    vocabulary = WordLevel({f"w{number}": number for number in range(128)}, unk_token="w3")
    tokenizer = Tokenizer(vocabulary)
    tokenizer.pre_tokenizer = Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", padding_side="left")
    return pipeline("text-generation", model=model, tokenizer=wrapped)


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[SpectralCache]:
    """The spectral caches made during a test."""
    caches_made: list[SpectralCache] = []
    original = SpectralCache.__init__

    def noted(self: SpectralCache, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        caches_made.append(self)

    monkeypatch.setattr(SpectralCache, "__init__", noted)
    return caches_made


@families
@pytest.mark.usefixtures("unrounded")
def test_a_pipeline_with_one_prompt(family: str, caches: list[SpectralCache], cell: Check) -> None:
    cell(family, "pipeline, one prompt", "works")
    model = build(family)
    prompt = words(token_ids(length=120)[0])
    expected = text_pipeline(build(family))(prompt, **GREEDY)
    spectral = SpectralCache(model, config=LOSSLESS)
    assert text_pipeline(model)(prompt, **GREEDY, **cache_argument(spectral)) == expected
    assert min(sealed_tokens(spectral)) >= 4 * BLOCK
    # A fresh one: dynamic RoPE answers otherwise once the model has seen a longer text.
    model = build(family)
    patch_unsloth_attention(model, block_size=BLOCK, k_rank_keys=HEAD_DIM, k_rank_values=HEAD_DIM)
    assert text_pipeline(model)(prompt, **GREEDY) == expected
    assert min(sealed_tokens(caches[-1])) >= 3 * BLOCK
    assert caches[-1] is not spectral


@families
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.usefixtures("unrounded")
def test_a_pipeline_with_a_list(family: str, batch_size: int, caches: list[SpectralCache], cell: Check) -> None:
    cell(family, "pipeline, a list", "works")
    model = build(family)
    prompts = [words(token_ids(length=length, seed=length)[0]) for length in (130, 120, 9)]
    expected = text_pipeline(build(family))(prompts, **GREEDY, batch_size=batch_size)
    patch_unsloth_attention(model, block_size=BLOCK, k_rank_keys=HEAD_DIM, k_rank_values=HEAD_DIM)
    assert text_pipeline(model)(prompts, **GREEDY, batch_size=batch_size) == expected
    assert len(caches) == 3 // batch_size, "each batch has a cache of its own"
    assert min(sealed_tokens(caches[0])) >= 3 * BLOCK


@families
@pytest.mark.usefixtures("unrounded")
def test_two_caches_in_two_threads(family: str, cell: Check) -> None:
    unsafe = FAMILIES[family].grows_tables
    cell(family, "two threads", "unsafe in transformers" if unsafe else "works")
    plain, model = build(family), build(family)
    prompts = [token_ids(2, 86, seed=1), token_ids(2, 70, seed=2)]
    if unsafe:  # with a dense cache, and one after the other
        before = plain(prompts[1]).logits
        plain(prompts[0])
        assert not torch.allclose(plain(prompts[1]).logits, before, rtol=1e-2)
        return
    expected = [plain.generate(prompt, **GREEDY) for prompt in prompts]
    caches = [SpectralCache(model, config=LOSSLESS) for _ in prompts]
    outcomes: list[Any] = [None, None]

    def work(index: int) -> None:
        try:
            outcomes[index] = model.generate(prompts[index], **GREEDY, **cache_argument(caches[index]))
        except BaseException as error:
            outcomes[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for tokens, wanted, spectral in zip(outcomes, expected, caches, strict=True):
        assert isinstance(tokens, torch.Tensor), tokens
        assert torch.equal(tokens, wanted)
        assert min(sealed_tokens(spectral)) >= 4 * BLOCK


@families
def test_training_without_a_cache(family: str, cell: Check, assert_close: Check) -> None:
    cell(family, "training", "works")
    plain, model = build(family).train(), build(family).train()
    SpectralCache(model, config=LOSSLESS)
    inputs = padded_batch()
    # No label for padding, nor for the token behind it, which padding would have to predict.
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"].cumsum(-1) <= 1, -100)
    losses = []
    for candidate in (plain, model):
        torch.manual_seed(0)  # some drop out
        losses.append(candidate(**inputs, labels=labels, use_cache=False).loss)
        losses[-1].backward()
    assert_close(losses[1], losses[0], 1e-6)
    compared = 0
    for (name, expected), outcomes in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert (expected.grad is None) == (outcomes.grad is None), name
        if expected.grad is not None and expected.grad.abs().max() > 1e-6:
            assert_close(outcomes.grad, expected.grad, 1e-4)
            compared += 1
    assert compared > 5
