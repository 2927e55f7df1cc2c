"""The rotation read off inside a forward pass un-rotates what the model caches, in every family of rotations."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families.models import HEAD_DIM, build
from transformers import DynamicCache, PreTrainedModel

from unsloth_spectral import SpectralCache, SpectralConfig
from unsloth_spectral.codec.spectral.block import SpectralBlock
from unsloth_spectral.integrations.huggingface.attention_call import AttentionCall
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument
from unsloth_spectral.integrations.huggingface.layers import SpectralCacheLayer
from unsloth_spectral.integrations.huggingface.rotary import rotation_of
from unsloth_spectral.integrations.huggingface.switch import CACHES, hold, release
from unsloth_spectral.rope import Rotation, unrotate

# With a window as long as the texts all layers keep all keys.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Phi": {},  # rotates a part of each head
    "GPT-NeoX": {},  # fused, and a part
    "GLM": {},  # interleaved, and a part
    "Gemma 2": {"sliding_window": 1000},
    "StableLM": {},
    "Cohere": {},  # interleaved
    "Llama, linear RoPE": {},
    "Llama, dynamic RoPE": {"max_position_embeddings": 256},
    "Llama, yarn RoPE": {},
    "Llama, llama3 RoPE": {},
}
families = pytest.mark.parametrize("family", FAMILIES)


def attention_of(model: PreTrainedModel) -> list[Any]:
    return [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)][:2]


class Reader:
    """Reads, from every call of an attention module, its rotation and its keys before rotation."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.rotations: dict[int, Rotation | None] = {}
        self.keys: dict[int, torch.Tensor] = {}
        hold(model)
        self._hooks = []
        for module in model.modules():
            index = getattr(module, "layer_idx", None)
            projection = getattr(module, "k_proj", getattr(module, "query_key_value", None))
            if isinstance(index, int) and projection is not None:
                self._hooks.append(module.register_forward_pre_hook(self._read_call, with_kwargs=True))
                self._hooks.append(projection.register_forward_hook(self._read_keys(index)))

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _read_call(self, module: Any, _: Any, kwargs: dict[str, Any]) -> None:
        call = AttentionCall(module, kwargs.get("position_embeddings"))
        self.rotations[module.layer_idx] = rotation_of(call, HEAD_DIM)

    def _read_keys(self, index: int) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: torch.Tensor) -> None:
            self.keys[index] = output

        return hook


def projected(family: str, output: torch.Tensor) -> torch.Tensor:
    """``[B, H, n, D]`` keys before rotation, from what the projection gave."""
    if family == "GPT-NeoX":  # queries, keys and values of a head lie side by side
        return output.unflatten(-1, (-1, 3 * HEAD_DIM)).transpose(1, 2)[..., HEAD_DIM : 2 * HEAD_DIM]
    return output.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)


def check(family: str, reader: Reader, cache: DynamicCache, assert_close: Callable[..., None], count: int) -> None:
    """The newest ``count`` keys of every layer."""
    assert sorted(reader.rotations) == list(range(len(cache.layers)))
    for index, rotation in reader.rotations.items():
        assert rotation is not None, "no rotation was read"
        assert rotation.num_tokens == count
        keys = cache.layers[index].keys[..., -count:, :]
        plain = projected(family, reader.keys[index])
        assert_close(unrotate(keys, rotation.table()[:, None], rotation), plain, 1e-3)
        # Without a rotation the check would pass, too.
        assert not torch.allclose(keys, plain, atol=0.05)


def ids(batch: int = 1, length: int = 80) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(0))


@families
@torch.no_grad()
def test_a_prefill_and_a_step(family: str, assert_close: Callable[..., None]) -> None:
    model = build(family, **FAMILIES[family])
    reader, cache = Reader(model), DynamicCache(config=model.config)
    model(ids(), **cache_argument(cache))
    check(family, reader, cache, assert_close, 80)
    rotation = reader.rotations[0]
    assert rotation is not None
    assert rotation.step is not None, "even positions are kept as a few numbers"
    model(ids(length=1), **cache_argument(cache))
    check(family, reader, cache, assert_close, 1)
    model(ids(length=37), **cache_argument(cache))
    check(family, reader, cache, assert_close, 37)


