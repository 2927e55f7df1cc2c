"""Decoding by compiled steps: one graph for all lengths, which answers as an uncompiled cache does."""

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families.lossless import padded_batch, token_ids
from families.models import build
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DynamicCache, PreTrainedModel

from unsloth_spectral import SpectralCache, SpectralConfig, patch_unsloth_attention, unpatch_unsloth_attention
from unsloth_spectral.attention import steps
from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument
from unsloth_spectral.native import library

pytestmark = pytest.mark.skipif(library.obstacle() is not None, reason="no compiled kernel here")

# Blocks that may have no error stay exact, and are moved out of the ring all the same.
EXACT = SpectralConfig(error_limit=1e-9, block_size=128, residual_length=16)
CODED = SpectralConfig(preset="balanced", block_size=128, residual_length=16)
PROMPT, ROOM = 150, 2048
FAMILIES = (
    *("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma 2", "Gemma 3", "Phi-3", "gpt-oss", "GPT-NeoX", "Mixtral"),
    *("LFM2", "Qwen3-Next", "Bamba"),
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Compiled:
    """Options of ``generate`` for compiled steps on any device, and the number of graphs made."""

    def __init__(self) -> None:
        self.num_graphs = 0

        def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
            self.num_graphs += 1
            made: Callable[..., Any] = lookup_backend("aot_eager")(graph, inputs)
            return made

        self.config = CompileConfig(fullgraph=True, dynamic=None, backend=backend, mode=None)
        self.config._compile_all_devices = True


def generate(model: PreTrainedModel, cache: Any, inputs: dict[str, Tensor], count: int, **options: Any) -> Tensor:
    found: Tensor = model.generate(
        **inputs, **cache_argument(cache), max_new_tokens=count, min_new_tokens=count, do_sample=False, **options
    )
    return found


def dense(model: PreTrainedModel, inputs: dict[str, Tensor], count: int, **options: Any) -> Tensor:
    return generate(model, DynamicCache(config=model.config), inputs, count, **options)


def check_answers(found: Tensor, model: PreTrainedModel, inputs: dict[str, Tensor], count: int) -> None:
    """``found`` is what the dense cache answers, up to a token that is as likely as another but for roundings."""
    expected = dense(model, inputs, count, return_dict_in_generate=True, output_logits=True)
    begin = inputs["input_ids"].shape[1]
    for row, (mine, theirs) in enumerate(zip(found, expected.sequences, strict=True)):
        different = (mine != theirs).nonzero()
        if len(different):
            place = int(different[0])
            logits = expected.logits[place - begin][row]
            assert float(logits[theirs[place]] - logits[mine[place]]) < 1e-4, f"row {row}, token {place}"


def prompts(is_padded: bool, length: int = PROMPT, seed: int = 0) -> dict[str, Tensor]:
    return padded_batch(length) if is_padded else {"input_ids": token_ids(1, length, seed)}


@pytest.mark.parametrize(
    ("family", "is_padded"),
    [
        *((family, False) for family in FAMILIES),
        *(
            pytest.param(family, True, marks=[] if family in ("Llama", "Gemma 3", "LFM2") else pytest.mark.slow)
            for family in FAMILIES
        ),
    ],
)
def test_a_compiled_step_serves_all_lengths_and_the_next_prompt(family: str, is_padded: bool) -> None:
    model, compiled = build(family), Compiled()
    cache = SpectralCache(model, config=EXACT, max_length=ROOM)
    assert cache.is_compileable
    inputs, num_new = prompts(is_padded), 1300 if family == "Llama" else 300
    found = generate(model, cache, inputs, num_new, compile_config=compiled.config)
    check_answers(found, model, inputs, num_new)
    assert max(layer.exact_blocks for layer in cache.stats().layers) >= 3  # the prompt's, and two of the answer's
    assert 1 <= compiled.num_graphs <= 2
    cache.reset()
    other = prompts(is_padded, 170, seed=7)
    check_answers(generate(model, cache, other, 40, compile_config=compiled.config), model, other, 40)
    assert compiled.num_graphs <= 2


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_long_answers_take_two_graphs_at_most(family: str) -> None:
    model, compiled, inputs = build(family), Compiled(), prompts(False)
    cache = SpectralCache(model, config=EXACT, max_length=ROOM)
    found = generate(model, cache, inputs, 1300, compile_config=compiled.config)
    check_answers(found, model, inputs, 1300)
    assert 1 <= compiled.num_graphs <= 2


@pytest.mark.parametrize("family", ["Llama", "Gemma 3"])
def test_the_default_compiler_gives_the_same_tokens(family: str) -> None:
    model, inputs = build(family), prompts(False)
    options = CompileConfig(fullgraph=True, mode="default")
    options._compile_all_devices = True
    cache = SpectralCache(model, config=EXACT, max_length=ROOM)
    check_answers(generate(model, cache, inputs, 200, compile_config=options), model, inputs, 200)


def logits(
    model: PreTrainedModel, run: Callable[..., Any], cache: SpectralCache, inputs: dict[str, Tensor], count: int
) -> Tensor:
    """What ``run``, which is ``model`` or a compiled form of it, answers to a prompt and to ``count`` tokens behind."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    rest, found = token_ids(len(ids), count, seed=5), []
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        first = model(input_ids=ids, attention_mask=mask, position_ids=positions, **cache_argument(cache))
        found.append(first.logits[:, -1])
        for place in range(count):
            cache.prepare_step()
            mask = torch.cat([mask, mask.new_ones(len(ids), 1)], 1)
            # As long as the cache may become: a mask that grew would be compiled for each length.
            shown = torch.nn.functional.pad(mask, (0, ROOM - mask.shape[1])) if run is not model else mask
            answer = run(
                input_ids=rest[:, place : place + 1].contiguous(),
                attention_mask=shown if len(ids) > 1 else None,
                position_ids=mask.sum(1, keepdim=True) - 1,
                **cache_argument(cache),
            )
            found.append(answer.logits[:, -1])
    return torch.stack(found)


@pytest.mark.parametrize("is_padded", [False, True], ids=["one prompt", "left padding"])
@pytest.mark.parametrize(
    ("family", "preset"),
    [
        *(("Llama", preset) for preset in ("quality", "balanced", "small", "tiny")),
        *(("Qwen3", "balanced"), ("GPT-NeoX", "balanced")),
    ],
)
def test_a_compiled_step_answers_as_an_uncompiled_one(family: str, is_padded: bool, preset: str) -> None:
    model, inputs = build(family), prompts(is_padded)
    config = SpectralConfig(preset=preset, block_size=128, residual_length=16)
    plain = logits(model, model, SpectralCache(model, config=config), inputs, 150)
    stepping = SpectralCache(model, config=config, max_length=ROOM)
    assert torch.equal(logits(model, model, stepping, inputs, 150), plain)
    # Other compilers change roundings, and the kernel rounds again to integers of 8 or 16 bits.
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    cache = SpectralCache(model, config=config, max_length=ROOM)
    torch.testing.assert_close(logits(model, compiled, cache, inputs, 150), plain, rtol=0, atol=1e-4)
    assert next(layer.sealed_tokens for layer in cache.stats().layers if layer.kind == "spectral") == 256


class Watch(TorchDispatchMode):
    """Notes what a step does: operators and sizes of what they make, and addresses that it was given."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple[int, ...]]] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in self.WAITS:
            self.waits.append(name)
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, Tensor):
                self.made.append((name, tuple(tensor.shape)))
        return found


