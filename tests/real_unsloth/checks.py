"""What has to hold for a model that Unsloth has loaded; each check leaves the model as it found it."""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families.lossless import LOSSLESS, padded_batch, sealed_tokens, token_ids, unrounded_encode
from real_unsloth.checkpoints import IMAGE_BEGIN, IMAGE_END, IMAGE_SIZE, IMAGE_TOKEN
from transformers import DynamicCache, LogitsProcessor, TextIteratorStreamer

from unsloth_spectral import SpectralCache, SpectralConfig, patch_unsloth_attention, unpatch_unsloth_attention
from unsloth_spectral.cache.layer import SpectralLayer
from unsloth_spectral.codec.config import PRESETS
from unsloth_spectral.codec.rank import block as block_module
from unsloth_spectral.errors import CacheBypassedError
from unsloth_spectral.integrations import fast_path
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument, cache_of

# Triton's kernels are interpreted row by row: no more of them than it takes to seal a prompt and what follows.
LENGTH, NEW = 60, 24
PROMPT = {"input_ids": token_ids(length=LENGTH), "attention_mask": torch.ones(1, LENGTH, dtype=torch.int64)}
RANKS = {"block_size": 16, "k_rank_keys": 8, "k_rank_values": 8}


def generate(model: Any, inputs: dict[str, Any] = PROMPT, **options: Any) -> Any:
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, **options}
    return model.generate(**on_device(inputs, model), **options)


def on_device(inputs: dict[str, Any], model: Any) -> dict[str, Any]:
    return {name: value.to(model.device, copy=True) for name, value in inputs.items()}


@contextmanager
def patched(model: Any, **options: Any) -> Iterator[None]:
    patch_unsloth_attention(model, **options)
    try:
        yield
    finally:
        unpatch_unsloth_attention(model)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def lossless(model: Any) -> Iterator[None]:
    """Full rank without rounding: nothing but the order of additions is left to differ."""
    with replaced(block_module.factors, "encode", unrounded_encode), patched(model, config=LOSSLESS):
        yield


@contextmanager
def counted() -> Iterator[dict[int, int]]:
    """Updates of every spectral layer, by the layer's identity."""
    updates: dict[int, int] = {}
    append = SpectralLayer.append

    def counting(self: SpectralLayer, *args: Any) -> None:
        updates[id(self)] = updates.get(id(self), 0) + 1
        append(self, *args)

    with replaced(SpectralLayer, "append", counting):
        yield updates


def state(model: Any) -> list[dict[str, Any]]:
    """Attributes of all modules, but for the scratch that Unsloth's decoding leaves and remakes."""
    scratch = ("paged_attention", "temp_", "RH_Q", "attention", "scalar", "half_head_dim", "t", "reciprocal_t")
    passing = ("_flag_for_generation", "_unsloth_resolved_layer_device")
    return [
        {name: value for name, value in vars(module).items() if not name.startswith((*scratch, *passing))}
        for module in model.modules()
    ]


def took_every_step(cache: Any, updates: dict[int, int]) -> None:
    assert isinstance(cache, SpectralCache), type(cache)
    assert min(sealed_tokens(cache)) > 0
    assert list(updates.values()) == [NEW] * len(sealed_tokens(cache)), updates


def same_tokens_and_every_update(model: Any, **options: Any) -> None:
    expected = generate(model, **options)
    assert not isinstance(cache_of(expected), SpectralCache)
    with lossless(model), counted() as updates:
        generated = generate(model, **options)
    took_every_step(cache_of(generated), updates)
    assert torch.equal(generated.sequences, expected.sequences), (generated.sequences, expected.sequences)


def same_tokens_as_the_dense_cache(model: Any) -> None:
    """Under the patch both: where what is unpatched needs a GPU."""
    with lossless(model), counted() as updates:
        expected = generate(model, **cache_argument(DynamicCache(config=model.config))).sequences
        assert not updates
        generated = generate(model)
    took_every_step(cache_of(generated), updates)
    assert torch.equal(generated.sequences, expected), (generated.sequences, expected)


def same_tokens_with_left_padding(model: Any) -> None:
    batch = {name: value[1:] for name, value in padded_batch(LENGTH).items()}
    expected = generate(model, batch).sequences
    with lossless(model):
        generated = generate(model, batch)
    assert isinstance(cache_of(generated), SpectralCache)
    assert torch.equal(generated.sequences, expected), (generated.sequences[:, LENGTH:], expected[:, LENGTH:])