@families
@torch.no_grad()
def test_left_padding(family: str, assert_close: Callable[..., None]) -> None:
    model, mask = build(family, **FAMILIES[family]), torch.ones(3, 80, dtype=torch.int64)
    mask[1, :30], mask[2, :71] = 0, 0
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    reader, cache = Reader(model), DynamicCache(config=model.config)
    model(ids(3), attention_mask=mask, position_ids=position_ids, **cache_argument(cache))
    check(family, reader, cache, assert_close, 80)
    rotation = reader.rotations[0]
    assert rotation is not None
    assert len(rotation.table()) == 3
    mask = torch.cat([mask, mask.new_ones(3, 1)], -1)
    model(ids(3, 1), attention_mask=mask, position_ids=position_ids[:, -1:] + 1, **cache_argument(cache))
    check(family, reader, cache, assert_close, 1)


@torch.no_grad()
def test_tables_that_change_with_length_are_read_anew(assert_close: Callable[..., None]) -> None:
    model = build("Llama, dynamic RoPE", max_position_embeddings=256)
    reader, cache = Reader(model), DynamicCache(config=model.config)
    model(ids(length=200), **cache_argument(cache))
    short = reader.rotations[0]
    model(ids(length=200), **cache_argument(cache))
    check("Llama", reader, cache, assert_close, 200)
    longer = reader.rotations[0]
    assert short is not None
    assert longer is not None
    assert short.step is not None
    assert longer.step is not None
    assert not torch.allclose(short.step, longer.step, rtol=1e-2)


@torch.no_grad()
def test_sizes_other_than_one_are_kept() -> None:
    model = build("Llama, yarn RoPE")
    reader = Reader(model)
    model(ids(), use_cache=False)
    rotation = reader.rotations[0]
    assert rotation is not None
    assert float(rotation.table().abs().mean()) > 1.05


@torch.no_grad()
def test_layers_share_one_rotation() -> None:
    reader = Reader(model := build("Llama"))
    model(ids(), use_cache=False)
    assert reader.rotations[0] is reader.rotations[1]
    assert reader.rotations[0] is not None


def spectral_cache(model: PreTrainedModel) -> SpectralCache:
    return SpectralCache(model, config=SpectralConfig(preset="balanced", block_size=128))


def rotations(cache: SpectralCache) -> list[list[Rotation | None]]:
    """Of the sealed blocks, per layer."""
    blocks = [[b for b in layer.spectral.blocks if isinstance(b, SpectralBlock)] for layer in cache.layers]
    assert all(blocks)
    return [[block.keys.rotation for block in layer] for layer in blocks]


@torch.no_grad()
def test_none_without_rotary_embeddings() -> None:
    model = build("GPT-2")
    cache = spectral_cache(model)
    # A model with them, run before in the same thread, leaves nothing behind.
    other = build("Llama")
    other(ids(), **cache_argument(spectral_cache(other)))
    model(ids(length=300), **cache_argument(cache))
    assert {rotation for layer in rotations(cache) for rotation in layer} == {None}
    assert rotation_of(AttentionCall(attention_of(model)[0], None), HEAD_DIM) is None
    assert rotation_of(None, HEAD_DIM) is None


