"""Tensors are freed with their last user: none waits for Python's cyclic collector or for a thread's notes.

On a GPU a tensor that waits takes memory from others.
"""

import contextlib
import copy
import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from unsloth_spectral import (
    PrefixStore,
    SpectralCache,
    SpectralConfig,
    patch_unsloth_attention,
    spectral,
    unpatch_unsloth_attention,
)
from unsloth_spectral.attention import cpu
from unsloth_spectral.codec.spectral import codec as spectral_codec
from unsloth_spectral.errors import LoadError, SpectralError
from unsloth_spectral.eval.methods.kivi import Kivi
from unsloth_spectral.eval.spectrum import measure_spectrum
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument
from unsloth_spectral.integrations.huggingface.roundtrip import RoundTripCache

Build = Callable[..., LlamaForCausalLM]
PROMPT = 300
CONFIGS = {
    "spectral": SpectralConfig(preset="balanced", block_size=128, residual_length=16),
    "rank": SpectralConfig(rank_keys=6, rank_values=12, block_size=128, residual_length=16),
}
every_codec = pytest.mark.parametrize("codec", CONFIGS)


@pytest.fixture(scope="module")
def model(tiny_llama: Build) -> LlamaForCausalLM:
    built = tiny_llama(initializer_range=0.15)
    built.generation_config.eos_token_id = None
    return built


def token_ids(batch: int = 1, count: int = PROMPT, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (batch, count), generator=torch.Generator().manual_seed(seed))


def new_tensors() -> Counter[str]:
    """Those made since ``gc.freeze()``, by shape and dtype."""
    kinds = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    return Counter(f"{list(tensor.shape)} {tensor.dtype}" for tensor in kinds)


@pytest.fixture(autouse=True, scope="module")
def _thaw() -> Iterator[None]:
    yield
    gc.unfreeze()


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Objects alive before the test are ignored, and no reference cycle is collected."""
    gc.collect()
    gc.freeze()  # until this file's tests are done: each collection is then of little
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def check_nothing_waits(action: Callable[[], Any]) -> None:
    action()  # makes what is kept for good: tables, and what is known of the model
    with without_collector():
        action()
        waiting = new_tensors()
        gc.collect()
        assert not waiting - new_tensors()


@torch.no_grad()
def filled(model: LlamaForCausalLM, codec: str, batch: int = 1) -> SpectralCache:
    cache = SpectralCache(model, config=CONFIGS[codec])
    for count in (PROMPT, 1, 1, 150):
        model(token_ids(batch, count), **cache_argument(cache))
    return cache


def test_what_waits_is_found() -> None:
    def leaves_a_cycle() -> None:
        holder: list[Any] = [torch.zeros(3)]
        holder.append(holder)

    with pytest.raises(AssertionError):
        check_nothing_waits(leaves_a_cycle)


@every_codec
@pytest.mark.parametrize("has_kernel", [True, False], ids=["kernel", "torch"])
def test_a_cache(model: LlamaForCausalLM, codec: str, has_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_kernel:
        monkeypatch.setattr(cpu, "obstacle", lambda *_: "none here")

    def live() -> None:
        cache = filled(model, codec, batch=2)
        for layer in cache.layers:
            layer.batch_repeat_interleave(2)
            layer.reorder_cache(torch.tensor([1, 0, 3, 2]))
            layer.batch_select_indices(torch.tensor([0, 2]))
        cache.crop(-100)
        with torch.no_grad():
            model(token_ids(2, 60), **cache_argument(cache))
        cache.stats()
        copy.deepcopy(cache)
        cache.reset()

    check_nothing_waits(live)


@every_codec
def test_saving_and_loading(model: LlamaForCausalLM, codec: str, tmp_path: Path) -> None:
    cache, path = filled(model, codec), tmp_path / "cache.safetensors"
    check_nothing_waits(lambda: cache.save(path, token_ids(count=500)))
    check_nothing_waits(lambda: SpectralCache.load(path, model))


def test_a_store(model: LlamaForCausalLM, tmp_path: Path) -> None:
    store, seeds = PrefixStore(tmp_path), iter(range(100))
    check_nothing_waits(lambda: store.prefill(model, token_ids(seed=next(seeds))))
    check_nothing_waits(lambda: store.prefill(model, token_ids(seed=0)))
    check_nothing_waits(lambda: store.num_stored(model, token_ids(seed=0)))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_generating(model: LlamaForCausalLM, options: dict[str, Any]) -> None:
    def generate() -> None:
        ids = token_ids()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, **options)

    def patched() -> None:
        patch_unsloth_attention(model, preset="balanced")
        generate()
        unpatch_unsloth_attention(model)

    def scoped() -> None:
        with spectral(model):
            generate()

    check_nothing_waits(patched)
    check_nothing_waits(scoped)


def test_measuring(model: LlamaForCausalLM) -> None:
    @torch.no_grad()
    def simulated() -> None:
        cache = RoundTripCache(model, Kivi(2))
        model(token_ids(), **cache_argument(cache))
        cache.stats()

    check_nothing_waits(simulated)
    check_nothing_waits(lambda: measure_spectrum(model, token_ids(), block_size=64))


class Keeping(logging.Handler):
    """Keeps what it is given, as handlers do that send records elsewhere later."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def test_errors(model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are overcome, and those that a user catches and drops; also under a handler that keeps records."""
    handler, logger = Keeping(), logging.getLogger("unsloth_spectral")
    store, broken = PrefixStore(tmp_path), tmp_path / "broken.safetensors"
    broken.write_bytes(b"no such file")

    def sealing_fails() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(spectral_codec.value_codec, "encode", lambda *_: torch.zeros(2) @ torch.zeros(3))
            cache = filled(model, "spectral")
            assert cache.stats().exact_blocks

    def loading_fails() -> None:
        with contextlib.suppress(LoadError):
            SpectralCache.load(broken, model)

    def stored_prefix_is_broken() -> None:
        store.prefill(model, token_ids())
        for path in tmp_path.glob("prefix-*"):
            path.write_bytes(b"no such file")

    def taken_for_a_tensor() -> None:
        cache = SpectralCache(model)
        handle, _ = cache.update(torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 5, 16), 0)
        with contextlib.suppress(SpectralError):
            handle @ torch.zeros(1)

    def interrupted() -> None:
        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        cache = filled(model, "spectral")
        hook = model.model.layers[1].register_forward_pre_hook(interrupt)
        with contextlib.suppress(KeyboardInterrupt), torch.no_grad():
            model(token_ids(count=3), **cache_argument(cache))
        hook.remove()
        assert cache.get_seq_length() == PROMPT + 152

    logger.addHandler(handler)
    try:
        for action in (sealing_fails, loading_fails, stored_prefix_is_broken, taken_for_a_tensor, interrupted):
            check_nothing_waits(action)
    finally:
        logger.removeHandler(handler)
    assert len(handler.records) >= 2
    for record in handler.records:
        assert not any(isinstance(argument, BaseException) for argument in record.args or ()), record


@pytest.mark.parametrize("kind", ["dense", "rank"])
def test_a_thread_keeps_no_tables_of_a_prompt(model: LlamaForCausalLM, kind: str) -> None:
    """Also where nobody asks for its positions: the rank codec, and a model that runs on without a spectral cache."""
    SpectralCache(model)  # switches the model
    with without_collector(), torch.no_grad():
        cache = DynamicCache(config=model.config) if kind == "dense" else SpectralCache(model, config=CONFIGS["rank"])
        model(token_ids(), **cache_argument(cache))
        del cache
        assert not [name for name in new_tensors() if f" {PROMPT}," in name]
