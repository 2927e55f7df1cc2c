"""Passes that are not steps of a generation, steps that bypass its cache, and the messages about them."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families.lossless import LOSSLESS, sealed_tokens, token_ids
from families.models import build
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)

from unsloth_spectral import (
    PrefixStore,
    SpectralCache,
    patch_unsloth_attention,
    spectral,
    unpatch_unsloth_attention,
)
from unsloth_spectral.errors import CacheBypassedError
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument, cache_of

IDS = token_ids(length=86)


@pytest.fixture
def model() -> PreTrainedModel:
    return build("Llama")


def generate(model: Any, **options: Any) -> Any:
    call_options = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, **options}
    return model.generate(call_options.pop("input_ids", IDS), **call_options)


def ask(model: PreTrainedModel, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """Logits after the newest four tokens alone."""
    with torch.no_grad():
        return model(input_ids[:, -4:], **options).logits[:, -1]


class AskingProcessor(LogitsProcessor):
    def __init__(self, model: PreTrainedModel, **options: Any) -> None:
        self.model, self.options = model, options

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + 0.1 * ask(self.model, input_ids, **self.options)


class AskingCriterion(StoppingCriteria):
    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return ask(self.model, input_ids)[:, 5] > 1e9


def checkpointing(model: PreTrainedModel) -> None:
    """Put ``model`` in training mode with gradient checkpointing, by the name that this transformers has for it."""
    model.train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


GUIDED = {"guidance_scale": 1.7, "negative_prompt_ids": token_ids(length=10, seed=5)}


def ways(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """Options with which ``generate`` runs ``model`` besides its steps."""
    return {
        "guidance": GUIDED,
        "guidance, no prompt": {"guidance_scale": 1.7},
        "processor": {"logits_processor": LogitsProcessorList([AskingProcessor(model, use_cache=False)])},
        "processor, caching": {"logits_processor": LogitsProcessorList([AskingProcessor(model)])},
        "criterion": {"stopping_criteria": StoppingCriteriaList([AskingCriterion(model)])},
    }


@pytest.mark.parametrize("way", ["guidance", "guidance, no prompt", "processor", "processor, caching", "criterion"])
@pytest.mark.parametrize("how", ["patched", "scope", "own", "own, patched"])
@pytest.mark.usefixtures("unrounded")
def test_a_model_run_besides_the_steps(model: PreTrainedModel, way: str, how: str) -> None:
    expected = generate(model, **ways(model)[way]).sequences
    options = ways(model)[way]
    if how.startswith("own"):
        options = {**options, **cache_argument(SpectralCache(model, config=LOSSLESS))}
    if how == "scope":
        with spectral(model, config=LOSSLESS):
            result = generate(model, **options)
    else:
        if how.endswith("patched"):
            patch_unsloth_attention(model, config=LOSSLESS)
        result = generate(model, **options)
    assert torch.equal(result.sequences, expected)
    assert isinstance(cache_of(result), SpectralCache)
    assert cache_of(result).get_seq_length() == 97
    assert min(sealed_tokens(cache_of(result))) > 0


def test_a_step_that_takes_another_cache_is_an_error(model: PreTrainedModel) -> None:
    original, steps = model.prepare_inputs_for_generation, []

    def theirs(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        inputs = original(*args, **kwargs)
        return inputs if len(steps) < 3 else {**inputs, **cache_argument(DynamicCache(config=model.config))}

    model.prepare_inputs_for_generation = theirs
    patch_unsloth_attention(model, config=LOSSLESS)
    with pytest.raises(CacheBypassedError, match="theirs took another cache for its spectral cache"):
        generate(model)
    assert len(steps) == 3


def test_a_step_that_drops_the_cache_and_cannot_read_the_text_again_is_an_error(model: PreTrainedModel) -> None:
    original = model.prepare_inputs_for_generation

    def forgetful(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        inputs = original(input_ids[:, -1:], *args, **kwargs)
        if input_ids.shape[1] == 89:
            inputs.pop(next(iter(cache_argument(None))))
        return inputs

    model.prepare_inputs_for_generation = forgetful
    patch_unsloth_attention(model, config=LOSSLESS)
    with pytest.raises(CacheBypassedError, match=r"drops the 3 tokens of the cache .* has only 1 newer tokens"):
        generate(model)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """This library's."""
    return [record.getMessage() for record in caplog.records if record.name == "unsloth_spectral"]