@pytest.mark.parametrize("family", ["Llama", "GPT-NeoX", "Gemma 2", "Gemma 4, shared keys"])
@torch.no_grad()
def test_positions_reach_the_layer_of_their_cache_and_leave_with_the_pass(family: str) -> None:
    """GPT-NeoX passes its cache under another argument name, and Gemma 4's last layers read the keys of others."""
    model = build(family)
    cache, other = spectral_cache(model), spectral_cache(model)
    model(ids(length=300), **cache_argument(cache))
    # A pass without a cache and one with another leave this one alone.
    model(ids(length=7), use_cache=False)
    model(ids(length=7), **cache_argument(DynamicCache(config=model.config)))
    model(ids(length=7), **cache_argument(other))
    for layer in (*cache.layers, *other.layers):
        if isinstance(layer, SpectralCacheLayer):
            assert layer.call is None
            blocks = [block for block in layer.spectral.blocks if isinstance(block, SpectralBlock)]
            assert bool(blocks) == (layer in cache.layers)
            # Gemma 4's function takes queries or keys alone, and cannot be read.
            for block in blocks if "Gemma 4" not in family else ():
                assert block.keys.rotation is not None
                assert block.keys.rotation.is_even, "positions are known, so that they take a few numbers"
    release(model, CACHES)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_tables_made_elsewhere_are_read_but_their_positions_are_unknown() -> None:
    """Such as a copy on another device."""
    model = build("Llama")
    reader = Reader(model)
    for module in attention_of(model):
        module.register_forward_pre_hook(
            lambda _, args, kwargs: (
                args,
                kwargs | {"position_embeddings": tuple(table.clone() for table in kwargs["position_embeddings"])},
            ),
            with_kwargs=True,
            prepend=True,
        )
    positions = torch.tensor([[*range(40), *range(40)]])
    model(ids(), position_ids=positions, use_cache=False)
    first, second = reader.rotations[0], reader.rotations[1]
    assert first is not None
    assert second is not None
    assert first.step is None
    assert torch.equal(first.table(), second.table())


@torch.no_grad()
def test_a_compiled_model_knows_its_positions_too() -> None:
    model = build("Llama")
    cache = spectral_cache(model)
    torch.compile(model, backend="eager")(ids(length=300), **cache_argument(cache))
    layers = rotations(cache)
    assert all(rotation is not None and rotation.is_even for layer in layers for rotation in layer)
    assert layers[0][0].step is layers[1][0].step  # type: ignore[union-attr]
    torch.compiler.reset()


@torch.no_grad()
def test_two_threads_do_not_mix(assert_close: Callable[..., None]) -> None:
    models = [build("Llama"), build("Llama, linear RoPE", seed=1)]
    readers = [Reader(model) for model in models]
    barrier, errors = threading.Barrier(2), []
    for model in models:
        for module in attention_of(model):
            # Between the note and the reading each waits for the other.
            module.o_proj.register_forward_pre_hook(lambda _, __: (barrier.wait(20), None)[1])

    def work(model: PreTrainedModel, reader: Reader) -> None:
        try:
            with torch.no_grad():
                for length in (50, 61):
                    cache = DynamicCache(config=model.config)
                    model(ids(length=length), **cache_argument(cache))
                    check("Llama", reader, cache, assert_close, length)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=pair) for pair in zip(models, readers, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@torch.no_grad()
def test_two_threads_with_one_model_and_a_cache_each_do_not_mix() -> None:
    model = build("Llama")
    starts, caches = (0, 1000), [spectral_cache(model) for _ in range(2)]
    barrier, errors = threading.Barrier(2), []

    def wait(*_: Any) -> None:
        barrier.wait(20)

    # Between the tables and the call, and between the call and the cache, each waits for the other.
    for module in (model.model.rotary_emb, *(module.k_proj for module in attention_of(model))):
        module.register_forward_hook(wait)

    def work(start: int, cache: SpectralCache) -> None:
        try:
            with torch.no_grad():
                model(ids(length=300), position_ids=torch.arange(start, start + 300)[None], **cache_argument(cache))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=pair) for pair in zip(starts, caches, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for start, cache in zip(starts, caches, strict=True):
        for layer in rotations(cache):
            assert layer[0] is not None
            first = layer[0].places.numbers(layer[0].offset, layer[0].offset + 1)
            assert int(first) == start + 4, "behind the first four tokens, kept exact"
