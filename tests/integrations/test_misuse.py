"""A cache used with a model that cannot read it gives an error that names the line to add."""

import copy
import gc
import logging
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families.lossless import LOSSLESS, sealed_tokens, token_ids
from families.models import build, make
from transformers.models.llama import modeling_llama

from unsloth_spectral import SpectralCache, patch_unsloth_attention, unpatch_unsloth_attention
from unsloth_spectral.cache.layer import SpectralLayer
from unsloth_spectral.errors import SpectralError
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument, cache_in
from unsloth_spectral.integrations.huggingface.handle import CompressedStates
from unsloth_spectral.integrations.huggingface.layers import MaterialisingCacheLayer, SpectralCacheLayer

MEND = r"cache = SpectralCache\(model\)$"
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        *((family, "eager") for family in ("Llama", "GPT-NeoX", "Gemma 2", "gpt-oss", "Phi-3", "GPT-2")),
        *((family, "sdpa") for family in ("Llama", "GPT-NeoX", "Phi-3", "GPT-2")),
    ],
)
def test_an_attention_set_anew_is_named_and_the_line_given_mends_it(family: str, attention: str) -> None:
    model = build(family)
    spectral = SpectralCache(model, config=LOSSLESS)
    model.set_attn_implementation(attention)
    with pytest.raises(SpectralError, match=MEND) as caught:
        model.generate(token_ids(), **GREEDY, **cache_argument(spectral))
    message = str(caught.value)
    assert "\n" not in message
    assert f"attends with '{attention}'" in message
    assert "set_attn_implementation" in message
    assert "Attention attends" in message, "the module is named"
    model.generate(token_ids(), **GREEDY)  # a cache of the model's own works
    cache = SpectralCache(model, config=LOSSLESS)
    model.generate(token_ids(), **GREEDY, **cache_argument(cache))
    assert min(sealed_tokens(cache)) > 0


@pytest.mark.parametrize("is_alive", [True, False])
@torch.no_grad()
def test_a_cache_made_for_another_model_that_was_never_switched(is_alive: bool) -> None:
    owner = build("Llama")
    spectral = SpectralCache(owner, config=LOSSLESS)
    if not is_alive:
        del owner
        gc.collect()
    with pytest.raises(SpectralError, match=MEND) as caught:
        build("Qwen2")(token_ids(), **cache_argument(spectral))
    name = " LlamaForCausalLM" if is_alive else ""
    assert f"read by another model than the cache's{name}, or after unpatching" in str(caught.value)
    assert "for this very model" in str(caught.value)


@pytest.mark.parametrize("num_layers", [1, 3])
@torch.no_grad()
def test_a_cache_made_for_another_model_of_other_depth(num_layers: int) -> None:
    other = make("Llama", num_hidden_layers=num_layers).eval()
    SpectralCache(other, config=LOSSLESS)
    spectral = SpectralCache(build("Llama"), config=LOSSLESS)
    with pytest.raises(SpectralError, match=f"has 2 layers, the model running with it has {num_layers}.*{MEND}"):
        other(token_ids(), **cache_argument(spectral))
    assert spectral.get_seq_length() == 0


@torch.no_grad()
def test_a_layer_that_the_cache_does_not_have() -> None:
    spectral = SpectralCache(build("Llama"), config=LOSSLESS)
    with pytest.raises(SpectralError, match=f"has more than 2.*{MEND}"):
        spectral.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), 2)


