"""Llama 3.2 Vision: layers in between attend to an image, and hold its keys and values, or none."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families.lossless import LOSSLESS, padded_batch, sealed_tokens, token_ids
from families.models import build
from transformers import MllamaConfig, MllamaForCausalLM, MllamaForConditionalGeneration, PreTrainedModel

from unsloth_spectral import SpectralCache, SpectralConfig, patch_unsloth_attention, spectral, unpatch_unsloth_attention
from unsloth_spectral.errors import UnsupportedModelError
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument, cache_of
from unsloth_spectral.integrations.huggingface.layer_plans import CrossAttentionLayer

TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "cross_attention_layers": [1, 3],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_global_layers": 1,
    "attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "max_num_tiles": 1,
    "supported_aspect_ratios": [[1, 1]],
    "vision_output_dim": 64,
    "intermediate_layers_indices": [0],
}
LENGTH = 86
IMAGE_TOKENS = 5
IDS = token_ids(length=LENGTH) % 127
SEEN = pytest.mark.parametrize("with_image", [False, True])


@pytest.fixture
def model() -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = MllamaConfig(text_config=TEXT, vision_config=VISION, image_token_index=127)
        built = MllamaForConditionalGeneration(config).eval()
    for name, parameter in built.named_parameters():
        if name.endswith("_gate"):  # at zero no image would be seen
            torch.nn.init.constant_(parameter, 0.5)
    built.generation_config.eos_token_id = None
    return built


def image(rows: int = 1, length: int = LENGTH, seed: int = 1) -> dict[str, torch.Tensor]:
    pixels = torch.randn(rows, 1, 1, 3, 28, 28, generator=torch.Generator().manual_seed(seed))
    return {
        "pixel_values": pixels,
        "aspect_ratio_ids": torch.ones(rows, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(rows, 1, 1, dtype=torch.long),
        **image_mask(rows, length),
    }


def image_mask(rows: int, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """All ``length`` tokens of the text see the image."""
    return {"cross_attention_mask": torch.ones(rows, length, 1, 1, dtype=torch.long)}


def generate(model: Any, **options: Any) -> Any:
    call_options = {"max_new_tokens": 16, "do_sample": False, "return_dict_in_generate": True, **options}
    return model.generate(call_options.pop("input_ids", IDS), **call_options)


def held_images(cache: SpectralCache) -> list[int]:
    return [layer.get_seq_length() for layer in cache.layers if isinstance(layer, CrossAttentionLayer)]


@SEEN
@pytest.mark.parametrize("how", ["own", "patched", "scope"])
@pytest.mark.parametrize("ways", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}], ids=str)
@pytest.mark.usefixtures("unrounded")
def test_the_tokens_of_a_dense_cache(model: PreTrainedModel, with_image: bool, how: str, ways: dict[str, Any]) -> None:
    extra = {**ways, **(image() if with_image else {})}
    expected = generate(model, **extra).sequences
    if with_image:
        assert not torch.equal(generate(model, **ways).sequences, expected), "the image is not seen"
    cache_option = {}
    if how == "own":
        cache_option = cache_argument(SpectralCache(model, config=LOSSLESS))
    elif how == "patched":
        patch_unsloth_attention(model, config=LOSSLESS)
    if how == "scope":
        with spectral(model, config=LOSSLESS):
            result = generate(model, **extra)
    else:
        result = generate(model, **extra, **cache_option)
    assert torch.equal(result.sequences, expected)
    cache = cache_of(result)
    assert isinstance(cache, SpectralCache)
    assert cache.get_seq_length() == cache.stats().num_tokens == LENGTH + 15
    assert cache.get_mask_sizes(3, 0) == (LENGTH + 18, 0)
    assert [cache.get_seq_length(number) for number in (1, 3)] == [IMAGE_TOKENS * with_image] * 2
    assert min(sealed_tokens(cache)) > 0


@pytest.mark.usefixtures("unrounded")
def test_prompt_lookup_without_an_image(model: PreTrainedModel) -> None:
    expected = generate(model).sequences
    cache = SpectralCache(model, config=LOSSLESS)
    assert torch.equal(generate(model, prompt_lookup_num_tokens=3, **cache_argument(cache)).sequences, expected)


@pytest.mark.usefixtures("unrounded")
def test_a_padded_batch_with_images(model: PreTrainedModel) -> None:
    batch = {name: value % 127 for name, value in padded_batch(LENGTH).items()}
    expected = generate(model, **batch, **image(3)).sequences
    cache = SpectralCache(model, config=LOSSLESS)
    assert torch.equal(generate(model, **batch, **image(3), **cache_argument(cache)).sequences, expected)


@SEEN
@torch.no_grad()
def test_layers_of_an_image_are_counted_as_they_are(model: PreTrainedModel, with_image: bool) -> None:
    cache = SpectralCache(model, config=LOSSLESS)
    assert cache.stats().num_tokens == 0
    model(IDS[:, :3], **image(length=3) if with_image else {}, **cache_argument(cache))
    stats = cache.stats()
    assert stats.num_tokens == 3, "more tokens of the image than of the text"
    assert [layer.kind for layer in stats.layers] == ["spectral", "CrossAttentionLayer"] * 2
    # Keys and values of 2 heads of 16 dimensions in float32.
    assert [layer.stored_bytes for layer in stats.layers[1::2]] == [2 * IMAGE_TOKENS * 2 * 16 * 4 * with_image] * 2


@SEEN
@torch.no_grad()
def test_cropping_resetting_and_rearranging(model: PreTrainedModel, with_image: bool) -> None:
    cache, extra = SpectralCache(model, config=LOSSLESS), image() if with_image else {}
    first = model(IDS, **extra, **cache_argument(cache)).logits
    images = held_images(cache)
    assert images == [IMAGE_TOKENS * with_image] * 2
    cache.crop(-6)
    assert (cache.get_seq_length(), held_images(cache)) == (LENGTH - 6, images)
    twin = copy.deepcopy(cache)
    again = model(IDS[:, -6:], **image_mask(1), **cache_argument(cache)).logits
    assert (again - first[:, -6:]).abs().max() < 0.05
    assert twin.get_seq_length() == LENGTH - 6
    twin.batch_repeat_interleave(3)
    twin.reorder_cache(torch.tensor([2, 0, 1]))
    twin.batch_select_indices(torch.tensor([0, 2]))
    both = model(IDS[:, -6:].expand(2, -1), **image_mask(2), **cache_argument(twin)).logits
    assert (both - again).abs().max() < 1e-4
    cache.reset()
    assert (cache.get_seq_length(), held_images(cache)) == (0, [0, 0])
    assert torch.equal(model(IDS, **extra, **cache_argument(cache)).logits, first)
    # From an image to none.
    cache.reset()
    model(IDS, **cache_argument(cache))
    assert held_images(cache) == [0, 0]


@SEEN
@torch.no_grad()
def test_saving_and_loading(model: PreTrainedModel, with_image: bool, tmp_path: Path) -> None:
    cache, extra = SpectralCache(model, config=LOSSLESS), image() if with_image else {}
    model(IDS, **extra, **cache_argument(cache))
    cache.save(tmp_path / "cache.safetensors", IDS)
    loaded = SpectralCache.load(tmp_path / "cache.safetensors", model, IDS)
    assert held_images(loaded) == held_images(cache)
    step = {"input_ids": IDS[:, :1], **image_mask(1, LENGTH + 1)}
    expected = model(**step, **cache_argument(cache)).logits
    assert torch.equal(model(**step, **cache_argument(loaded)).logits, expected)


@SEEN
@pytest.mark.parametrize("place", ["0.mlp", "2.self_attn", "2.mlp"])
@pytest.mark.parametrize("is_first_pass", [False, True])
@torch.no_grad()
def test_a_pass_that_is_interrupted_is_taken_back(
    model: PreTrainedModel, with_image: bool, is_first_pass: bool, place: str
) -> None:
    """In layer 0 before the image came, in layer 2 when one of two layers has it, or all tokens are there but it."""
    cache, extra = SpectralCache(model, config=LOSSLESS), image() if with_image else {}
    inputs = {"input_ids": IDS, **extra}
    if not is_first_pass:
        model(IDS[:, :-6], **image(length=LENGTH - 6) if with_image else {}, **cache_argument(cache))
        inputs["input_ids"] = IDS[:, -6:]
        if with_image:  # a second one
            inputs |= {**image(seed=2), "cross_attention_mask": torch.ones(1, LENGTH, 2, 1)}
    whole = copy.deepcopy(cache)
    expected = model(**inputs, **cache_argument(whole)).logits
    num_before, images_before = cache.get_seq_length(), held_images(cache)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.get_submodule(f"model.language_model.layers.{place}").register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs, **cache_argument(cache))
    hook.remove()
    if place == "2.mlp" and not with_image:
        assert cache.get_seq_length() == whole.get_seq_length(), "only the answer is lost"
        return
    assert cache.get_seq_length() == num_before
    spectral_logits = model(**inputs, **cache_argument(cache)).logits
    assert (spectral_logits - expected).abs().max() < 0.05 * expected.abs().max()
    assert held_images(cache) == held_images(whole) == [count + IMAGE_TOKENS * with_image for count in images_before]
    assert cache.get_seq_length() == whole.get_seq_length()


def test_the_language_model_alone(model: PreTrainedModel) -> None:
    language = MllamaForCausalLM(model.config.text_config).eval()
    language.generation_config.eos_token_id = None
    expected = generate(language).sequences
    with spectral(language, config=SpectralConfig(16, 16, 16, 4, 200)):
        assert torch.equal(generate(language).sequences, expected)


def test_the_vision_part_is_left_alone(model: PreTrainedModel) -> None:
    before = model.config.vision_config._attn_implementation
    SpectralCache(model, config=LOSSLESS)
    assert model.config.vision_config._attn_implementation == before
    unpatch_unsloth_attention(model)
    assert model.config.text_config._attn_implementation == before


@pytest.mark.parametrize("name", ["n_recurrent_loops", "loop_num_passes"])
def test_a_model_that_runs_its_layers_in_loops_is_refused(name: str) -> None:
    # transformers adds a layer to the cache for each loop, while the model runs.
    model = build("Llama")
    setattr(model.config, name, 1)
    SpectralCache(model, config=LOSSLESS)
    setattr(model.config, name, 2)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM runs its layers several times for each token"):
        SpectralCache(model, config=LOSSLESS)