def unplugged(model: PreTrainedModel) -> None:
    """``model`` now gives its keys to a cache of its own."""
    forward = model.forward

    def elsewhere(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **{**kwargs, **cache_argument(DynamicCache(config=model.config))})

    model.forward = elsewhere


def test_the_message_says_what_bypassed_the_cache_and_what_to_do(model: PreTrainedModel) -> None:
    unplugged(model)
    patch_unsloth_attention(model, config=LOSSLESS)
    with pytest.raises(CacheBypassedError) as caught:
        generate(model)
    message = str(caught.value)
    assert message.startswith("LlamaForCausalLM: test_bypass.unplugged.<locals>.elsewhere took a step after 0 tokens")
    assert "pass the cache" in message
    assert "Unsloth 20" not in message
    assert "\n" not in message
    model.for_training = model.train  # as Unsloth's have
    with pytest.raises(CacheBypassedError, match=r"supported are Unsloth 2026\.10\.8.*install one of them"):
        generate(model)


def test_generating_in_training_mode_with_gradient_checkpointing(model: PreTrainedModel) -> None:
    checkpointing(model)
    dense = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, **cache_argument(dense))
    patch_unsloth_attention(model, config=LOSSLESS)
    if dense.get_seq_length():  # since 5.24 only what computes gradients passes the cache
        assert cache_of(generate(model)).get_seq_length() == 97
        return
    with pytest.raises(CacheBypassedError, match=r"gradient checkpointing, in training mode.*model.eval") as caught:
        generate(model)
    assert "install" not in str(caught.value)
    model.eval()
    assert cache_of(generate(model)).get_seq_length() == 97


def test_training_with_gradient_checkpointing_under_a_patch_is_as_without(model: PreTrainedModel) -> None:
    losses = []
    for is_patched in (False, True):
        if is_patched:
            patch_unsloth_attention(model, config=LOSSLESS)
        checkpointing(model)
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1]