def repeats_keys(module: torch.nn.Module, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
    """The forward of an attention module that computes with what the cache gives it."""
    split = (*hidden_states.shape[:-1], -1, module.head_dim)
    query, key, value = (
        projection(hidden_states).view(split).transpose(1, 2)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    query, key = modeling_llama.apply_rotary_pos_emb(query, key, *kwargs["position_embeddings"])
    if cache_in(kwargs) is not None:
        key, value = cache_in(kwargs).update(key, value, module.layer_idx)
    key, value = (torch.repeat_interleave(states, query.shape[1] // 2, dim=1) for states in (key, value))
    attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1)
    return module.o_proj(attended.transpose(1, 2).flatten(2)), None


@pytest.fixture
def unlisted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama's attention computes with its keys, and the library does not know."""
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", repeats_keys)


@pytest.mark.usefixtures("unlisted", "unrounded")
def test_an_unlisted_model_that_computes_with_its_keys(caplog: pytest.LogCaptureFixture) -> None:
    expected = build("Llama").generate(token_ids(), **GREEDY)
    model = build("Llama")
    spectral = SpectralCache(model, config=LOSSLESS)
    with pytest.raises(SpectralError, match=MEND) as caught:
        model.generate(token_ids(), **GREEDY, **cache_argument(spectral))
    assert "LlamaAttention computes with them itself" in str(caught.value)
    assert "torch's `repeat_interleave`" in str(caught.value)
    with caplog.at_level(logging.WARNING, logger="unsloth_spectral"):
        cache = SpectralCache(model, config=LOSSLESS)
    assert "rebuilt at every step" in caplog.text
    assert torch.equal(model.generate(token_ids(), **GREEDY, **cache_argument(cache)), expected)
    assert min(sealed_tokens(cache)) > 0


@pytest.mark.usefixtures("unlisted", "unrounded")
def test_a_patched_unlisted_model_works_the_second_time() -> None:
    expected = build("Llama").generate(token_ids(), **GREEDY)
    model = build("Llama")
    patch_unsloth_attention(model, config=LOSSLESS)
    with pytest.raises(SpectralError, match="from now on"):
        model.generate(token_ids(), **GREEDY)
    assert torch.equal(model.generate(token_ids(), **GREEDY), expected)


@pytest.mark.usefixtures("unlisted")
@torch.no_grad()
def test_the_model_that_computes_with_its_keys_is_marked_and_no_other() -> None:
    model, bystander = build("Llama"), build("Llama")
    spectral, spared = (SpectralCache(tested_model, config=LOSSLESS) for tested_model in (model, bystander))
    with pytest.raises(SpectralError, match="from now on"):
        model(token_ids(), **cache_argument(spectral))
    twin = copy.deepcopy(model)
    for tested_model, kind in (
        (model, MaterialisingCacheLayer),
        (twin, MaterialisingCacheLayer),
        (bystander, SpectralCacheLayer),
    ):
        assert {type(layer) for layer in SpectralCache(tested_model, config=LOSSLESS).layers} == {kind}
    # The cache of one model in the hands of another marks neither.
    with pytest.raises(SpectralError, match=f"LlamaAttention is a module of another model.*{MEND}"):
        bystander(token_ids(), **cache_argument(SpectralCache(build("Llama"), config=LOSSLESS)))
    assert {type(layer) for layer in SpectralCache(bystander, config=LOSSLESS).layers} == {SpectralCacheLayer}
    with pytest.raises(SpectralError, match="from now on"):
        bystander(token_ids(), **cache_argument(spared))


@torch.no_grad()
def test_a_look_at_what_an_interrupted_pass_left_marks_no_model() -> None:
    model = build("Llama")
    cache = SpectralCache(model, config=LOSSLESS)
    model(token_ids(), **cache_argument(cache))
    hook = model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(token_ids(length=1), **cache_argument(cache))
    hook.remove()
    assert cache.layers[1].call is not None, "the test interrupts too early or too late"
    for layer in (cache.layers[1], copy.deepcopy(cache).layers[1]):
        with pytest.raises(SpectralError, match=r"cache\.stats"):
            _ = layer.keys.shape
    assert copy.deepcopy(cache).layers[1].call is cache.layers[1].call, "a copy of a cache copies no module"
    assert {type(layer) for layer in SpectralCache(model, config=LOSSLESS).layers} == {SpectralCacheLayer}


@torch.no_grad()
def test_a_cache_used_after_unpatching() -> None:
    model = build("Llama")
    cache = SpectralCache(model, config=LOSSLESS)
    unpatch_unsloth_attention(model)
    with pytest.raises(SpectralError, match=f"after unpatching.*{MEND}"):
        model(token_ids(), **cache_argument(cache))


TENSOR = torch.zeros(1, 2, 3, 4)
ABUSES: dict[str, Callable[[Any], Any]] = {
    "shape": lambda handle: handle.shape,
    "transpose": lambda handle: handle.transpose(1, 2),
    "device": lambda handle: handle.device,
    "cat": lambda handle: torch.cat([TENSOR, handle], dim=2),
    "stack": lambda handle: torch.stack([handle, handle]),
    "matmul": lambda handle: torch.matmul(TENSOR, handle),
    "einsum": lambda handle: torch.einsum("bhqd,bhkd->bhqk", TENSOR, handle),
    "scaled_dot_product_attention": lambda handle: torch.nn.functional.scaled_dot_product_attention(
        TENSOR, handle, handle
    ),
    "softmax": lambda handle: torch.nn.functional.softmax(handle, dim=-1),
    "a tensor's method": lambda handle: TENSOR.add(handle),
    "tensor @ handle": lambda handle: TENSOR @ handle,
    "handle @ tensor": lambda handle: handle @ TENSOR,
    "handle + tensor": lambda handle: handle + TENSOR,
    "tensor * handle": lambda handle: TENSOR * handle,
    "number - handle": lambda handle: 1.0 - handle,
    "-handle": operator.neg,
    "handle < number": lambda handle: handle < 1,
    "index": lambda handle: handle[..., :4],
    "assignment": lambda handle: operator.setitem(handle, 0, TENSOR),
    "len": len,
    "iter": iter,
    "unpacking": lambda handle: [*handle],
    "in": lambda handle: 1.0 in handle,
    "float": float,
}


@pytest.mark.parametrize("abuse", ABUSES)
def test_a_handle_is_no_tensor(abuse: str) -> None:
    handle = CompressedStates(SpectralLayer(LOSSLESS), seal_after=True)
    with pytest.raises(SpectralError, match="the keys and values in a spectral cache are compressed") as caught:
        ABUSES[abuse](handle)
    assert "cache.stats()" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_handle_can_be_copied() -> None:
    handle = CompressedStates(SpectralLayer(LOSSLESS), seal_after=True)
    assert copy.deepcopy(handle).seal_after
    assert copy.copy(handle).layer is handle.layer
    with pytest.raises(AttributeError):
        _ = handle.__array_interface__


@torch.no_grad()
def test_attention_weights_are_refused_where_they_cannot_be_had() -> None:
    model = build("Llama")
    spectral = SpectralCache(model, config=LOSSLESS)
    with pytest.raises(SpectralError, match=r'unpatch_unsloth_attention\(model\) and model.set_attn_implem.*"eager"'):
        model(token_ids(), **cache_argument(spectral), output_attentions=True)
    # The call that failed left nothing behind.
    model(token_ids(), **cache_argument(spectral))
    assert spectral.get_seq_length() == 80
    unpatch_unsloth_attention(model)
    model.set_attn_implementation("eager")
    attentions = model(token_ids(), output_attentions=True).attentions
    assert [weights.shape for weights in attentions] == [(1, 4, 80, 80)] * 2
