"""Patching, unpatching, and the models refused. Only the caches of generate may change."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertForMaskedLM,
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PreTrainedModel,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from unsloth_spectral import SpectralCache, SpectralConfig, patch_unsloth_attention, unpatch_unsloth_attention
from unsloth_spectral.errors import InvalidArgumentError, UnsupportedModelError
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument, cache_of
from unsloth_spectral.integrations.huggingface.switch import ATTENTION_NAME

OPTIONS = {"block_size": 16, "k_rank_keys": 16, "k_rank_values": 16}
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def model(tiny_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return llama(tiny_llama)


def llama(tiny_llama: Callable[..., LlamaForCausalLM], **options: Any) -> LlamaForCausalLM:
    built = tiny_llama(initializer_range=0.1, **options)
    built.generation_config.eos_token_id = None
    return built


def token_ids(batch: int = 1, length: int = 120, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def generate(model: PreTrainedModel, **options: Any) -> Any:
    """The result of a short greedy generation, the cache with it."""
    arguments = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, **options}
    return model.generate(arguments.pop("input_ids", token_ids()), **arguments)


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that patching could leave behind."""
    configs = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            configs[id(module.config)] = module.config
    for config in list(configs.values()):
        for name in config.sub_configs:
            configs[id(getattr(config, name))] = getattr(config, name)
    return {
        "attributes": [dict(vars(module)) for module in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "configs": [config.to_dict() for config in configs.values()],
        "implementations": [config._attn_implementation for config in configs.values()],
        "generation": model.generation_config.to_dict() if hasattr(model, "generation_config") else None,
        "weights": {name: (id(tensor), tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()},
    }


def test_generate_gets_a_fresh_spectral_cache_each_time(model: LlamaForCausalLM) -> None:
    plain = generate(model)
    assert patch_unsloth_attention(model, **OPTIONS) is None
    first, second = generate(model), generate(model)
    for result in (first, second):
        assert isinstance(cache_of(result), SpectralCache)
        assert cache_of(result).get_seq_length() == 127
        assert [layer.sealed_tokens for layer in cache_of(result).stats().layers] == [48, 48]
    assert cache_of(first) is not cache_of(second)
    assert torch.equal(first.sequences, second.sequences)
    assert isinstance(cache_of(plain), DynamicCache)


def test_the_options_arrive_and_the_last_patch_counts(model: LlamaForCausalLM) -> None:
    patch_unsloth_attention(model, block_size=32, k_rank_keys=3, k_rank_values=5)
    first = cache_of(generate(model))
    assert first.config == SpectralConfig(rank_keys=3, rank_values=5, block_size=32)
    layer = first.stats().layers[0]
    assert (layer.rank_keys, layer.rank_values, layer.sealed_tokens) == (3, 5, 32)
    patch_unsloth_attention(model, block_size=16, k_rank_keys=7, k_rank_values=2)
    second = cache_of(generate(model))
    assert second.config == SpectralConfig(rank_keys=7, rank_values=2, block_size=16)
    assert (second.stats().layers[0].rank_keys, first.config.rank_keys) == (7, 3)


def test_long_prompts_compress_and_short_ones_are_exact(model: LlamaForCausalLM) -> None:
    short = {"input_ids": token_ids(length=30), "output_logits": True}
    expected, long_expected = generate(model, **short), generate(model, output_logits=True)
    patch_unsloth_attention(model, **OPTIONS)
    generated = generate(model, **short)
    assert all(torch.equal(a, b) for a, b in zip(generated.logits, expected.logits, strict=True))
    long_found = generate(model, output_logits=True)
    # The prefill is attended to before it is sealed, the next token comes from what is left of it.
    assert torch.equal(long_found.logits[0], long_expected.logits[0])
    assert not torch.equal(long_found.logits[1], long_expected.logits[1])
    assert (long_found.logits[1] - long_expected.logits[1]).abs().max() < 0.1


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 50}, {"do_sample": True, "top_k": 5}],
)
def test_every_way_of_generating_uses_it(model: LlamaForCausalLM, options: dict[str, Any]) -> None:
    patch_unsloth_attention(model, **OPTIONS)
    result = generate(model, **options)
    assert isinstance(cache_of(result), SpectralCache)
    assert min(layer.sealed_tokens for layer in cache_of(result).stats().layers) >= 48
    assert result.sequences.shape == (1, 128)


