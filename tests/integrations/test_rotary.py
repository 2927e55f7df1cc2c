"""The rotation read off inside a forward pass un-rotates what the model caches, in every family of rotations."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families.models import HEAD_DIM, build
from transformers import DynamicCache, PreTrainedModel

from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument
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
    """Notes, inside every attention module's forward pass and before it attends, its rotation and its keys."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.rotations: dict[int, Rotation | None] = {}
        self.keys: dict[int, torch.Tensor] = {}
        hold(model)
        self._hooks = []
        for module in model.modules():
            index = getattr(module, "layer_idx", None)
            projection = getattr(module, "k_proj", getattr(module, "query_key_value", None))
            if isinstance(index, int) and projection is not None:
                self._hooks.append(projection.register_forward_hook(self._note(index, module)))

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, index: int, module: Any) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: torch.Tensor) -> None:
            self.keys[index], self.rotations[index] = output, rotation_of(module, HEAD_DIM)

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
        # Nothing to undo would pass, too.
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


@torch.no_grad()
def test_none_without_rotary_embeddings() -> None:
    model = build("GPT-2")
    found, hooks = [], []
    hold(model)
    for module in attention_of(model):
        hooks.append(module.register_forward_hook(lambda module, _, __: found.append(rotation_of(module, HEAD_DIM))))
    # A model with them, asked before in the same thread, leaves nothing behind.
    other = build("Llama")
    reader = Reader(other)
    other(ids(), use_cache=False)
    assert reader.rotations[0] is not None
    model(ids(), use_cache=False)
    assert found == [None, None]


@torch.no_grad()
def test_none_outside_a_forward_pass_of_the_module_and_without_hooks() -> None:
    model = build("Llama")
    first, second = attention_of(model)
    reader = Reader(model)
    model(ids(), use_cache=False)
    assert rotation_of(first, HEAD_DIM) is None, "the last pass was the second layer's"
    assert rotation_of(build("Llama").model.layers[1].self_attn, HEAD_DIM) is None
    reader.close()
    release(model, CACHES)
    assert not any(module._forward_pre_hooks for module in model.modules())
    found: list[Any] = []
    second.register_forward_pre_hook(lambda module, _: found.append(rotation_of(module, HEAD_DIM)))
    fresh = threading.Thread(target=lambda: model(ids(length=5), use_cache=False))
    fresh.start()
    fresh.join()
    assert found == [None]


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