class _Given(LogitsProcessor):
    """Whatever the model wants, it goes on with these tokens."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = iter(tokens)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, next(self._tokens)] = 0.0
        return forced


def as_near_as_the_dense_cache(model: Any, unpatched: bool = False) -> None:
    """In half precision two ways of adding part: what the type costs the dense cache, it may cost the spectral one.

    The dense cache is transformers', or if ``unpatched`` what Unsloth's own code uses.
    """
    tokens = token_ids(length=NEW, seed=1)[0].tolist()

    def logits(asked: Any, **options: Any) -> tuple[torch.Tensor, Any]:
        result = generate(asked, logits_processor=[_Given(tokens)], output_logits=True, **options)
        return torch.cat(result.logits).float(), cache_of(result)

    single = copy.deepcopy(model).float()
    single.config.dtype = torch.float32
    with patched(single):
        exact, _ = logits(single, **cache_argument(DynamicCache(config=single.config)))
    dense = logits(model)[0] if unpatched else None
    with lossless(model), counted() as updates:
        if dense is None:
            dense, _ = logits(model, **cache_argument(DynamicCache(config=model.config)))
        assert not updates
        spectral_logits, cache = logits(model)
    took_every_step(cache, updates)
    dtype_error, spectral_error = (dense - exact).abs(), (spectral_logits - exact).abs()
    assert dtype_error.max() > 0, "nothing was computed in half precision"
    assert spectral_error.mean() < 1.25 * dtype_error.mean(), (spectral_error.mean(), dtype_error.mean())
    assert spectral_error.max() < 2 * dtype_error.max(), (spectral_error.max(), dtype_error.max())


def bytes_fall_with_the_balanced_preset(model: Any) -> None:
    inputs = {"input_ids": token_ids(length=700), "attention_mask": torch.ones(1, 700, dtype=torch.int64)}
    rotations = []
    observe = SpectralLayer.observe

    def noting(self: SpectralLayer, queries: Any, rotation: Any, *rest: Any) -> None:
        rotations.append(rotation)
        observe(self, queries, rotation, *rest)

    with patched(model), replaced(SpectralLayer, "observe", noting):
        cache = cache_of(generate(model, inputs))
    stats = cache.stats()
    spectral = [layer for layer in stats.layers if layer.kind == "spectral"]
    assert cache.config == SpectralConfig()
    assert {layer.sealed_tokens for layer in spectral} == {512}
    # The last 64 to 191 tokens of the prompt and the new ones stay exact.
    assert sum(layer.dense_bytes for layer in spectral) > 1.75 * sum(layer.stored_bytes for layer in spectral), spectral
    assert stats.cold_bits_per_element < 1.05 * PRESETS["balanced"], spectral
    assert rotations, "no queries were seen"
    assert all(rotation is not None for rotation in rotations), "keys were compressed without their rotation"


def an_image_is_seen(model: Any) -> None:
    """Tokens of an image see each other both ways, while the prompt is read."""
    ids = PROMPT["input_ids"].clone()
    ids[0, 20:26] = torch.tensor([IMAGE_BEGIN, *[IMAGE_TOKEN] * 4, IMAGE_END])
    image = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    inputs = {**PROMPT, "input_ids": ids, "token_type_ids": (ids == IMAGE_TOKEN).long(), "pixel_values": image}
    expected = generate(model, inputs, output_logits=True)
    other = generate(model, {**inputs, "pixel_values": -image}, output_logits=True)
    with lossless(model):
        generated = generate(model, inputs, output_logits=True)
    assert isinstance(cache_of(generated), SpectralCache)
    assert torch.equal(generated.sequences, expected.sequences)
    difference = (generated.logits[0] - expected.logits[0]).abs().max()
    assert difference < 1e-4
    assert (other.logits[0] - expected.logits[0]).abs().max() > 100 * difference


def ranks_are_taken(model: Any) -> None:
    with patched(model, **RANKS):
        cache = cache_of(generate(model, max_new_tokens=2 * NEW))
    assert cache.config == SpectralConfig(rank_keys=8, rank_values=8, block_size=16)
    sealed = [layer for layer in cache.stats().layers if layer.kind == "spectral"]
    assert min(layer.sealed_tokens for layer in sealed) > 0
    assert {(layer.rank_keys, layer.rank_values) for layer in sealed} == {(8, 8)}


def streaming(model: Any, tokenizer: Any, on_thread: Callable[[], Any]) -> None:
    def stream() -> str:
        streamer = TextIteratorStreamer(tokenizer)

        def run() -> None:
            try:
                with on_thread():
                    generate(model, streamer=streamer)
            finally:
                streamer.end()

        thread = threading.Thread(target=run)
        thread.start()
        text = "".join(streamer)
        thread.join()
        return text

    expected = stream()
    with lossless(model), counted() as updates:
        generated = stream()
    assert len(generated.split()) > LENGTH
    assert generated == expected
    assert set(updates.values()) == {NEW}


def unpatching_restores(model: Any) -> None:
    expected, then = generate(model).sequences, state(model)
    patch_unsloth_attention(model, preset="small")
    generate(model)
    patch_unsloth_attention(model, **RANKS)
    generate(model)
    unpatch_unsloth_attention(model)
    result = generate(model)
    assert torch.equal(result.sequences, expected)
    assert not isinstance(cache_of(result), SpectralCache)
    now = state(model)
    differing = {
        f"{type(module).__name__}.{name}"
        for module, a, b in zip(model.modules(), then, now, strict=True)
        for name in {*a, *b}
        if not _same(a.get(name), b.get(name))
    }
    assert not differing, differing
    unpatch_unsloth_attention(model)


def _same(a: Any, b: Any) -> bool:
    try:
        return a is b or bool(a == b)
    except (RuntimeError, ValueError):  # tensors
        return False


def training_in_between(model: Any, classes: Any) -> None:
    """What ``for_training`` gets is Unsloth's own code, whatever was generated before; ``for_inference`` goes on."""
    ids = token_ids(2, 12).to(model.device)

    def loss() -> torch.Tensor:
        classes.for_training(model)
        model.zero_grad()
        value = model(input_ids=ids, labels=ids).loss
        classes.for_inference(model)
        return value.detach()

    expected, plain = loss(), generate(model).sequences
    flags, implementation = _fast_flags(model), _implementation(model)
    with lossless(model):
        for _ in range(2):
            assert torch.equal(generate(model).sequences, plain)
            assert _fast_flags(model) == flags
            assert _implementation(model) == implementation
            assert torch.equal(loss(), expected)