@pytest.mark.parametrize("family", ["Llama", "Gemma 3", "LFM2"])
@pytest.mark.parametrize("is_padded", [False, True], ids=["one prompt", "left padding"])
def test_steps_are_alike_and_never_wait_for_the_device(family: str, is_padded: bool) -> None:
    """What a CUDA graph needs: the same operators on the same sizes, at the same addresses, and no copy to the host."""
    model, inputs = build(family), prompts(is_padded)
    seen: list[tuple[list[tuple[str, tuple[int, ...]]], list[int]]] = []
    waits: list[str] = []
    cache = SpectralCache(model, config=CODED, max_length=ROOM)

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with Watch() as watch:
                found = graph(*args)
            waits.extend(watch.waits)
            # What a step is given comes anew each time: tokens, their mask and their positions.
            numbers = [x for x in args if isinstance(x, Tensor) and not x.is_floating_point() and x.ndim == 2]
            given = [x for x in numbers if x.dtype == torch.int64 and x.shape[1] in (1, ROOM)]
            assert len(given) <= 3
            kept = [x.data_ptr() for x in args if isinstance(x, Tensor) and all(x is not y for y in given)]
            seen.append((watch.made, kept))
            return found

        return run

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    logits(model, compiled, cache, inputs, 150)
    assert not waits
    # In the first step a window may not be full.
    first = seen[2]
    assert all(step == first for step in seen[2:])
    assert first[0]


