"""Half precision and autocast: as few bits as in float32, the codec's own arithmetic, keys and values of two types."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from unsloth_spectral import SpectralCache, SpectralConfig
from unsloth_spectral.attention import cpu, dispatch
from unsloth_spectral.attention.scores import ScoreOptions
from unsloth_spectral.codec.config import PRESETS
from unsloth_spectral.codec.spectral.block import SpectralBlock
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument, cache_of

Build = Callable[..., LlamaForCausalLM]
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
LENGTH, NEW = 700, 24


@pytest.fixture
def model(tiny_llama: Build) -> LlamaForCausalLM:
    built = tiny_llama(initializer_range=0.15)
    built.generation_config.eos_token_id = None
    return built


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Why the kernel did not serve, for each call over blocks."""
    obstacles: list[str | None] = []
    obstacle = cpu.obstacle

    def noting(*args: Any) -> str | None:
        obstacles.append(obstacle(*args))
        return obstacles[-1]

    monkeypatch.setattr(cpu, "obstacle", noting)
    return obstacles


def generate(model: LlamaForCausalLM, padding: int = 0, **options: Any) -> SpectralCache:
    ids = torch.randint(3, 128, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, **options}
    return cache_of(model.generate(ids, attention_mask=mask, **options))


@HALVES
@pytest.mark.parametrize("padding", [0, 150])
def test_a_model_in_half_precision_takes_no_more_bits(
    model: LlamaForCausalLM, dtype: torch.dtype, padding: int, paths: list[str | None]
) -> None:
    model = model.to(dtype)
    config = SpectralConfig(preset="balanced")
    cache = generate(model, padding, **cache_argument(SpectralCache(model, config=config)))
    stats = cache.stats()
    assert {layer.sealed_tokens for layer in stats.layers} == {512}
    assert stats.cold_bits_per_element < 1.05 * PRESETS["balanced"]
    rotations = [block.keys.rotation for layer in cache.layers for block in coded(layer)]
    assert rotations
    assert all(rotation is not None and rotation.step is not None for rotation in rotations)
    assert set(paths) == {cpu.library.obstacle()}


def coded(layer: Any) -> list[SpectralBlock]:
    return [block for block in layer.spectral.blocks if isinstance(block, SpectralBlock)]


@HALVES
@pytest.mark.parametrize("padding", [0, 150])
def test_under_autocast(
    model: LlamaForCausalLM, dtype: torch.dtype, padding: int, paths: list[str | None], tmp_path: Path
) -> None:
    """Values come in half precision, and keys in float32, as they were rotated by a float32 table."""
    with torch.autocast("cpu", dtype):
        cache = generate(model, padding, **cache_argument(SpectralCache(model, preset="balanced")))
    assert set(paths) == {cpu.library.obstacle()}
    stats = cache.stats()
    assert stats.cold_bits_per_element < 1.05 * PRESETS["balanced"]
    assert {layer.dense_bytes for layer in stats.layers} == {(LENGTH + NEW - 1) * 2 * 2 * 16 * (4 + 2)}
    for layer in cache.layers:
        exact = layer.spectral.blocks[-1]
        assert (exact.keys.dtype, exact.values.dtype) == (torch.float32, dtype)
    # It can be kept, and cut into its first tokens.
    cache.save(tmp_path / "cache.safetensors")
    loaded = SpectralCache.load(tmp_path / "cache.safetensors", model)
    for layer, other in zip(cache.layers, loaded.layers, strict=True):
        for a, b in zip(layer.spectral.reconstruct(), other.spectral.reconstruct(), strict=True):
            assert torch.equal(a, b)
            assert a.dtype == b.dtype
    loaded.crop(3 - loaded.get_seq_length())
    assert loaded.get_seq_length() == 3


@HALVES
def test_autocast_changes_no_code(model: LlamaForCausalLM, dtype: torch.dtype) -> None:
    """The same tokens, sealed and attended to within autocast and without."""
    cache = generate(model, **cache_argument(SpectralCache(model, preset="balanced")), max_new_tokens=1)
    keys, values = cache.layers[0].spectral.reconstruct()
    generator = torch.Generator().manual_seed(1)
    one_query, many = (torch.randn(2, 4, count, 16, generator=generator) for count in (1, 40))
    outputs = []
    for enabled in (False, True):
        cache.reset()
        layer = cache.layers[0].spectral
        with torch.autocast("cpu", dtype, enabled=enabled):
            layer.append(keys, values)
            layer.observe(keys.repeat_interleave(2, 1), None, 0.25)
            layer.seal()
            attended = [dispatch.attend(query, layer.blocks, None, ScoreOptions(0.25)) for query in (one_query, many)]
            outputs.append([*layer.reconstruct(), *attended])
        assert layer.is_sealed
    for actual, expected in zip(*outputs, strict=True):
        assert torch.equal(actual, expected)
        assert actual.dtype == torch.float32