def _fast_flags(model: Any) -> list[Any]:
    return [
        (vars(module).get("_unsloth_fast_path"), module.forward.__func__.__module__)
        for module in model.modules()
        if hasattr(module.forward, "__func__")
    ]


def _implementation(model: Any) -> str:
    return model.config.get_text_config()._attn_implementation


def own_caches_and_turns(model: Any) -> None:
    plain = generate(model)
    with lossless(model):
        dense = DynamicCache(config=model.config)
        generated = generate(model, **cache_argument(dense))
        assert torch.equal(generated.sequences, plain.sequences)
        assert not isinstance(cache_of(generated), SpectralCache)
        first = generate(model)
        longer = torch.cat([first.sequences.cpu(), token_ids(length=10, seed=1).cpu()], dim=1)
        inputs = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
        expected = generate(model, inputs).sequences
        second = generate(model, inputs, **cache_argument(cache_of(first)))
    assert cache_of(second) is cache_of(first)
    assert cache_of(second).get_seq_length() == longer.shape[1] + NEW - 1
    assert torch.equal(second.sequences, expected)


def fast_generate_without_vllm(model: Any) -> None:
    if not hasattr(model, "fast_generate"):
        return
    then = model.fast_generate
    with lossless(model):
        expected = generate(model).sequences
        generated = model.fast_generate(
            **on_device(PROMPT, model), max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True
        )
        assert isinstance(cache_of(generated), SpectralCache)
        assert torch.equal(generated.sequences, expected)
    assert model.fast_generate is then


def a_bypass_is_an_error(model: Any) -> None:
    """With the fast path left on the cache would see nothing: what an unknown version of Unsloth might do."""
    past_the_cache = pytest.raises(CacheBypassedError, match=r"unsloth\.models\..* supported are")
    short = {name: value[:, :8] for name, value in PROMPT.items()}
    with replaced(fast_path, "leave", lambda _: None), patched(model, preset="balanced"), past_the_cache:
        generate(model, short)


def adapters(model: Any, add: Callable[[Any], Any]) -> Any:
    """Patched before and after an adapter is put on; returns the wrapped model."""
    patch_unsloth_attention(model, config=LOSSLESS)
    wrapped = add(model)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    with replaced(block_module.factors, "encode", unrounded_encode), counted() as updates:
        before = generate(wrapped)
    assert isinstance(cache_of(before), SpectralCache)
    assert set(updates.values()) == {NEW}
    unpatch_unsloth_attention(wrapped)
    plain = generate(wrapped)
    assert not isinstance(cache_of(plain), SpectralCache)
    assert torch.equal(before.sequences, plain.sequences)
    same_tokens_and_every_update(wrapped)
    return wrapped
