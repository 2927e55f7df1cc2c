"""Leaving a fast path and noticing a bypass, on models dressed as Unsloth's; the real ones are in real_unsloth."""

import importlib
import pickle
import re
import sys
import threading
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from unsloth_spectral import (
    SpectralCache,
    SpectralConfig,
    patch_unsloth_attention,
    spectral,
    unpatch_unsloth_attention,
)
from unsloth_spectral.errors import CacheBypassedError
from unsloth_spectral.integrations.fast_path import TransformersMethod
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument, cache_of
from unsloth_spectral.integrations.huggingface.layers import SpectralCacheLayer
from unsloth_spectral.integrations.huggingface.methods import Method
from unsloth_spectral.integrations.huggingface.switch import ATTENTION_NAME

IDS = torch.randint(3, 128, (1, 60), generator=torch.Generator().manual_seed(0))
OPTIONS = {"block_size": 16, "k_rank_keys": 8, "k_rank_values": 8}


@pytest.fixture
def model(tiny_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    built = tiny_llama(initializer_range=0.1)
    built.generation_config.eos_token_id = None
    return built


@pytest.fixture
def fast(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Dressed as Unsloth's: flags on all modules, and a forward that keeps the cache away while they are set."""
    forward = model.forward

    def gated(*args: Any, **kwargs: Any) -> Any:
        if model._unsloth_fast_path:
            # As the real one does: no cache gets any tokens.
            kwargs |= cache_argument(DynamicCache(config=model.config))
        return forward(*args, **kwargs)

    model.forward = gated
    model.for_training = model.train
    for module in model.modules():
        module._unsloth_fast_path = True
    return model


def generate(model: Any, **options: Any) -> Any:
    call_options = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, **options}
    return model.generate(IDS, **call_options)


def flags(model: LlamaForCausalLM) -> set[bool]:
    return {module._unsloth_fast_path for module in model.modules()}


def test_the_fast_path_is_left_for_the_time_of_a_call(fast: LlamaForCausalLM) -> None:
    attention = fast.model.layers[0].self_attn
    attention.paged_attention = attention.paged_attention_K = attention.paged_attention_V = torch.ones(1)
    seen = []
    fast.model.register_forward_hook(lambda *_: seen.append((flags(fast), fast.config._attn_implementation)))
    patch_unsloth_attention(fast, **OPTIONS)
    assert flags(fast) == {True}
    result = generate(fast)
    assert isinstance(cache_of(result), SpectralCache)
    assert cache_of(result).get_seq_length() == 79
    assert seen == [({False}, ATTENTION_NAME)] * 20
    assert flags(fast) == {True}
    assert fast.config._attn_implementation == "sdpa"
    assert not hasattr(attention, "paged_attention")


def test_it_is_given_back_after_an_error(fast: LlamaForCausalLM) -> None:
    patch_unsloth_attention(fast, **OPTIONS)
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(fast, max_new_tokens=-1)
    assert flags(fast) == {True}
    assert isinstance(cache_of(generate(fast)), SpectralCache)


def test_an_adapter_that_sets_the_flags_again_does_not_matter(fast: LlamaForCausalLM) -> None:
    patch_unsloth_attention(fast, **OPTIONS)
    generate(fast)
    for module in fast.modules():
        module._unsloth_fast_path = True
    assert cache_of(generate(fast)).get_seq_length() == 79


def test_a_cache_of_ones_own_switches_until_unpatching(fast: LlamaForCausalLM) -> None:
    cache = SpectralCache(fast, config=SpectralConfig(8, 8, 16))
    assert flags(fast) == {False}
    assert cache_of(generate(fast, **cache_argument(cache))) is cache
    assert cache.get_seq_length() == 79
    patch_unsloth_attention(fast, **OPTIONS)
    generate(fast)
    assert flags(fast) == {False}, "the cache is still to be read"
    unpatch_unsloth_attention(fast)
    assert flags(fast) == {True}


def test_the_last_of_two_threads_gives_the_fast_path_back(fast: LlamaForCausalLM) -> None:
    patch_unsloth_attention(fast, **OPTIONS)
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda new=new: results.append(generate(fast, max_new_tokens=new))) for new in (5, 40)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(cache_of(result).get_seq_length() for result in results) == [64, 99]
    assert flags(fast) == {True}


