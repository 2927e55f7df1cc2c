"""The cache that sends old tokens through a codec, and the library's own quantized cache as a peer."""

import copy
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, LlamaForCausalLM

from unsloth_spectral.errors import InvalidArgumentError, UnsupportedModelError
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument
from unsloth_spectral.integrations.huggingface.quantized import NBITS, CountedQuantizedCache
from unsloth_spectral.integrations.huggingface.roundtrip import RoundTripCache

Build = Callable[..., LlamaForCausalLM]


class Recorder:
    """A codec that remembers what it was given; lossless, or zeros."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, int]:
        self.seen.append((keys, values))
        return keys * self.factor, values * self.factor, 3 * (keys.numel() + values.numel())


def prompt(count: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(3, 128, (batch, count), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, cache: Any, ids: Tensor, **options: Any) -> list[list[int]]:
    settings = {"max_new_tokens": 80, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    return model.generate(ids, **cache_argument(cache), **(settings | options)).tolist()


def fill(cache: Any, count: int, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The same random keys and values ``[batch, 2, count, 16]`` into both layers of a ``tiny_llama``'s cache."""
    keys, values = torch.randn(2, batch, 2, count, 16, generator=torch.Generator().manual_seed(seed))
    for layer in range(2):
        cache.update(keys, values, layer)
    return keys, values


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}, {"prefill_chunk_size": 50}])
def test_a_lossless_codec_gives_the_dense_tokens(tiny_llama: Build, options: dict[str, Any]) -> None:
    model, recorder, ids = tiny_llama(), Recorder(), prompt(120)
    cache = RoundTripCache(model, recorder)
    assert generate(model, cache, ids, **options) == generate(model, DynamicCache(), ids, **options)
    assert len(recorder.seen) >= 2 * 3  # in both layers, the prefill's and some of generation's


def test_a_batch_gives_the_dense_tokens(tiny_llama: Build) -> None:
    model, ids = tiny_llama(), prompt(120, batch=3)
    assert generate(model, RoundTripCache(model, Recorder()), ids) == generate(model, DynamicCache(), ids)


def test_sinks_and_newest_stay_exact_and_what_is_between_is_replaced(tiny_llama: Build) -> None:
    cache = RoundTripCache(tiny_llama(), Recorder(factor=0.0))
    keys, _ = fill(cache, 200)
    layer = cache.layers[0]
    assert isinstance(layer.keys, Tensor)
    # 200 - 4 - 64 = 132 are old, of which four groups of 32 have been encoded.
    assert torch.equal(layer.keys[..., :4, :], keys[..., :4, :])
    assert not layer.keys[..., 4:132, :].any()
    assert torch.equal(layer.keys[..., 132:, :], keys[..., 132:, :])


@pytest.mark.parametrize("steps", [[200], [1] * 200, [99, 101], [67, 1, 132]])
def test_every_token_is_encoded_once_and_exactly_as_it_came(tiny_llama: Build, steps: list[int]) -> None:
    recorder = Recorder(factor=0.5)
    cache = RoundTripCache(tiny_llama(), recorder)
    keys, values = torch.randn(2, 1, 2, 200, 16, generator=torch.Generator().manual_seed(1))
    start = 0
    for step in steps:
        returned, _ = cache.update(keys[..., start : start + step, :], values[..., start : start + step, :], 0)
        start += step
        assert torch.equal(returned[..., -step:, :], keys[..., start - step : start, :])  # new ones are seen exact
    assert torch.equal(torch.cat([seen for seen, _ in recorder.seen], -2), keys[..., 4:132, :])
    assert torch.equal(torch.cat([seen for _, seen in recorder.seen], -2), values[..., 4:132, :])
    assert all(seen.shape[-2] % 32 == 0 for seen, _ in recorder.seen)
    assert 64 <= 200 - cache.layers[0].sealed_end < 64 + 32  # type: ignore[union-attr]


def test_a_prefill_sees_everything_exact(tiny_llama: Build) -> None:
    model, ids = tiny_llama(), prompt(200)
    with torch.inference_mode():
        dense = model(ids, **cache_argument(DynamicCache())).logits
        lossy = model(ids, **cache_argument(RoundTripCache(model, Recorder(factor=0.0)))).logits
    assert torch.equal(dense, lossy)