def test_assisted_decoding_with_patched_models_on_both_sides(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model, assistant = llama(tiny_llama), llama(tiny_llama, seed=1)
    patch_unsloth_attention(model, **OPTIONS)
    patch_unsloth_attention(assistant, **OPTIONS)
    expected = generate(model).sequences
    assisted = generate(model, assistant_model=assistant)
    assert isinstance(cache_of(assisted), SpectralCache)
    assert assisted.sequences.shape == expected.shape
    assert min(layer.sealed_tokens for layer in cache_of(assisted).stats().layers) >= 48


def test_a_cache_of_the_callers_own_is_used(model: LlamaForCausalLM) -> None:
    plain = generate(model).sequences
    patch_unsloth_attention(model, **OPTIONS)
    dense = DynamicCache(config=model.config)
    assert torch.equal(generate(model, **cache_argument(dense)).sequences, plain)
    assert dense.get_seq_length() == 127
    own_cache = SpectralCache(model, config=SpectralConfig(4, 4, 32))
    assert cache_of(generate(model, **cache_argument(own_cache))) is own_cache


def test_no_cache_means_no_cache(model: LlamaForCausalLM) -> None:
    plain = generate(model, use_cache=False).sequences
    patch_unsloth_attention(model, **OPTIONS)
    result = generate(model, use_cache=False)
    assert torch.equal(result.sequences, plain)
    assert not isinstance(cache_of(result), SpectralCache)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_generate_works_after_the_attention_was_set_anew(model: LlamaForCausalLM, name: str) -> None:
    patch_unsloth_attention(model, **OPTIONS)
    expected = generate(model).sequences
    model.set_attn_implementation(name)
    result = generate(model)
    assert isinstance(cache_of(result), SpectralCache)
    assert torch.equal(result.sequences, expected)


def test_training_is_untouched(model: LlamaForCausalLM, tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    plain = llama(tiny_llama).train()
    patch_unsloth_attention(model, **OPTIONS)
    model.train()
    losses = [candidate(token_ids(2), labels=token_ids(2)).loss for candidate in (plain, model)]
    for loss in losses:
        loss.backward()
    assert torch.equal(losses[0], losses[1])
    for (name, expected), actual in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(expected.grad, actual.grad), name


# Unpatching


@pytest.mark.parametrize("before", ["sdpa", "eager"])
def test_unpatch_restores_everything(model: LlamaForCausalLM, before: str) -> None:
    model.set_attn_implementation(before)
    expected, then = generate(model).sequences, state(model)
    patch_unsloth_attention(model, **OPTIONS)
    assert model.config._attn_implementation == ATTENTION_NAME
    generate(model)
    SpectralCache(model, config=SpectralConfig(4, 4, 32))
    unpatch_unsloth_attention(model)
    assert state(model) == then
    assert "_prepare_cache_for_generation" not in vars(model)
    result = generate(model)
    assert torch.equal(result.sequences, expected)
    assert isinstance(cache_of(result), DynamicCache)


def test_patching_twice_and_unpatching_once_restores(model: LlamaForCausalLM) -> None:
    then = state(model)
    patch_unsloth_attention(model, **OPTIONS)
    patch_unsloth_attention(model, block_size=32, k_rank_keys=4, k_rank_values=4)
    unpatch_unsloth_attention(model)
    assert state(model) == then
    assert isinstance(cache_of(generate(model)), DynamicCache)
    unpatch_unsloth_attention(model)
    assert state(model) == then


def test_unpatching_takes_back_what_an_explicit_cache_switched(model: LlamaForCausalLM) -> None:
    then = state(model)
    SpectralCache(model, config=SpectralConfig(4, 4, 32))
    assert model.config._attn_implementation == ATTENTION_NAME
    unpatch_unsloth_attention(model)
    assert state(model) == then


def test_patching_again_after_unpatching(model: LlamaForCausalLM) -> None:
    for _ in range(2):
        patch_unsloth_attention(model, **OPTIONS)
        assert isinstance(cache_of(generate(model)), SpectralCache)
        unpatch_unsloth_attention(model)
        assert isinstance(cache_of(generate(model)), DynamicCache)


def test_a_wrapper_that_someone_else_had_put_on_the_model_is_called_and_restored(model: LlamaForCausalLM) -> None:
    calls = []

    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return type(model)._prepare_cache_for_generation(model, *args, **kwargs)

    model._prepare_cache_for_generation = theirs
    patch_unsloth_attention(model, **OPTIONS)
    generate(model, use_cache=False)
    assert len(calls) == 1
    unpatch_unsloth_attention(model)
    assert model._prepare_cache_for_generation is theirs


def test_other_models_of_the_class_are_left_alone(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model, other = llama(tiny_llama), llama(tiny_llama)
    then = state(other)
    patch_unsloth_attention(model, **OPTIONS)
    assert isinstance(cache_of(generate(other)), DynamicCache)
    assert state(other) == then
    assert "_prepare_cache_for_generation" not in LlamaForCausalLM.__dict__


# Copies, and what is saved


def test_a_copy_of_a_patched_model_stands_alone(model: LlamaForCausalLM) -> None:
    then = state(model)
    patch_unsloth_attention(model, **OPTIONS)
    twin = copy.deepcopy(model)
    unpatch_unsloth_attention(model)
    assert isinstance(cache_of(generate(twin)), SpectralCache)
    assert state(model) == then, "the copy switched the original on again"
    unpatch_unsloth_attention(twin)
    assert isinstance(cache_of(generate(twin)), DynamicCache)


def test_a_patched_model_can_be_pickled_after_unpatching(model: LlamaForCausalLM) -> None:
    patch_unsloth_attention(model, **OPTIONS)
    generate(model)
    unpatch_unsloth_attention(model)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(generate(twin).sequences, generate(model).sequences)


@pytest.mark.parametrize("is_patched", [True, False])
def test_a_pickled_model_stays_patched_or_switched(
    is_patched: bool, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lasting(patched_model: PreTrainedModel) -> Any:
        whole = state(patched_model)
        return [
            [set(names) for names in whole["attributes"]],
            whole["hooks"],
            whole["configs"],
            whole["implementations"],
        ]

    plain = lasting(model)
    if is_patched:
        patch_unsloth_attention(model, **OPTIONS)
    else:
        SpectralCache(model)
    generated, pickled = generate(model), pickle.dumps(model)
    # As in another process, which knows no attention function of this package.
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.delitem(interface._global_mapping, ATTENTION_NAME)
    twin = pickle.loads(pickled)
    actual = generate(twin)
    assert isinstance(cache_of(actual), SpectralCache if is_patched else DynamicCache)
    assert torch.equal(actual.sequences, generated.sequences)
    # It answers for itself: the first is as before, and the second can be given back.
    assert twin.generate is not model.generate
    unpatch_unsloth_attention(twin)
    assert lasting(twin) == plain
    assert isinstance(cache_of(generate(twin)), DynamicCache)
    assert isinstance(cache_of(generate(model)), SpectralCache if is_patched else DynamicCache)


def test_a_patched_generate_has_a_name(model: LlamaForCausalLM) -> None:
    """Unsloth asks for it."""
    patch_unsloth_attention(model, **OPTIONS)
    assert isinstance(model.generate.__name__, str)


def test_saving_a_patched_model_writes_nothing_of_the_patch(model: LlamaForCausalLM, tmp_path: Any) -> None:
    patch_unsloth_attention(model, **OPTIONS)
    model.save_pretrained(tmp_path)
    assert all("spectral" not in path.read_text() for path in tmp_path.glob("*.json"))
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert isinstance(cache_of(generate(loaded)), DynamicCache)


def test_no_model_is_kept_alive(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = llama(tiny_llama)
    patch_unsloth_attention(model, **OPTIONS)
    generate(model)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


# What is refused


def refused(candidate: Any, *words: str) -> None:
    """Both entrances refuse it by name, say what is supported, and leave it alone."""
    then = state(candidate) if isinstance(candidate, nn.Module) else None
    for attempt in (lambda: patch_unsloth_attention(candidate, **OPTIONS), lambda: SpectralCache(candidate)):
        with pytest.raises(UnsupportedModelError) as caught:
            attempt()
        message = str(caught.value)
        assert message.startswith(type(candidate).__name__)
        for word in (*words, "supported are decoder-only", "Llama"):
            assert word in message
    if then is not None:
        assert state(candidate) == then


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), "a model", None, 3], ids=["Linear", "str", "None", "int"])
def test_what_is_no_transformers_model_is_refused(thing: Any) -> None:
    refused(thing, "is not a transformers PreTrainedModel")
    if isinstance(thing, nn.Module):
        unpatch_unsloth_attention(thing)


def test_encoder_decoders_are_refused() -> None:
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    refused(T5ForConditionalGeneration(config), "encoder-decoder")


def test_encoders_and_bare_models_are_refused() -> None:
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    refused(BertForMaskedLM(config), "cannot generate")
    refused(LlamaModel(LlamaConfig(**SMALL)), "cannot generate")


def test_models_that_take_no_cache_are_refused() -> None:
    rwkv = RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32)
    refused(RwkvForCausalLM(rwkv), "takes no transformers Cache")
    gpt = OpenAIGPTConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=2)
    refused(OpenAIGPTLMHeadModel(gpt), "takes no transformers Cache")


