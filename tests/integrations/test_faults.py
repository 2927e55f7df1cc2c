"""Interruptions, failures and numbers that are not finite under a real model: no token is lost, generation goes on."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import unsloth_spectral
from unsloth_spectral import SpectralCache, SpectralConfig, patch_unsloth_attention
from unsloth_spectral.codec.rank import factors as rank_codec
from unsloth_spectral.codec.spectral import keys as key_codec
from unsloth_spectral.errors import SpectralError
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument
from unsloth_spectral.rope import joining

Build = Callable[..., LlamaForCausalLM]
PACKAGE = str(Path(unsloth_spectral.__file__).parent)
CONFIGS = {
    "spectral": SpectralConfig(block_size=128, residual_length=16, bits_per_element=8),
    "rank": SpectralConfig(16, 16, 128, 4, 16),
}
codecs = pytest.mark.parametrize("codec", CONFIGS)
# Logits of these models spread by about 1.6; eight bits move them by up to 0.05, a lost token by more than 1.
NEAR = 0.15
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.1,
}


def model_of(tiny_llama: Build) -> LlamaForCausalLM:
    model = tiny_llama(initializer_range=0.1)
    model.generation_config.eos_token_id = None
    return model


def token_ids(batch: int = 1, length: int = 300, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    return model(ids, **cache_argument(cache), use_cache=True).logits[:, -1]


def greedy(model: Any, ids: torch.Tensor, cache: Any, count: int = 12) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=count, do_sample=False, **cache_argument(cache))


class Lines:
    """Counts the lines that the package runs, and raises KeyboardInterrupt before the ``stop``-th of them."""

    def __init__(self, stop: int | None = None) -> None:
        self.count, self.stop = 0, stop

    @contextmanager
    def traced(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            yield
        finally:
            sys.settrace(before)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.count += 1
            if self.count == self.stop:
                raise KeyboardInterrupt
        return self._trace


@codecs
@pytest.mark.parametrize("call", ["prefill", "decode", "many tokens"])
def test_an_interruption_at_any_line_of_a_forward_pass_loses_nothing(codec: str, call: str, tiny_llama: Build) -> None:
    model = model_of(tiny_llama)
    # Sealing takes place in each of these calls: 300 tokens at once, the 128th after a sealing, 200 more.
    first, then = {"prefill": (0, 300), "decode": (275, 1), "many tokens": (300, 200)}[call]
    ids = token_ids(length=first + then)

    def filled() -> SpectralCache:
        cache = SpectralCache(model, config=CONFIGS[codec])
        for start, stop in ((0, 148), (148, first)) if call == "decode" else ((0, first),):
            if stop > start:
                logits(model, ids[:, start:stop], cache)
        joining._last.joined = ()  # Every pass that follows runs as many lines, whatever passes came before.
        return cache

    logits(model, ids[:, first:], filled())  # what is found out once per process is known from now on
    whole, lines = filled(), Lines()
    sealed = whole.stats().layers[0].sealed_tokens
    with lines.traced():
        expected = logits(model, ids[:, first:], whole)
    assert whole.stats().layers[0].sealed_tokens > sealed, "no sealing to interrupt"
    assert lines.count > 300
    places = range(1, lines.count + 1, max(1, lines.count // 40))
    for place in places:
        cache, interrupted = filled(), Lines(place)
        with pytest.raises(KeyboardInterrupt), interrupted.traced():
            logits(model, ids[:, first:], cache)
        assert interrupted.count == place
        for layer in cache.layers:
            assert layer.get_seq_length() in (first, first + then)
        if cache.get_seq_length() == first:  # else the last layer has them too: only the answer is lost
            spectral_logits = logits(model, ids[:, first:], cache)
            assert float((spectral_logits - expected).abs().max()) < NEAR, f"at line {place} of {lines.count}"
        assert cache.get_seq_length() == first + then
        for layer, other in zip(cache.layers, whole.layers, strict=True):
            assert layer.spectral.num_tokens == first + then
            assert layer.spectral.stats().exact_blocks == 0
            for rebuilt, original in zip(layer.spectral.reconstruct(), other.spectral.reconstruct(), strict=True):
                assert float((rebuilt - original).norm() / original.norm()) < 0.05


@codecs
@pytest.mark.parametrize("spoken", [0, 1, 5])
def test_generation_goes_on_after_an_interruption_in_the_middle_of_the_model(
    codec: str, spoken: int, tiny_llama: Build
) -> None:
    model, ids = model_of(tiny_llama), token_ids()
    expected = greedy(model, ids, DynamicCache(config=model.config))
    cache, calls = SpectralCache(model, config=CONFIGS[codec]), []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == spoken + 1:
            raise KeyboardInterrupt

    hook = model.model.layers[0].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        greedy(model, ids, cache)
    hook.remove()
    lengths = [layer.get_seq_length() for layer in cache.layers]
    assert lengths[0] > lengths[1], "the first layer is a pass ahead"
    assert cache.get_seq_length() == lengths[1]
    # What had been written, and the rest anew, from the same cache.
    written = expected[:, : 300 + spoken]
    assert torch.equal(greedy(model, written, cache, 12 - spoken), expected)
    assert min(layer.sealed_tokens for layer in cache.stats().layers) >= 128


def test_an_interrupted_pass_of_a_model_with_sliding_layers_is_not_taken_for_whole() -> None:
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SMALL, num_hidden_layers=4, sliding_window=24)).eval()
    cache, ids = SpectralCache(model, config=CONFIGS["rank"]), token_ids()
    whole = SpectralCache(model, config=CONFIGS["rank"])
    expected = logits(model, ids, whole)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(model, ids, cache)
    hook.remove()
    with pytest.raises(SpectralError, match=r"interrupted, and DynamicSlidingWindowLayer .* call cache.reset\(\)"):
        logits(model, ids, cache)
    cache.reset()
    assert torch.equal(logits(model, ids, cache), expected)


@codecs
@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("can't allocate memory")])
def test_generation_goes_on_where_sealing_fails_for_want_of_memory(
    codec: str, error: Exception, tiny_llama: Build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = model_of(tiny_llama), token_ids()
    expected = greedy(model, ids, DynamicCache(config=model.config))

    def fail(*_: Any, **__: Any) -> None:
        raise error

    cache = SpectralCache(model, config=CONFIGS[codec])
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "unsloth_spectral"):
        patch.setattr(key_codec if codec == "spectral" else rank_codec, "encode", fail)
        tokens = greedy(model, ids, cache)
    assert torch.equal(tokens, expected)
    assert str(error) in caplog.text
    assert [layer.exact_blocks for layer in cache.stats().layers] == [2, 2]
    assert [layer.sealed_tokens for layer in cache.stats().layers] == [0, 0]
    # With memory again later tokens are sealed.
    logits(model, token_ids(length=200, seed=1), cache)
    assert min(layer.sealed_tokens for layer in cache.stats().layers) >= 128


@codecs
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_in_one_row_leaves_the_other_rows_right(codec: str, bad: float, tiny_llama: Build) -> None:
    model, ids = model_of(tiny_llama), token_ids(2)
    expected = greedy(model, ids, DynamicCache(config=model.config))
    cache = SpectralCache(model, config=CONFIGS[codec])

    def spoil(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        if output.shape[1] > 200:  # the prefill
            output = output.clone()
            output[1, 150, 3] = bad
        return output

    hook = model.model.layers[1].self_attn.k_proj.register_forward_hook(spoil)
    tokens = greedy(model, ids, cache)
    hook.remove()
    assert torch.equal(tokens[0], expected[0])
    first, second = cache.stats().layers
    assert first.exact_blocks == 0
    assert first.sealed_tokens == 256
    assert second.exact_blocks == 1, "one block, of both rows"
    assert second.sealed_tokens == 128
    assert not cache.layers[1].spectral.reconstruct()[0][1, :, 150].isfinite().all()


def test_an_early_exit_makes_a_cache_of_the_first_layers() -> None:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SMALL, num_hidden_layers=4)).eval()
    model.generation_config.eos_token_id = None
    ids = token_ids()
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    patch_unsloth_attention(model, block_size=128, k_rank_keys=16, k_rank_values=16)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, assistant_early_exit=2), expected)