def test_the_operators_themselves_never_wait_for_the_device() -> None:
    model = build("Llama")
    cache = SpectralCache(model, config=CODED, max_length=ROOM)
    logits(model, model, cache, prompts(False), 3)
    step = cache.layers[0].step
    assert step is not None
    new, query = torch.randn(1, 2, 1, 16), torch.randn(1, 4, 1, 16)
    with Watch() as watch:
        steps._append(step.keys, step.values, step.counts, new, new)
        steps._attend(query, step.keys, step.values, step.counts, step.directory, None, None, 0.25, None)
    assert watch.made
    assert not watch.waits


def test_operators_are_what_their_fakes_say() -> None:
    model = build("Llama")
    cache = SpectralCache(model, config=CODED, max_length=ROOM)
    logits(model, model, cache, prompts(True), 3)
    step = cache.layers[0].step
    assert step is not None
    new, query = torch.randn(3, 2, 1, 16), torch.randn(3, 4, 1, 16)
    ring = (step.keys.clone(), step.values.clone(), step.counts.clone())
    mask = torch.ones(3, 1, 1, ROOM + 4, dtype=torch.bool)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.unsloth_spectral.append.default, (*ring, new, new), test_utils=tests)
    arguments = (query, *ring, step.directory, mask, None, 0.25, 30.0)
    torch.library.opcheck(torch.ops.unsloth_spectral.attend.default, arguments, test_utils=tests)


def test_a_cache_refuses_more_tokens_than_it_was_made_for_and_loses_none() -> None:
    model = build("Llama")
    cache = SpectralCache(model, config=EXACT, max_length=160)
    inputs = prompts(False)
    with pytest.raises(InvalidArgumentError, match=r"max_length=160 tokens, and these would be 161"):
        generate(model, cache, inputs, 20)
    assert cache.get_seq_length() == 160
    with torch.no_grad(), pytest.raises(InvalidArgumentError, match="max_length=160"):
        model(input_ids=token_ids(1, 3), **cache_argument(cache))
    assert {layer.spectral.num_tokens for layer in cache.layers} == {160}
    cache.reset()
    assert torch.equal(generate(model, cache, inputs, 8), dense(model, inputs, 8))
    with pytest.raises(InvalidArgumentError, match="max_length=160"):
        generate(model, SpectralCache(model, max_length=160), prompts(False, 161), 1)


def test_a_full_ring_is_refused_before_anything_is_lost() -> None:
    """In a loop that never calls ``prepare_step``."""
    model = build("Llama")
    cache = SpectralCache(model, config=EXACT, max_length=ROOM)
    logits(model, model, cache, prompts(False), 1)
    step = cache.layers[0].step
    assert step is not None
    new = torch.ones(1, 2, step.keys.shape[2], 16)
    used = int(step.counts[0])
    before = step.keys[:, :, :used].clone(), step.counts.clone()
    with pytest.raises((IndexError, RuntimeError)):
        steps.append(step.keys, step.values, step.counts, new, new)
    assert torch.equal(step.keys[:, :, :used], before[0])
    assert torch.equal(step.counts, before[1])
    assert cache.get_seq_length() == PROMPT + 1


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 4}, {"num_return_sequences": 2}])
def test_other_ways_to_generate(options: dict[str, Any]) -> None:
    model, inputs = build("Llama"), prompts(False)
    if "num_return_sequences" in options:
        options = {**options, "num_beams": 2}
    cache = SpectralCache(model, config=EXACT, max_length=ROOM)
    assert torch.equal(generate(model, cache, inputs, 150, **options), dense(model, inputs, 150, **options))


def test_a_second_turn_may_fill_the_cache() -> None:
    model, text = build("Llama"), prompts(False)
    cache = SpectralCache(model, config=EXACT, max_length=PROMPT + 60)
    for _ in range(3):
        text = {"input_ids": generate(model, cache, text, 20)}
    check_answers(text["input_ids"], model, prompts(False), 60)


