"""The measurement of a profile: damages by gradients, texts that repeat facts, and what the profile says of heads."""

import logging
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families.models import build
from transformers import DynamicCache, LlamaForCausalLM

from unsloth_spectral.eval.head_damages import head_damages
from unsloth_spectral.eval.profile import _Text, measure_profile
from unsloth_spectral.eval.recall_text import recall_text
from unsloth_spectral.eval.tasks.asking import continue_on
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument
from unsloth_spectral.integrations.models import LoadedModel

Build = Callable[..., LlamaForCausalLM]
PREFIX, CONTINUATION = 200, 40


@pytest.fixture
def loaded(tiny_llama: Build, character_tokenizer: Any) -> LoadedModel:
    return LoadedModel(tiny_llama(initializer_range=0.3), character_tokenizer, "tiny")


def test_damages_by_gradients_are_those_of_small_errors(loaded: LoadedModel) -> None:
    model = loaded.model
    ids = torch.randint(128, (1, PREFIX + CONTINUATION), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        filled = DynamicCache(config=model.config)
        model(ids[:, :PREFIX], **cache_argument(filled))
    cached = [tensor for layer in filled.layers for tensor in (layer.keys, layer.values)]

    def logits_of(tensors: list[torch.Tensor]) -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        for layer in range(2):
            cache.update(tensors[2 * layer], tensors[2 * layer + 1], layer)
        return model(ids[:, PREFIX:], **cache_argument(cache)).logits[0]

    def kl(tensors: list[torch.Tensor]) -> float:
        with torch.no_grad():
            expected, actual = (logits_of(given).double().log_softmax(-1) for given in (cached, tensors))
        return float((expected.exp() * (expected - actual)).sum(-1).mean())

    generator = torch.Generator().manual_seed(0)
    for place, tensor in enumerate(cached):
        for head in range(2):
            measured, estimated = 0.0, 0.0
            for _ in range(4):
                errors = [torch.zeros_like(other) for other in cached]
                errors[place][:, head] = 0.02 * torch.randn(tensor[:, head].shape, generator=generator)
                measured += kl([other + error for other, error in zip(cached, errors, strict=True)])
                damages = head_damages(logits_of, cached, errors, draws=16)
                estimated += float(damages[place][head])
                assert not any(damages[other].any() for other in range(4) if other != place)
                assert not damages[place][1 - head]
            assert estimated == pytest.approx(measured, rel=0.5)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", ["Llama", "Gemma 3", "gpt-oss", "LFM2", "Qwen3-Next"])
def test_copies_of_the_dense_cache_answer_as_it_does(family: str, character_tokenizer: Any, document: str) -> None:
    """Some layers keep a window of tokens, or a state, and the first layer tells the model the position."""
    loaded = LoadedModel(build(family), character_tokenizer, family)
    ids = torch.randint(3, 100, (1, 621), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        text = _Text(loaded, ids, 600, None, 0, 1)
        first, second, own = (
            continue_on(loaded, cache, text.continuation) for cache in (text._cache({}), text._cache({}), text.dense)
        )
    assert torch.equal(first, own)
    assert torch.equal(second, own), "a continuation has changed the cache"
    profile = measure_profile(loaded, document=document, starts=(0,), prefix=600, continuation=20)
    assert profile.is_consistent
    assert min(map(max, profile.key_sensitivities)) > 0


def test_a_model_without_gradients_gets_equal_heads(loaded: LoadedModel, document: str, caplog: Any) -> None:
    weights = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    with torch.inference_mode():
        made_here = {name: tensor.clone() for name, tensor in weights.items()}
        for name in list(dict(loaded.model.named_parameters())):
            owner, _, leaf = name.rpartition(".")
            frozen = torch.nn.Parameter(made_here[name], requires_grad=False)
            setattr(loaded.model.get_submodule(owner), leaf, frozen)
        with caplog.at_level(logging.WARNING, "unsloth_spectral"):
            profile = measure_profile(loaded, document=document, starts=(0,), prefix=300, continuation=20)
    assert "does not tell a layer's heads apart" in caplog.text
    assert profile.is_consistent


@pytest.mark.parametrize(("prefix", "continuation"), [(20, 5), (60, 400), (2048, 128)])
def test_recalled_facts_stand_in_the_prefix(loaded: LoadedModel, prefix: int, continuation: int) -> None:
    text = torch.full((1, prefix), 3 + ord("~"))
    ids = recall_text(loaded, text, prefix, continuation, seed=0)
    assert ids.shape == (1, prefix + continuation + 1)
    letters = "".join(chr(token - 3) for token in ids[0].tolist())
    told, recalled = letters[:prefix], letters[prefix:]
    if prefix > 40:
        facts = [fact.strip() + "." for fact in recalled.split(".")[:-1]]
        assert facts
        assert all(fact in told for fact in facts)
        assert told.count("~") >= prefix // 3, "the text itself fills half of the prefix"
        assert [told.index(fact) for fact in facts] != sorted(told.index(fact) for fact in facts) or len(
            set(facts)
        ) == 1
    assert torch.equal(ids, recall_text(loaded, text, prefix, continuation, seed=0))
    assert not torch.equal(ids, recall_text(loaded, text, prefix, continuation, seed=1))


def test_a_head_that_nothing_reads_hardly_matters(loaded: LoadedModel, document: str) -> None:
    """The output projection ignores the query heads of key-value head 1 in layer 0."""
    attention: Any = loaded.model.model.layers[0].self_attn
    with torch.no_grad():
        attention.o_proj.weight[:, attention.o_proj.weight.shape[1] // 2 :] = 0
    steps: dict[str, list[tuple[int, int]]] = defaultdict(list)
    profile = measure_profile(
        loaded,
        document=document,
        starts=(0, 300),
        prefix=600,
        continuation=20,
        on_progress=lambda stage, done, total: steps[stage].append((done, total)),
    )
    assert profile.is_consistent
    keys = torch.tensor(profile.key_sensitivities)
    assert keys.shape == (2, 2)
    assert keys[0, 1] == keys.min() < 0.1 * keys[0, 0]
    assert len(steps) == 2
    for reported in steps.values():
        assert reported == sorted(reported)
        assert reported[-1][0] == reported[-1][1]