def test_a_step_past_the_cache_is_an_error(model: LlamaForCausalLM) -> None:
    forward, steps = model.forward, []

    def third_step_past_it(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        if len(steps) == 3:
            kwargs |= cache_argument(DynamicCache(config=model.config))
        return forward(*args, **kwargs)

    model.forward = third_step_past_it
    patch_unsloth_attention(model, **OPTIONS)
    with pytest.raises(CacheBypassedError, match=r"third_step_past_it.*after 61 tokens.*pass the cache"):
        generate(model)
    assert len(steps) == 3


def test_a_generate_that_asks_for_no_cache_is_an_error(model: LlamaForCausalLM) -> None:
    model.fast_generate = lambda *args, **kwargs: "an answer from elsewhere"
    patch_unsloth_attention(model, **OPTIONS)
    with pytest.raises(CacheBypassedError, match="made no cache"):
        model.fast_generate(IDS)
    unpatch_unsloth_attention(model)
    assert model.fast_generate(IDS) == "an answer from elsewhere"


def test_fast_generate_in_vllm_is_refused_before_it_runs(model: LlamaForCausalLM) -> None:
    calls = []
    model.vllm_engine, model.fast_generate = object(), lambda *args, **kwargs: calls.append(args)
    patch_unsloth_attention(model, **OPTIONS)
    with pytest.raises(CacheBypassedError, match=r"vLLM.*fast_inference=False"):
        model.fast_generate(IDS)
    assert not calls
    assert isinstance(cache_of(generate(model)), SpectralCache)


@pytest.fixture
def copied(model: LlamaForCausalLM, tmp_path: Path) -> Iterator[LlamaForCausalLM]:
    """Of a copy of transformers' file with an attention of its own, as FastModel's compiler makes them."""
    source = Path(modeling_llama.__file__).read_text(encoding="utf-8")
    source = source.replace("from ...", "from transformers.").replace("from .", "from transformers.models.llama.")
    # Not through the interface: to transformers it cannot be changed.
    source, count = re.subn(r"ALL_ATTENTION_FUNCTIONS\.get_interface\(.*?\n        \)", "_own", source, flags=re.DOTALL)
    assert count == 1
    source += """

def _own(module, query, key, value, mask, scaling=None, **kwargs):
    return eager_attention_forward(module, query, key, value, mask, scaling=scaling)

_own.__module__ = LlamaAttention.forward.__module__ = "unsloth_zoo.temporary_patches"
"""
    name = "unsloth_compiled_module_llama"
    (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    sys.path.insert(0, str(tmp_path))
    try:
        copy = importlib.import_module(name).LlamaForCausalLM(model.config).eval()
        copy.load_state_dict(model.state_dict())
        copy.generation_config = model.generation_config
        copy.for_training = copy.train
        yield copy
    finally:
        sys.path.remove(str(tmp_path))
        del sys.modules[name]


def test_a_copy_by_unsloths_compiler_is_attended_to_directly(copied: LlamaForCausalLM) -> None:
    assert not copied._can_set_attn_implementation()
    before, forward = generate(copied), copied.model.layers[0].self_attn.forward
    patch_unsloth_attention(copied, **OPTIONS)
    cache = cache_of(generate(copied, max_new_tokens=40))
    assert isinstance(cache, SpectralCache)
    assert {type(layer) for layer in cache.layers} == {SpectralCacheLayer}, "keys are rebuilt for it"
    assert min(layer.spectral.stats().sealed_tokens for layer in cache.layers) > 0
    assert copied.model.layers[0].self_attn.forward == forward
    unpatch_unsloth_attention(copied)
    assert torch.equal(generate(copied).sequences, before.sequences)


def test_what_replaces_unsloths_methods_can_be_pickled_and_is_given_back(copied: LlamaForCausalLM) -> None:
    attention = copied.model.layers[0].self_attn
    theirs: Any = MethodType(type(attention).forward, attention)
    attention.forward = theirs
    SpectralCache(copied)
    SpectralCache(copied)
    assert isinstance(attention.forward, TransformersMethod)
    assert attention.forward.__wrapped__.__module__ == "transformers.models.llama.modeling_llama_pristine"
    expected = generate(copied).sequences
    for twin in (pickle.loads(pickle.dumps(copied)), deepcopy(copied)):
        other = twin.model.layers[0].self_attn
        assert isinstance(other.forward, TransformersMethod)
        assert other.forward.__wrapped__.__self__ is other
        assert torch.equal(generate(twin).sequences, expected)
        unpatch_unsloth_attention(twin)
        assert "forward" not in vars(twin.model.layers[1].self_attn)
    unpatch_unsloth_attention(copied)
    assert attention.forward is theirs
    assert "forward" not in vars(copied.model.layers[1].self_attn)


def test_a_method_replaced_while_the_model_is_switched_is_left_beneath(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where Unsloth is imported after a cache was made."""
    cache = SpectralCache(model)

    def unsloths(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("Unsloth's method is called")

    unsloths.__module__ = "unsloth.models.llama"
    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "prepare_inputs_for_generation", unsloths)
    SpectralCache(model)
    assert type(model.prepare_inputs_for_generation) is Method
    assert isinstance(model.prepare_inputs_for_generation.previous, TransformersMethod)
    assert cache_of(generate(model, **cache_argument(cache))) is cache
    unpatch_unsloth_attention(model)
    assert "prepare_inputs_for_generation" not in vars(model)


def test_calls_that_use_no_spectral_cache_are_left_alone(model: LlamaForCausalLM) -> None:
    expected = generate(model).sequences
    patch_unsloth_attention(model, **OPTIONS)
    assert torch.equal(generate(model, use_cache=False).sequences, expected)
    assert torch.equal(generate(model, **cache_argument(DynamicCache(config=model.config))).sequences, expected)


def test_pefts_wrapper_is_looked_through(model: LlamaForCausalLM) -> None:
    wrapper = SimpleNamespace(peft_config={}, get_base_model=lambda: model)
    patch_unsloth_attention(wrapper, **OPTIONS)
    assert isinstance(cache_of(generate(model)), SpectralCache)
    unpatch_unsloth_attention(wrapper)
    assert isinstance(cache_of(generate(model)), DynamicCache)
    with spectral(wrapper) as patched:
        assert patched is wrapper
        assert isinstance(cache_of(generate(model)), SpectralCache)
    assert isinstance(cache_of(generate(model, **cache_argument(SpectralCache(wrapper)))), SpectralCache)