def test_stats_add_up_by_hand(tiny_llama: Build) -> None:
    cache = RoundTripCache(tiny_llama(), Recorder())
    fill(cache, 200, batch=2)
    stats = cache.stats()
    per_token = 2 * 2 * 2 * 16  # keys and values, rows, heads, head_dim
    layer = stats.layers[0]
    assert (layer.num_tokens, layer.sealed_tokens) == (200, 128)
    assert layer.sink_bytes == 4 * per_token * 4
    assert layer.residual_bytes == 68 * per_token * 4
    assert layer.cold_bytes == 128 * per_token * 3 // 8
    assert stats.dense_bytes == 2 * 200 * per_token * 4
    assert stats.stored_bytes == 2 * layer.stored_bytes


def test_a_short_or_empty_cache_has_nothing_sealed(tiny_llama: Build) -> None:
    cache = RoundTripCache(tiny_llama(), Recorder())
    assert cache.stats().stored_bytes == 0
    fill(cache, 2)
    stats = cache.stats()
    assert stats.stored_bytes == stats.dense_bytes == 2 * 2 * 2 * 2 * 16 * 4
    assert stats.layers[0].sealed_tokens == 0


def test_a_copy_goes_its_own_way(tiny_llama: Build) -> None:
    cache = RoundTripCache(tiny_llama(), Recorder(factor=0.5))
    fill(cache, 200)
    before = cache.layers[0].keys
    assert before is not None
    snapshot = before.clone()
    other = copy.deepcopy(cache)
    fill(other, 100, seed=1)
    assert torch.equal(before, snapshot)
    assert (cache.get_seq_length(), other.get_seq_length()) == (200, 300)
    assert other.stats().stored_bytes > cache.stats().stored_bytes


def test_crop_takes_newest_tokens_back_but_none_that_are_encoded(tiny_llama: Build) -> None:
    cache = RoundTripCache(tiny_llama(), Recorder())
    fill(cache, 200)
    cache.crop(0)
    cache.crop(-68)
    assert cache.get_seq_length() == 132
    with pytest.raises(InvalidArgumentError, match="newest 0 are not encoded"):
        cache.crop(-1)
    with pytest.raises(InvalidArgumentError, match="zero or a negative number"):
        cache.crop(1)
    fresh = RoundTripCache(tiny_llama(), Recorder())
    fill(fresh, 50)
    fresh.crop(-50)
    assert fresh.get_seq_length() == 0
    assert fresh.stats().stored_bytes == 0


@pytest.mark.skipif(transformers.__version__.startswith("5.17."), reason="its dense layers keep their length")
def test_reset_forgets_everything(tiny_llama: Build) -> None:
    model, ids = tiny_llama(), prompt(120)
    cache = RoundTripCache(model, Recorder(factor=0.9))
    first = generate(model, cache, ids)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert generate(model, cache, ids) == first


def test_bits_follow_the_rows(tiny_llama: Build) -> None:
    cache = RoundTripCache(tiny_llama(), Recorder())
    fill(cache, 200, batch=2)
    bits = cache.layers[0].num_bits  # type: ignore[union-attr]
    cache.batch_repeat_interleave(3)
    assert cache.layers[0].num_bits == 3 * bits  # type: ignore[union-attr]
    cache.batch_select_indices(torch.tensor([0]))
    assert cache.layers[0].num_bits == bits // 2  # type: ignore[union-attr]
    cache.batch_select_indices(torch.tensor([True]))
    assert cache.layers[0].num_bits == bits // 2  # type: ignore[union-attr]


def test_other_layers_keep_their_native_cache() -> None:
    config = Gemma3TextConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Gemma3ForCausalLM(config).eval()
    recorder = Recorder()
    cache = RoundTripCache(model, recorder)
    ids = prompt(120)
    assert generate(model, cache, ids) == generate(model, DynamicCache(config=config), ids)
    assert {seen.shape[1] for seen, _ in recorder.seen} == {1}
    assert [layer.sealed_tokens > 0 for layer in cache.stats().layers] == [False, True]
    with pytest.raises(UnsupportedModelError, match="Gemma3ForCausalLM has layers of type sliding_attention"):
        CountedQuantizedCache(model, "hqq", 4)


