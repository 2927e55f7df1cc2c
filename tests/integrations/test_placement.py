"""A model spread over devices, and a compiled one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families.lossless import LOSSLESS, sealed_tokens, token_ids
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from unsloth_spectral import SpectralCache, SpectralConfig, patch_unsloth_attention
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument

NEW_TOKENS = 40


@pytest.fixture
def model(tiny_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    built = tiny_llama()
    built.generation_config.eos_token_id = None
    return built


def greedy(model: PreTrainedModel, cache: SpectralCache | None = None) -> torch.Tensor:
    generated = model.generate(token_ids(), **cache_argument(cache), max_new_tokens=NEW_TOKENS, do_sample=False)
    assert isinstance(generated, torch.Tensor)
    return generated


@pytest.mark.usefixtures("unrounded")
@pytest.mark.parametrize("preset", [None, "balanced"])
def test_layers_on_the_cpu_and_on_disk(preset: str | None, model: LlamaForCausalLM, tmp_path: Path) -> None:
    expected = greedy(model)
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    placed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map={**places, "model.layers.0": "cpu", "model.layers.1": "disk"},
        offload_folder=tmp_path / "offloaded",
        dtype=torch.float32,
    ).eval()
    placed.generation_config.eos_token_id = None
    assert next(placed.model.layers[1].parameters()).is_meta, "nothing was put on disk"
    cache = SpectralCache(placed, config=LOSSLESS if preset is None else SpectralConfig(preset=preset, block_size=128))
    if preset is None:
        assert torch.equal(greedy(placed, cache), expected)
        patch_unsloth_attention(placed, config=LOSSLESS)
        assert torch.equal(greedy(placed), expected)
    else:
        logits = placed(token_ids(length=300), **cache_argument(cache)).logits
        assert logits.isfinite().all()
    assert min(sealed_tokens(cache)) > 0


@pytest.mark.usefixtures("unrounded")
def test_a_compiled_forward_gives_the_same_tokens(model: LlamaForCausalLM) -> None:
    expected = greedy(model)
    # What is traced matters here, not the code made of it.
    model.forward = torch.compile(model.forward, backend="eager")  # type: ignore[method-assign]
    cache = SpectralCache(model, config=LOSSLESS)
    assert torch.equal(greedy(model, cache), expected)
    assert min(sealed_tokens(cache)) > 0
    torch.compiler.reset()


def test_a_compiled_forward_attends_to_codes(model: LlamaForCausalLM) -> None:
    config, ids = SpectralConfig(preset="balanced", block_size=128, residual_length=16), token_ids(length=300)
    plain, compiled = SpectralCache(model, config=config), SpectralCache(model, config=config)
    step = torch.compile(model, backend="eager")
    with torch.no_grad():
        for part in (ids, ids[:, :1], ids[:, 1:2]):
            expected = model(part, **cache_argument(plain)).logits
            spectral_logits = step(part, **cache_argument(compiled)).logits
            assert (spectral_logits - expected).abs().max() < 1e-2 * expected.abs().max()
    assert sealed_tokens(compiled) == sealed_tokens(plain)
    assert min(sealed_tokens(compiled)) > 0
    torch.compiler.reset()