def test_rows_change_places_without_another_graph() -> None:
    model, compiled = build("Llama"), Compiled()
    inputs, rows = prompts(True), torch.tensor([2, 0, 1])
    run = torch.compile(model, fullgraph=True, backend=compiled.config.backend)
    cache = SpectralCache(model, config=EXACT, max_length=ROOM)
    plain = SpectralCache(model, config=EXACT)
    for held, call in ((cache, run), (plain, model)):
        logits(model, call, held, inputs, 20)
        held.reorder_cache(rows)
    cache.prepare_step()
    given = {"input_ids": token_ids(3, 1), "position_ids": torch.full((3, 1), 200)}
    mask = torch.nn.functional.pad(inputs["attention_mask"][rows], (0, 21), value=1)
    shown = torch.nn.functional.pad(mask, (0, ROOM - mask.shape[1]))
    with torch.no_grad():
        found = run(**given, attention_mask=shown, **cache_argument(cache)).logits
        expected = model(**given, attention_mask=mask, **cache_argument(plain)).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert compiled.num_graphs == 1


def test_turns_crops_and_copies() -> None:
    model, compiled = build("Llama"), Compiled()
    cache, expected = SpectralCache(model, config=EXACT, max_length=ROOM), DynamicCache(config=model.config)
    text = prompts(False)["input_ids"]
    for seed in range(3):
        answers = [
            generate(model, held, {"input_ids": text}, 60, **options)
            for held, options in ((cache, {"compile_config": compiled.config}), (expected, {}))
        ]
        assert torch.equal(*answers)
        text = torch.cat([answers[0], token_ids(1, 20, seed)], 1)
        for held in (cache, expected):
            held.crop(-15)
        text = text[:, :-15]
        beside = generate(model, copy.deepcopy(cache), {"input_ids": text}, 40, compile_config=compiled.config)
        assert torch.equal(beside, generate(model, copy.deepcopy(expected), {"input_ids": text}, 40))
    assert compiled.num_graphs <= 2


@pytest.mark.parametrize("family", ["Llama", "Gemma 3"])
def test_a_stored_cache_goes_on_by_compiled_steps(family: str, tmp_path: Path) -> None:
    model, inputs, compiled = build(family), prompts(False), Compiled()
    cache = SpectralCache(model, config=CODED, max_length=ROOM)
    answer = generate(model, cache, inputs, 60)
    cache.save(tmp_path / "cache.safetensors")
    loaded = SpectralCache.load(tmp_path / "cache.safetensors", model, max_length=2 * ROOM)
    assert loaded.is_compileable
    assert loaded.max_length == 2 * ROOM
    assert SpectralCache.load(tmp_path / "cache.safetensors", model).max_length == ROOM
    with pytest.raises(InvalidArgumentError, match="max_length=100 tokens, and these would be 209"):
        SpectralCache.load(tmp_path / "cache.safetensors", model, max_length=100)
    text = {"input_ids": torch.cat([answer, token_ids(1, 5)], 1)}
    found = generate(model, loaded, text, 60, compile_config=compiled.config)
    assert torch.equal(found, generate(model, cache, text, 60))


def test_an_interrupted_step_is_taken_back() -> None:
    model, inputs = build("Llama"), prompts(False)
    cache = SpectralCache(model, config=EXACT, max_length=ROOM)
    generate(model, cache, inputs, 20)
    step = cache.layers[0].step
    assert step is not None
    new = torch.ones(1, 2, 1, 16)
    steps.append(step.keys, step.values, step.counts, new, new)  # the first layer alone
    assert cache.get_seq_length() == PROMPT + 19
    cache.prepare_step()
    assert {layer.spectral.num_tokens for layer in cache.layers} == {PROMPT + 19}


def test_room_is_counted_and_named() -> None:
    model = build("Gemma 3")
    cache = SpectralCache(model, config=EXACT, max_length=ROOM)
    generate(model, cache, prompts(False), 20)
    stats = cache.stats()
    for layer in stats.layers:
        assert 0 < layer.room_bytes < layer.stored_bytes if layer.kind == "spectral" else layer.room_bytes == 0
    ring = cache.layers[1].step
    assert ring is not None
    assert stats.layers[1].residual_bytes >= ring.keys.nbytes + ring.values.nbytes + ring.directory.nbytes
    assert stats.room_bytes == sum(layer.room_bytes for layer in stats.layers)
    cache.reset()
    empty = cache.stats().layers[1]
    assert empty.stored_bytes == empty.room_bytes >= ring.keys.nbytes + ring.values.nbytes