def test_a_cache_of_ones_own_that_receives_nothing_is_said_once(
    model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    cache = SpectralCache(model, config=LOSSLESS)
    unplugged(model)
    with caplog.at_level(logging.WARNING, logger="unsloth_spectral"):
        generate(model, **cache_argument(cache))
        model(IDS, **cache_argument(cache))
    assert cache.get_seq_length() == 0
    (message,) = warnings_of(caplog)
    assert "elsewhere gave the spectral cache that it was called with no token" in message


def test_a_cache_of_ones_own_under_gradient_checkpointing_is_said_once(
    model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    cache = SpectralCache(model, config=LOSSLESS)
    checkpointing(model)
    with caplog.at_level(logging.WARNING, logger="unsloth_spectral"):
        for _ in range(2):
            model(IDS, **cache_argument(cache))
    (message,) = warnings_of(caplog)
    assert "gradient checkpointing" in message


def test_a_cache_that_receives_everything_is_not_warned_of(
    model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    cache = SpectralCache(model, config=LOSSLESS)
    with caplog.at_level(logging.WARNING, logger="unsloth_spectral"):
        generate(model, **cache_argument(cache))
        cache.crop(-3)
        generate(model, **cache_argument(cache))
        cache.reset()
        generate(model, **cache_argument(cache))
    assert warnings_of(caplog) == []


# Continuous batching


@pytest.mark.parametrize("how", ["patched", "scope", "own"])
def test_continuous_batching_is_refused_by_name(model: PreTrainedModel, how: str) -> None:
    if how == "scope":
        with spectral(model), pytest.raises(CacheBypassedError, match=r"generate_batch.*unpatch_unsloth_attention"):
            model.generate_batch([[3, 4, 5]])
        return
    if how == "patched":
        patch_unsloth_attention(model)
        with pytest.raises(CacheBypassedError, match=r"generate_batch.*unpatch_unsloth_attention"):
            generate(model, cache_implementation="paged")
    else:
        SpectralCache(model)
    with pytest.raises(CacheBypassedError, match=r"(generate_batch|init_cont).*unpatch_unsloth_attention\(model\)"):
        model.generate_batch([[3, 4, 5]])
    with pytest.raises(CacheBypassedError, match=r"init_continuous_batching.*unpatch_unsloth_attention"):
        model.init_continuous_batching()
    unpatch_unsloth_attention(model)
    assert model.init_continuous_batching() is not None


def test_continuous_batching_of_a_model_that_is_switched_only_to_generate(model: PreTrainedModel) -> None:
    model.for_training = model.train
    patch_unsloth_attention(model)
    with pytest.raises(CacheBypassedError, match=r"generate_batch.*unpatch_unsloth_attention"):
        model.generate_batch([[3, 4, 5]])


# A cache asked for by name


@pytest.mark.parametrize("way", ["argument", "configuration"])
def test_a_call_that_names_a_cache_gets_that_one(model: PreTrainedModel, way: str) -> None:
    named = {"cache_implementation": "static", "disable_compile": True}
    if way == "configuration":
        named = {"generation_config": GenerationConfig(**named, pad_token_id=0, max_new_tokens=12, do_sample=False)}
        named["generation_config"].return_dict_in_generate = True
    options = {"return_dict_in_generate": True, **(named if way == "configuration" else {"max_new_tokens": 12} | named)}
    expected = model.generate(IDS, do_sample=False, **options) if way == "argument" else model.generate(IDS, **options)
    patch_unsloth_attention(model, config=LOSSLESS)
    result = model.generate(IDS, do_sample=False, **options) if way == "argument" else model.generate(IDS, **options)
    assert isinstance(cache_of(result), StaticCache)
    assert torch.equal(result.sequences, expected.sequences)
    assert isinstance(cache_of(generate(model)), SpectralCache)


def test_a_cache_that_the_models_own_settings_name_is_overruled_and_said_once(
    model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    model.generation_config.cache_implementation = "static"
    patch_unsloth_attention(model, config=LOSSLESS)
    with caplog.at_level(logging.WARNING, logger="unsloth_spectral"):
        for _ in range(2):
            assert isinstance(cache_of(generate(model)), SpectralCache)
    (message,) = warnings_of(caplog)
    assert "its generation_config names cache_implementation='static'" in message


# torch.compile's wrapper


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager")], ids=["compiled"])
def test_a_compiled_model_is_looked_through(model: PreTrainedModel, wrap: Callable[[Any], Any], tmp_path: Any) -> None:
    expected, compiled = generate(model), wrap(model)
    patch_unsloth_attention(compiled, config=LOSSLESS)
    assert isinstance(cache_of(generate(compiled)), SpectralCache)
    unpatch_unsloth_attention(compiled)
    assert isinstance(cache_of(generate(model)), DynamicCache)
    with spectral(compiled, config=LOSSLESS) as patched:
        assert patched is compiled
        assert isinstance(cache_of(generate(compiled)), SpectralCache)
    cache = SpectralCache(compiled, config=LOSSLESS)
    with torch.no_grad():
        compiled(IDS, **cache_argument(cache))
    assert cache.get_seq_length() == 86
    cache.save(tmp_path / "cache.safetensors", IDS)
    loaded = SpectralCache.load(tmp_path / "cache.safetensors", compiled, IDS)
    assert loaded.get_seq_length() == 86
    store = PrefixStore(tmp_path)
    for _ in range(2):
        prefilled = store.prefill(compiled, IDS, config=LOSSLESS)
        assert prefilled.get_seq_length() == 85
    assert store.num_stored(compiled, IDS, config=LOSSLESS) == 85
    assert expected.sequences.shape == generate(compiled, **cache_argument(prefilled)).sequences.shape
    torch.compiler.reset()