@pytest.mark.parametrize("name", ["num_sink_tokens", "residual_length", "group"])
def test_options_are_checked(tiny_llama: Build, name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{name} must be at least"):
        RoundTripCache(tiny_llama(), Recorder(), **{name: -1})


# The library's own quantized cache

ALL_NBITS = [(backend, nbits) for backend, offered in NBITS.items() for nbits in offered]


def quantized(model: Any, backend: str, nbits: int) -> CountedQuantizedCache:
    if find_spec({"quanto": "optimum", "hqq": "hqq"}[backend]) is None:
        pytest.skip(f"{backend} is not installed")
    return CountedQuantizedCache(model, backend, nbits)


@pytest.mark.parametrize(("backend", "nbits"), ALL_NBITS)
@pytest.mark.parametrize("head_dim", [16, 60, 80])
def test_quantized_takes_any_length_and_errs_no_more_than_its_bits(
    tiny_llama: Build, backend: str, nbits: int, head_dim: int
) -> None:
    cache = quantized(tiny_llama(head_dim=head_dim), backend, nbits)
    keys, values = torch.randn(2, 1, 2, 101, head_dim, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        returned, _ = cache.update(keys, values, 0)
        assert torch.equal(returned, keys)
        new = torch.randn(1, 2, 7, head_dim)
        keys_hat, values_hat = cache.update(new, new, 0)
    assert keys_hat.shape == (1, 2, 108, head_dim)
    assert keys_hat.dtype == torch.float32
    assert torch.equal(keys_hat[..., 101:, :], new)
    # Half a step of a group's range, 5 to 6 standard deviations, uniform: the error's share of the variance.
    allowed = (6.0 / (2**nbits - 1)) ** 2 / 12 + 1e-5
    for exact, decoded in ((keys, keys_hat), (values, values_hat)):
        assert (decoded[..., :101, :] - exact).square().mean() < 1.5 * allowed * exact.var()


@pytest.mark.parametrize(("backend", "nbits"), ALL_NBITS)
def test_quantized_counts_its_tensors(tiny_llama: Build, backend: str, nbits: int) -> None:
    cache = quantized(tiny_llama(), backend, nbits)
    fill(cache, 128)
    layer = cache.stats().layers[0]
    elements = 2 * 2 * 128 * 16
    # hqq packs ten codes of 3 bits into 32: 64 groups of 64 become 7.
    codes = elements * nbits // 8 if nbits != 3 else 2 * 7 * 4 * elements // 2 // 64
    assert layer.cold_bytes == codes + 2 * 2 * elements // 64  # scale and zero, float16
    assert (layer.sealed_tokens, layer.residual_bytes) == (128, 0)
    fill(cache, 10)
    layer = cache.stats().layers[0]
    assert (layer.num_tokens, layer.sealed_tokens) == (138, 128)
    assert layer.residual_bytes == 10 * 2 * 2 * 16 * 4
    assert layer.dense_bytes == 138 * 2 * 2 * 16 * 4


@pytest.mark.parametrize("nbits", NBITS["quanto"])
def test_quanto_reads_back_what_it_stored(tiny_llama: Build, nbits: int) -> None:
    """Against a plain loop: keys in groups of 64 tokens of a channel, values of 64 neighbours of a token."""
    cache = quantized(tiny_llama(head_dim=64), "quanto", nbits)
    keys, values = torch.randn(2, 1, 2, 128, 64, generator=torch.Generator().manual_seed(0)).half()
    for _ in range(2):
        keys_hat, values_hat = cache.update(keys, values, 0)

    def plain(group: Tensor) -> Tensor:
        low, step = group.min(), (group.max() - group.min()) / (2**nbits - 1)
        return ((group - low) / step).round().clamp(0, 2**nbits - 1).float() * step.float() + low.float()

    for head in range(2):
        for start in (0, 64):
            for index in range(64):
                window = slice(start, start + 64)
                expected = plain(keys[0, head, window, index])
                assert torch.allclose(keys_hat[0, head, window, index].float(), expected, atol=2e-3)
                expected = plain(values[0, head, start + index])
                assert torch.allclose(values_hat[0, head, start + index].float(), expected, atol=2e-3)


@pytest.mark.parametrize(("backend", "nbits"), [("quanto", 4), ("hqq", 8)])
def test_quantized_copies_resets_and_generates(tiny_llama: Build, backend: str, nbits: int) -> None:
    model, ids = tiny_llama(), prompt(101, batch=2)
    cache = quantized(model, backend, nbits)
    first = generate(model, cache, ids)
    assert len(first[0]) == 181
    length = cache.get_seq_length()
    other = copy.deepcopy(cache)
    fill(other, 70, batch=2)
    assert (cache.get_seq_length(), other.get_seq_length()) == (length, length + 70)
    cache.reset()
    assert cache.stats().stored_bytes == 0
    assert generate(model, cache, ids) == first


def test_quantized_options_are_checked(tiny_llama: Build) -> None:
    for backend, nbits in (("quanto", 8), ("gptq", 4)):
        with pytest.raises(InvalidArgumentError, match="backend and nbits must be among"):
            CountedQuantizedCache(tiny_llama(), backend, nbits)