@pytest.mark.parametrize("is_additive", [False, True])
def test_a_mask_of_ones_own(is_additive: bool) -> None:
    """As long as the text, or shorter: what has no column is hidden."""
    model = build("Llama")
    seen = torch.ones(1, 1, 1, PROMPT + 1, dtype=torch.bool)
    seen[..., 40:60] = False
    additive = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    mask, found = additive if is_additive else seen, []
    for cache in (SpectralCache(model, config=EXACT, max_length=ROOM), DynamicCache(config=model.config)):
        with torch.no_grad():
            model(**prompts(False), **cache_argument(cache))
            found.append(model(input_ids=token_ids(1, 1), attention_mask=mask, **cache_argument(cache)).logits)
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)
    cache = SpectralCache(model, config=EXACT, max_length=ROOM)
    with torch.no_grad():
        model(**prompts(False), **cache_argument(cache))
        model(input_ids=token_ids(1, 1), attention_mask=mask[..., :20], **cache_argument(cache))


@pytest.mark.parametrize("asks", [True, False])
def test_a_patched_model_compiles_where_generate_compiles(asks: bool) -> None:
    model, inputs, compiled = build("Llama"), prompts(False), Compiled()
    expected = dense(model, inputs, 30)
    patch_unsloth_attention(model, config=EXACT)
    options = {"compile_config": compiled.config} if asks else {}
    found = model.generate(
        **inputs, max_new_tokens=30, min_new_tokens=30, do_sample=False, return_dict_in_generate=True, **options
    )
    unpatch_unsloth_attention(model)
    assert torch.equal(found.sequences, expected)
    cache = next(value for value in found.values() if isinstance(value, SpectralCache))
    assert cache.max_length == (PROMPT + 29 if asks else None)
    assert (compiled.num_graphs > 0) == asks


