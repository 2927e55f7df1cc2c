"""Bytes that positions take in a cache: negligible, whatever the positions are."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families.lossless import token_ids
from families.models import COMMON, build, make
from transformers import PreTrainedModel, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from unsloth_spectral import SpectralCache, SpectralConfig
from unsloth_spectral.codec.spectral.block import SpectralBlock
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument
from unsloth_spectral.rope import Rotation

HEAD_DIM, LAYERS, IMAGE, START, END = 128, 4, 120, 121, 122
ASKED = SpectralConfig(preset="balanced").target_bits


def qwen2_vl(seed: int = 0) -> Qwen2VLForConditionalGeneration:
    """Keys and values of the size of the 2B model's, in few layers."""
    text = {
        **COMMON,
        "hidden_size": 512,
        "head_dim": HEAD_DIM,
        "num_hidden_layers": LAYERS,
        "initializer_range": 0.03,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 512, "num_heads": 2}
    places = {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = Qwen2VLConfig(text_config=text, vision_config=vision, video_token_id=123, **places)
        return Qwen2VLForConditionalGeneration(config).eval()


def words(count: int, seed: int) -> torch.Tensor:
    return token_ids(1, count, seed) % 115 + 3


def with_an_image(before: int, behind: int) -> dict[str, torch.Tensor]:
    """A picture of 8 by 8 tokens between words."""
    picture = torch.tensor([[START] + [IMAGE] * 64 + [END]])
    ids = torch.cat([words(before, 1), picture, words(behind, 2)], 1)
    pixels = torch.randn(256, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(3))
    grid = torch.tensor([[1, 16, 16]])
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": (ids == IMAGE).int()}


@torch.no_grad()
def filled(model: PreTrainedModel, config: SpectralConfig, *passes: dict[str, torch.Tensor]) -> SpectralCache:
    cache = SpectralCache(model, config=config)
    for inputs in passes:
        model(**inputs, **cache_argument(cache))
    return cache


def rotations(cache: SpectralCache) -> list[list[Rotation]]:
    """Per layer, of its sealed blocks."""
    by_layer = []
    for layer in cache.layers:
        blocks = [block for block in layer.spectral.blocks if isinstance(block, SpectralBlock)]
        by_layer.append([block.keys.rotation for block in blocks if block.keys.rotation is not None])
        assert len(by_layer[-1]) == len(blocks) > 0
    return by_layer


def test_an_image_costs_no_bits() -> None:
    config = SpectralConfig(preset="balanced")
    cache = filled(qwen2_vl(), config, with_an_image(300, 736))
    assert cache.stats().cold_bits_per_element < 1.03 * ASKED
    layers = rotations(cache)
    table = layers[0][0].places.table
    assert table is not None
    assert table.shape[:2] == (1, 3)
    for layer in layers:
        (rotation,) = layer
        assert rotation.places.table is table
        assert rotation.step is layers[0][0].step


def test_an_image_costs_no_bits_in_what_follows_either() -> None:
    """Blocks that are sealed while decoding, and another image in a later turn."""
    config = SpectralConfig(preset="balanced", block_size=128)
    first = with_an_image(200, 100)
    model, cache = qwen2_vl(), None
    cache = filled(model, config, first)
    with torch.no_grad():
        for seed in range(130):
            model(input_ids=words(3, seed), **cache_argument(cache))
        place = int(cache.get_seq_length())
        grid = torch.stack([torch.zeros(64), *(torch.arange(64) // 8, torch.arange(64) % 8)]).long()
        position_ids = torch.cat([place + grid, place + 8 + torch.arange(150).expand(3, -1)], 1)[:, None]
        model(input_ids=words(214, 7), position_ids=position_ids, **cache_argument(cache))
    layers = rotations(cache)
    assert len(layers[0]) > 1
    # A layer may join other blocks than the first; the tables together are held to a few bytes below.
    assert all(rotation.step is not None for layer in layers for rotation in layer)
    assert any(rotation.is_even for rotation in layers[0]), "text behind an image stays even"
    assert len({id(rotation.step) for layer in layers for rotation in layer}) == 1
    by_content: dict[tuple[int, ...], torch.Tensor] = {}
    for table in (rotation.places.table for layer in layers for rotation in layer):
        if table is not None:
            assert by_content.setdefault(tuple(table.flatten().tolist()), table) is table, "equal positions are shared"
    # Blocks of 128 tokens take many bytes per token; positions are not the reason.
    tables = {id(rotation.places.table): rotation.places.table for layer in layers for rotation in layer}
    assert sum(table.nbytes for table in tables.values() if table is not None) < 0.03 * cache.stats().stored_bytes


def test_positions_of_three_axes_are_those_of_the_model(assert_close: Callable[..., None]) -> None:
    """In eight bits, which leave little to hide an image in a wrong place."""
    model, inputs = qwen2_vl(), with_an_image(300, 300)
    cache, dense = SpectralCache(model, config=SpectralConfig(bits_per_element=8)), None
    with torch.no_grad():
        model(**inputs, **cache_argument(cache))
        spectral_logits = model(input_ids=words(20, 5), **cache_argument(cache)).logits
        model = qwen2_vl()
        dense = model(**inputs).past_key_values if "past_key_values" in cache_argument(None) else model(**inputs).cache
        expected = model(input_ids=words(20, 5), **cache_argument(dense)).logits
    assert_close(spectral_logits, expected, 0.03)


def test_two_texts_side_by_side_cost_no_bits() -> None:
    """Positions begin anew, in each row elsewhere."""
    model = make("Llama", num_hidden_layers=2, hidden_size=256, head_dim=HEAD_DIM, initializer_range=0.05).eval()
    position_ids = torch.stack([torch.cat([torch.arange(cut), torch.arange(1100 - cut)]) for cut in (400, 700)])
    config = SpectralConfig(preset="balanced")
    inputs = {"input_ids": token_ids(2, 1100), "position_ids": position_ids}
    cache = filled(model, config, inputs)
    assert cache.stats().cold_bits_per_element < 1.03 * ASKED
    (first,), (second,) = rotations(cache)
    assert first.places.table is second.places.table
    angles = position_ids[..., 4:1028, None] * first.step
    expected = torch.polar(torch.ones_like(angles), angles)
    assert float((first.table() - expected).abs().max()) < 1e-3


@pytest.mark.parametrize("start", [0, 140_000, 200_000, 1_000_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_positions_cost_no_bits(start: int, dtype: torch.dtype) -> None:
    model = make(
        "Llama",
        num_hidden_layers=1,
        hidden_size=256,
        head_dim=HEAD_DIM,
        num_key_value_heads=4,
        initializer_range=0.05,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        max_position_embeddings=2_000_000,
    )
    model = model.to(dtype).eval()
    passes = [{"input_ids": token_ids(1, 708), "position_ids": torch.arange(start, start + 708)[None]}]
    for place in range(start + 708, start + 908, 10):
        passes.append({"input_ids": token_ids(1, 10), "position_ids": torch.arange(place, place + 10)[None]})
    cache = filled(model, SpectralConfig(preset="balanced", block_size=128), *passes)
    (layer,) = rotations(cache)
    assert all(rotation.is_even for rotation in layer)
    assert sum(rotation.num_tokens for rotation in layer) > 700
    assert len({id(tensor) for rotation in layer for tensor in rotation.tensors}) == 2, "one unit and one step for all"


def test_what_layers_share_they_share_after_all_that_a_cache_can_do(tmp_path: Path) -> None:
    model, config = qwen2_vl(), SpectralConfig(preset="balanced")
    cache = filled(model, config, with_an_image(300, 300))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.crop(-3)
    cache.save(tmp_path / "a.safetensors")
    for tested_cache in (cache, copy.deepcopy(cache), SpectralCache.load(tmp_path / "a.safetensors", model)):
        shared: set[Any] = {
            id(tensor) for layer in rotations(tested_cache) for rotation in layer for tensor in rotation.tensors
        }
        assert len(shared) == 3, "a unit, a step and a table of places for all layers"
        stats = tested_cache.stats()
        assert stats.stored_bytes == cache.stats().stored_bytes
        assert stats.layers[0].cold_bytes > stats.layers[1].cold_bytes


def test_models_whose_positions_are_unknown_share_their_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    from unsloth_spectral.integrations.huggingface import rotary

    monkeypatch.setattr(rotary, "_claims", lambda *_: iter(()))
    position_ids = torch.cat([torch.arange(400), torch.arange(300)])[None]
    model = build("Llama")
    cache = filled(model, SpectralConfig(), {"input_ids": token_ids(1, 700), "position_ids": position_ids})
    first, second = (layer[0] for layer in rotations(cache))
    assert first.step is None
    assert first.unit is second.unit
    assert cache.stats().layers[0].cold_bytes > cache.stats().layers[1].cold_bytes + first.unit.nbytes // 2