def test_models_without_a_full_attention_layer_are_refused() -> None:
    model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=16))
    refused(model, "no full-attention layer", "sliding_attention")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"k_rank_keys": 17, "block_size": 32}, "rank_keys must be at most the model's head_dim, 16"),
        ({"k_rank_values": 17, "block_size": 32}, "rank_values must be at most the model's head_dim, 16"),
        ({"k_rank_keys": 0}, "rank_keys must be at least 1"),
        ({"k_rank_values": True}, "rank_values must be an integer"),
        ({"block_size": 8}, "block_size"),
        ({"block_size": 16.0}, "block_size must be an integer"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_switched(
    model: LlamaForCausalLM, options: dict[str, Any], word: str
) -> None:
    then = state(model)
    with pytest.raises(InvalidArgumentError, match=word):
        patch_unsloth_attention(model, **{**OPTIONS, **options})
    assert state(model) == then
    patch_unsloth_attention(model, **OPTIONS)
    with pytest.raises(InvalidArgumentError):
        patch_unsloth_attention(model, **{**OPTIONS, **options})
    assert cache_of(generate(model)).config.rank_keys == 16, "the first options stand"


def test_a_cache_with_too_large_a_rank_leaves_the_model_alone(model: LlamaForCausalLM) -> None:
    then = state(model)
    with pytest.raises(InvalidArgumentError, match="head_dim, 16; got 17"):
        SpectralCache(model, config=SpectralConfig(rank_keys=17))
    assert state(model) == then


# Models of several parts


def test_only_the_language_part_of_a_vision_model_is_switched() -> None:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SMALL, head_dim=16), image_token_id=127)
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    expected, then = generate(model).sequences, state(model)
    patch_unsloth_attention(model, **OPTIONS)
    assert model.config.text_config._attn_implementation == ATTENTION_NAME
    assert model.config.vision_config._attn_implementation == "sdpa"
    result = generate(model)
    assert isinstance(cache_of(result), SpectralCache)
    assert min(layer.sealed_tokens for layer in cache_of(result).stats().layers) == 48
    assert result.sequences.shape == expected.shape
    unpatch_unsloth_attention(model)
    assert state(model) == then