@pytest.mark.parametrize(
    ("family", "config", "reason"),
    [
        ("Llama", SpectralConfig(8, 8, 16), "the rank codec has no kernel"),
        ("DiffLlama", EXACT, "computes with its keys and values before attention"),
    ],
)
def test_a_cache_that_cannot_compile_says_so_and_grows(
    family: str, config: SpectralConfig, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(family)
    with caplog.at_level(logging.WARNING, logger="unsloth_spectral"):
        cache = SpectralCache(model, config=config, max_length=100)
    assert reason in caplog.text
    assert cache.max_length is None
    assert not cache.is_compileable
    generate(model, cache, prompts(False), 5)


@pytest.mark.parametrize("max_length", [0, -1, 2.5, True, "many"])
def test_a_length_that_is_none(max_length: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="max_length must be a number of tokens, 1 or more, got"):
        SpectralCache(build("Llama"), max_length=max_length)


def fed(model: PreTrainedModel, cache: Any, lengths: list[int], batch: int = 1) -> Iterator[Tensor]:
    """The last logits after each of the passes, of so many tokens of one text."""
    text, start = token_ids(batch, sum(lengths)), 0
    for length in lengths:
        ids = text[:, start : start + length]
        start += length
        if isinstance(cache, SpectralCache):
            cache.prepare_step(length)
        yield model(input_ids=ids, **cache_argument(cache)).logits[:, -1]


def check_alike(model: PreTrainedModel, config: SpectralConfig, lengths: list[int]) -> None:
    """A cache with steps answers and seals as one without."""
    stepping, plain = SpectralCache(model, config=config, max_length=ROOM), SpectralCache(model, config=config)
    with torch.no_grad():
        for found, expected in zip(fed(model, stepping, lengths), fed(model, plain, lengths), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    check_same_keys(stepping, plain)


def check_same_keys(mine: SpectralCache, theirs: SpectralCache) -> None:
    """All layers have sealed the same tokens in the same way."""
    for layer, other in zip(mine.layers, theirs.layers, strict=True):
        if hasattr(layer, "spectral"):
            assert layer.spectral.is_sealed == other.spectral.is_sealed
            torch.testing.assert_close(
                layer.spectral.reconstruct()[0], other.spectral.reconstruct()[0], rtol=0, atol=1e-4
            )


@pytest.mark.parametrize("family", ["Llama", "Gemma 3"])
def test_a_prompt_too_short_to_seal(family: str) -> None:
    model, compiled, inputs = build(family), Compiled(), prompts(False, 5)
    cache = SpectralCache(model, config=EXACT, max_length=ROOM)
    assert torch.equal(generate(model, cache, inputs, 40), dense(model, inputs, 40))
    cache.reset()
    found = generate(model, cache, inputs, 200, compile_config=compiled.config)
    check_answers(found, model, inputs, 200)
    assert 1 <= compiled.num_graphs <= 3  # and one more until a window is full


@pytest.mark.parametrize(
    ("family", "config", "lengths"),
    [
        # Tokens that come one by one wait for a whole block, even behind a prompt long enough for a smaller one.
        ("Llama", SpectralConfig(preset="balanced", block_size=512, residual_length=16), [140] + [1] * 30),
        # Of the steps before a long pass, the queries count as well.
        ("Llama", CODED, [150] + [1] * 60 + [30] + [1] * 80),
        # Of layers that share their keys, the first one's queries count.
        ("Gemma 4, shared keys", CODED, [150] + [1] * 130),
    ],
    ids=["long prompt", "turns", "shared keys"],
)
def test_steps_seal_what_an_uncompiled_cache_seals(family: str, config: SpectralConfig, lengths: list[int]) -> None:
    check_alike(build(family), config, lengths)


@pytest.mark.parametrize("way", ["copy", "store"])
def test_a_copy_seals_what_the_original_seals(way: str, tmp_path: Path) -> None:
    """It has the queries of the steps before, and notes those of the steps behind."""
    model, lengths = build("Llama"), [150] + [1] * 140
    cache, plain = SpectralCache(model, config=CODED, max_length=ROOM), SpectralCache(model, config=CODED)
    text = token_ids(1, sum(lengths))
    with torch.no_grad():
        for _ in fed(model, plain, lengths):
            pass
        model(input_ids=text[:, :150], **cache_argument(cache))
        for place in range(150, text.shape[1]):
            if place == 240:
                cache = copy.deepcopy(cache) if way == "copy" else stored(cache, model, tmp_path)
            cache.prepare_step()
            model(input_ids=text[:, place : place + 1], **cache_argument(cache))
    check_same_keys(cache, plain)


def stored(cache: SpectralCache, model: PreTrainedModel, folder: Path) -> SpectralCache:
    cache.save(folder / "cache.safetensors")
    return SpectralCache.load(folder / "cache.safetensors", model)


def test_rows_that_change_places_often_note_no_more_queries() -> None:
    model = build("Llama")
    config = SpectralConfig(preset="balanced", block_size=512, residual_length=16)
    noted = []
    for cache in (SpectralCache(model, config=config, max_length=ROOM), SpectralCache(model, config=config)):
        with torch.no_grad():
            for _ in fed(model, cache, [150] + [1] * 40, batch=2):
                cache.reorder_cache(torch.tensor([1, 0]))
        noted.append([layer.spectral._tiers.queries.nbytes for layer in cache.layers])
    assert noted[0] == noted[1]


def test_steps_under_grad_mode_keep_no_graph() -> None:
    model = build("Llama")
    cache = SpectralCache(model, config=CODED, max_length=ROOM)
    for _ in fed(model, cache, [150] + [1] * 5):
        pass
    step = cache.layers[0].step
    assert step is not None
    assert step.queries is not None
    assert not any(tensor.requires_grad for tensor in (step.keys, step.values, step.queries))
    copy.deepcopy(cache)


def test_steps_while_past_is_recorded() -> None:
    """Nothing is sealed before a crop, however many tokens there are."""
    model, found = build("Llama"), []
    for cache in (SpectralCache(model, config=EXACT, max_length=ROOM), SpectralCache(model, config=EXACT)):
        with torch.no_grad():
            answers = fed(model, cache, [150] + [1] * 200)
            first = next(answers)
            cache.activate_past_recording()
            found.append(torch.stack([first, *answers]))
    assert torch.equal(*found)
