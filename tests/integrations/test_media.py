"""Prompts with images: a snapshot knows of which ones it is, though all images have the same tokens."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families.models import build
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from unsloth_spectral import PrefixStore, SpectralCache, SpectralConfig
from unsloth_spectral.errors import InvalidArgumentError, LoadError
from unsloth_spectral.fields import Fields
from unsloth_spectral.integrations.huggingface import header
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument
from unsloth_spectral.integrations.huggingface.media import media_difference, media_hashes, placeholders_in

IMAGE, START, END, VIDEO = 120, 121, 122, 123
CONFIG = SpectralConfig(block_size=128, residual_length=16, preset="small")


def vision_model() -> PreTrainedModel:
    built = build("Qwen2-VL, text")
    built.config.image_token_id, built.config.video_token_id = IMAGE, VIDEO
    built.config.vision_start_token_id, built.config.vision_end_token_id = START, END
    return built


@pytest.fixture
def model() -> PreTrainedModel:
    return vision_model()


def text(length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 115, (1, length), generator=torch.Generator().manual_seed(seed))


def inputs(*images: int, length: int = 100) -> dict[str, Any]:
    """What a processor returns for text and ``images``, each with a text behind it."""
    parts, pixels = [text(length)], []
    for seed in images:
        parts += [torch.tensor([[START, *[IMAGE] * 16, END]]), text(length, seed=99)]
        pixels.append(torch.randn(64, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(seed)))
    input_ids = torch.cat(parts, 1)
    processed = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    processed["mm_token_type_ids"] = (input_ids == IMAGE).long()
    if images:
        processed |= {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.tensor([[1, 8, 8]] * len(images))}
    return processed


def accepted(model: PreTrainedModel, model_inputs: dict[str, Any]) -> dict[str, Any]:
    """The entries of ``model_inputs`` that the installed transformers knows."""
    parameters = inspect.signature(type(model).forward).parameters
    return {name: value for name, value in model_inputs.items() if name in parameters}


def saved(model: PreTrainedModel, path: Path, model_inputs: dict[str, Any]) -> SpectralCache:
    cache = SpectralCache(model, config=CONFIG)
    with torch.no_grad():
        model(**accepted(model, model_inputs), **cache_argument(cache))
    cache.save(path, model_inputs["input_ids"], model_inputs)
    return cache


def test_a_prompt_that_begins_with_the_same_image_is_taken(model: PreTrainedModel, tmp_path: Path) -> None:
    path, model_inputs = tmp_path / "a.safetensors", inputs(1)
    cache = saved(model, path, model_inputs)
    assert cache.stats().layers[0].sealed_tokens == 128
    for prompt in (inputs(1), inputs(1, 2), inputs(1, 1, 3)):
        assert SpectralCache.load(path, model, prompt["input_ids"], prompt).get_seq_length() == 218
    question = torch.cat([model_inputs["input_ids"], text(8, seed=5)], 1)
    prompt = {**model_inputs, "input_ids": question, "mm_token_type_ids": (question == IMAGE).long()}
    prompt["attention_mask"] = torch.ones_like(question)
    fresh = vision_model()
    restored = SpectralCache.load(path, fresh, question, prompt)
    # The image itself is in the cache; its size tells which positions come behind it.
    more = {name: value for name, value in accepted(model, prompt).items() if name not in ("pixel_values", "input_ids")}
    options = {"max_new_tokens": 6, "do_sample": False}
    written = model.generate(question, **more, **cache_argument(cache), **options)
    assert torch.equal(fresh.generate(question, **more, **cache_argument(restored), **options), written)


def test_another_image_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    saved(model, path, inputs(1))
    for prompt in (inputs(2), inputs(2, 1)):
        with pytest.raises(LoadError, match="been made of the same model_inputs, but 'pixel_values' differs"):
            SpectralCache.load(path, model, prompt["input_ids"], prompt)
    prompt = inputs(1)
    for missing in (None, {}, {"attention_mask": prompt["attention_mask"]}, {"pixel_values": prompt["pixel_values"]}):
        with pytest.raises((LoadError, InvalidArgumentError), match="model_inputs") as caught:
            SpectralCache.load(path, model, prompt["input_ids"], missing)
        assert "\n" not in str(caught.value)
    with pytest.raises(LoadError, match=r"'pixel_values_videos' was not given to cache\.save"):
        SpectralCache.load(path, model, prompt["input_ids"], {**prompt, "pixel_values_videos": torch.ones(2)})
    with pytest.raises(LoadError, match="'pixel_values' differs"):
        SpectralCache.load(path, model, model_inputs=inputs(2))


def test_an_image_that_is_not_told_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    path, model_inputs = tmp_path / "a.safetensors", inputs(1)
    cache = saved(model, path, model_inputs)
    path.unlink()
    for missing in (None, {}, {"attention_mask": model_inputs["attention_mask"]}):
        with pytest.raises(InvalidArgumentError, match=r"model_inputs must be given, .* 16 .*\(image_token_id 120\)"):
            cache.save(path, model_inputs["input_ids"], missing)
    assert not path.exists()
    cache.save(path)
    assert SpectralCache.load(path, model).get_seq_length() == 218


def test_a_snapshot_from_before_there_were_hashes_of_images(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model_inputs = tmp_path / "a.safetensors", inputs(1)

    def made(*args: Any) -> Any:
        fields: Any = header.make_header(*args)
        del fields["tokens"]["model_inputs"]
        return fields

    monkeypatch.setattr("unsloth_spectral.integrations.huggingface.cache.make_header", made)
    saved(model, path, model_inputs)
    for prompt in (None, model_inputs):
        with pytest.raises(LoadError, match="hashes of what its 16 tokens that stand for other inputs"):
            SpectralCache.load(path, model, model_inputs["input_ids"], prompt)
    saved(model, path, inputs())
    assert SpectralCache.load(path, model, model_inputs["input_ids"], model_inputs).get_seq_length() == 100


def test_an_image_behind_a_saved_text_is_free(model: PreTrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    saved(model, path, inputs())
    for image in (1, 2):
        prompt = inputs(image)
        assert SpectralCache.load(path, model, prompt["input_ids"], prompt).get_seq_length() == 100
        assert SpectralCache.load(path, model, prompt["input_ids"]).get_seq_length() == 100


def test_a_store_takes_text_alone(model: PreTrainedModel, tmp_path: Path) -> None:
    store = PrefixStore(tmp_path)
    for call in (store.prefill, store.num_stored):
        with pytest.raises(InvalidArgumentError, match=r"input_ids must be text, .* \(image_token_id 120\)"):
            call(model, inputs(1)["input_ids"], config=CONFIG)
    assert store.prefill(model, inputs()["input_ids"], config=CONFIG).get_seq_length() == 99


@pytest.mark.parametrize("name", ["image_token_id", "image_token_index", "video_token_id", "audio_token_index"])
def test_placeholders_by_every_name(name: str, tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    plain = tiny_llama()
    assert placeholders_in(plain, text(50)) is None
    setattr(plain.config, name, 7)
    ids = torch.full((1, 9), 8)
    assert placeholders_in(plain, ids) is None
    ids[0, 2:5] = 7
    assert placeholders_in(plain, ids) == f"3 tokens that stand for other inputs ({name} 7)"


def test_placeholders_of_a_part_of_the_model(model: PreTrainedModel) -> None:
    model.config.image_token_id = 119
    model.config.vision_config.image_token_id = 77
    ids = torch.full((1, 9), 77)
    assert placeholders_in(model, ids) == "9 tokens that stand for other inputs (image_token_id 77)"


def compared(model: PreTrainedModel, first: dict[str, Any], second: dict[str, Any], batch: int = 1) -> str | None:
    return media_difference(Fields(media_hashes(model, first), None), batch, model, second)


def test_whatever_a_processor_returns_can_be_hashed(model: PreTrainedModel) -> None:
    pixels = torch.rand(3, 5)
    for value in (
        pixels,
        pixels.numpy(),
        [pixels, pixels[:2]],
        [pixels.numpy(), pixels.numpy()[:1]],
        0.5,
        [0.5, 1.0],
        [[1, 2], [3, 4]],
    ):
        assert compared(model, {"x": value}, {"x": value}) is None
        other = [*value, 0.25] if isinstance(value, list) and isinstance(value[0], float) else value
        assert compared(model, {"x": value}, {"x": other}) is None, "begins alike"
    for value in (
        pixels + 1,
        pixels[:2],
        pixels[:, :4],
        pixels.T,
        pixels.T.reshape(3, 5),
        [pixels[0], pixels[1], pixels[2] + 1],
    ):
        assert compared(model, {"x": pixels}, {"x": value}) == "'x' differs"
    assert compared(model, {"x": [0.5, 1.0]}, {"x": [0.5, 2.0]}) == "'x' differs"
    assert compared(model, {"x": pixels}, {}) == "'x' is missing"
    assert compared(model, {}, {"attention_mask": pixels, "input_ids": pixels, "pixel_values": None}) is None


def test_values_are_compared_as_the_model_takes_them(model: PreTrainedModel) -> None:
    pixels = torch.rand(3, 5)
    assert compared(model.bfloat16(), {"x": pixels}, {"x": pixels.bfloat16()}) is None
    assert compared(model, {"x": np.array([1, 2], dtype=np.int32)}, {"x": torch.tensor([1, 2])}) is None


def test_a_batch_is_compared_whole(model: PreTrainedModel) -> None:
    """Sequences' images follow each other, so those of longer prompts begin with others."""
    rows = torch.rand(4, 5)
    assert compared(model, {"x": rows[:2]}, {"x": rows}) is None
    assert compared(model, {"x": rows[:2]}, {"x": rows}, batch=2) == "'x' differs"
    assert compared(model, {"x": rows[:2]}, {"x": rows[:2]}, batch=2) is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.ones(2), "must be what the processor returned, names with tensors, got a Tensor"),
        ({"images": object()}, "must be tensors or numbers, got 'images' as object"),
        ({"text": "a cat"}, "must be tensors or numbers, got 'text' as str"),
        ({"images": ["a.png"]}, "must be tensors or numbers, got 'images' as list"),
    ],
)
def test_what_is_no_input_is_refused(model: PreTrainedModel, wrong: Any, message: str, tmp_path: Path) -> None:
    cache = saved(model, tmp_path / "a.safetensors", inputs(1))
    for call in (
        lambda: cache.save(tmp_path / "b.safetensors", inputs(1)["input_ids"], wrong),
        lambda: SpectralCache.load(tmp_path / "a.safetensors", model, inputs(1)["input_ids"], wrong),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            call()
