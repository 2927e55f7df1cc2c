"""Scopes, patches, own caches and calls, in any order and in several threads."""

import asyncio
import copy
import pickle
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from test_patch import generate, llama, state, token_ids
from transformers import AttentionInterface, DynamicCache, LlamaForCausalLM, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from unsloth_spectral import (
    SpectralCache,
    SpectralConfig,
    patch_unsloth_attention,
    spectral,
    unpatch_unsloth_attention,
)
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument, cache_of
from unsloth_spectral.integrations.huggingface.switch import ATTENTION_NAME, is_enabled

Build = Callable[..., LlamaForCausalLM]
# Of full rank, so that without rounding all give the same tokens.
CONFIGS = [SpectralConfig(16, 16, block_size, 4, 8) for block_size in (16, 24, 32, 40)]
IDS = token_ids(length=70)


@pytest.fixture
def model(tiny_llama: Build) -> LlamaForCausalLM:
    return llama(tiny_llama)


def config_of(model: Any, **options: Any) -> SpectralConfig | None:
    """The options of the cache that ``generate`` makes here; None where it makes a dense one."""
    cache = cache_of(generate(model, max_new_tokens=2, **options))
    if isinstance(cache, SpectralCache):
        return cache.config
    assert isinstance(cache, DynamicCache)
    return None


class Worker:
    """A thread that runs actions one after another, each on request."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)

    def do(self, function: Callable[[], Any]) -> Any:
        return self.start(function).result(120)

    def start(self, function: Callable[[], Any]) -> "Future[Any]":
        return self._pool.submit(function)

    def close(self) -> None:
        self._pool.shutdown()


@pytest.fixture
def workers() -> Iterator[list[Worker]]:
    threads = [Worker() for _ in range(3)]
    yield threads
    for thread in threads:
        thread.close()


@dataclass(eq=False)
class OpenScope:
    context: AbstractContextManager[Any]
    config: SpectralConfig | None


@dataclass
class Expected:
    """The state that the rules predict, updated along with the model."""

    patch: SpectralConfig | None = None
    scopes: list[tuple[int, OpenScope]] = field(default_factory=list)
    caches: list[SpectralCache] = field(default_factory=list)

    def of(self, number: int) -> list[OpenScope]:
        return [scope for owner, scope in self.scopes if owner == number]

    def config(self, number: int) -> SpectralConfig | None:
        if self.of(number):
            return self.of(number)[-1].config
        others = [scope.config for _, scope in self.scopes if scope.config is not None]
        return others[-1] if others else self.patch

    def is_idle(self) -> bool:
        return self.patch is None and not self.scopes and not self.caches


def step(choices: random.Random, model: Any, expected: Expected, number: int, worker: Worker) -> None:
    """One random action of one thread."""
    scopes, config = expected.of(number), choices.choice(CONFIGS)
    deed = choices.choice(["enter", "exit", "patch", "unpatch", "cache", "use", "generate", "generate"])
    if deed == "enter":
        scope = OpenScope(spectral(model, config=config), config)
        worker.do(scope.context.__enter__)
        expected.scopes.append((number, scope))
    elif deed == "exit" and scopes:
        worker.do(lambda: scopes[-1].context.__exit__(None, None, None))
        expected.scopes.remove((number, scopes[-1]))
    elif deed == "patch":
        worker.do(lambda: patch_unsloth_attention(model, config=config))
        if scopes:
            scopes[-1].config = config
        else:
            expected.patch = config
    elif deed == "unpatch":
        worker.do(lambda: unpatch_unsloth_attention(model))
        if scopes:
            scopes[-1].config = None
        else:
            expected.patch = None
            expected.caches.clear()
    elif deed == "cache":
        cache = worker.do(lambda: SpectralCache(model, config=config))
        worker.do(lambda: use(model, cache))
        if not scopes:
            expected.caches.append(cache)
    elif deed == "use" and expected.caches:
        worker.do(lambda: use(model, choices.choice(expected.caches)))
    elif deed == "generate":
        assert worker.do(lambda: config_of(model)) == expected.config(number)


@torch.no_grad()
def use(model: Any, cache: SpectralCache) -> None:
    before = cache.get_seq_length()
    model(token_ids(length=5), **cache_argument(cache))
    assert cache.get_seq_length() == before + 5


@pytest.mark.parametrize(("attention", "seed"), [("sdpa", 0), ("sdpa", 1), ("sdpa", 2), ("eager", 3), ("eager", 4)])
def test_any_order_of_scopes_patches_and_caches_in_three_threads(
    model: LlamaForCausalLM, workers: list[Worker], attention: str, seed: int
) -> None:
    model.set_attn_implementation(attention)
    choices, expected, then = random.Random(seed), Expected(), state(model)
    for _ in range(60):
        number = choices.randrange(len(workers))
        step(choices, model, expected, number, workers[number])
        if expected.is_idle():
            assert state(model) == then
    while expected.scopes:
        number, scope = choices.choice([(number, expected.of(number)[-1]) for number, _ in expected.scopes])
        workers[number].do(lambda scope=scope: scope.context.__exit__(None, None, None))
        expected.scopes.remove((number, scope))
    assert config_of(model) == expected.patch
    unpatch_unsloth_attention(model)
    assert state(model) == then


@pytest.mark.usefixtures("unrounded")
def test_threads_that_run_at_once_get_their_own_options_and_right_answers(model: LlamaForCausalLM) -> None:
    expected = {new: generate(model, input_ids=IDS, max_new_tokens=new).sequences for new in (3, 9, 20)}
    then, barrier, errors = state(model), threading.Barrier(len(CONFIGS)), []

    def work(number: int) -> None:
        try:
            for turn, new in enumerate((3, 20, 9)):
                barrier.wait(60)
                cache_option = {}
                with spectral(model, config=CONFIGS[number]), ExitStack() as stack:
                    config = CONFIGS[number]
                    if (number + turn) % 3 == 1:
                        config = CONFIGS[number - 1]
                        stack.enter_context(spectral(model, config=config))
                    if (number + turn) % 3 == 2:
                        cache_option = cache_argument(SpectralCache(model, config=config))
                    result = generate(model, input_ids=IDS, max_new_tokens=new, **cache_option)
                    assert torch.equal(result.sequences, expected[new])
                    assert cache_of(result).config == config
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(CONFIGS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert state(model) == then


class Meanwhile(BaseStreamer):
    """Does something when the third token of a generation comes."""

    def __init__(self, deed: Callable[[], Any]) -> None:
        self.deed, self.count = deed, 0

    def put(self, _: Any) -> None:
        self.count += 1
        if self.count == 3:
            self.deed()

    def end(self) -> None:
        pass


@pytest.mark.parametrize("is_own", [False, True])
@pytest.mark.parametrize("is_unsloths", [False, True])
@pytest.mark.usefixtures("unrounded")
def test_a_generation_goes_on_while_another_thread_unpatches(
    model: LlamaForCausalLM, workers: list[Worker], is_unsloths: bool, is_own: bool
) -> None:
    if is_unsloths:
        model.for_training = model.train
    expected, then = generate(model, input_ids=IDS).sequences, state(model)
    patch_unsloth_attention(model, config=CONFIGS[0])
    seen = []

    def unpatched() -> None:
        workers[0].do(lambda: unpatch_unsloth_attention(model))
        seen.append((is_enabled(model), workers[0].do(lambda: config_of(model))))

    cache_option = cache_argument(SpectralCache(model, config=CONFIGS[0])) if is_own else {}
    result = generate(model, input_ids=IDS, streamer=Meanwhile(unpatched), **cache_option)
    assert seen == [(True, None)], "another call gets a dense cache, on the attention that this one still needs"
    assert torch.equal(result.sequences, expected)
    assert cache_of(result).get_seq_length() == 77
    assert state(model) == then


@pytest.mark.usefixtures("unrounded")
def test_a_generation_goes_on_while_the_scope_that_it_began_in_ends(
    model: LlamaForCausalLM, workers: list[Worker]
) -> None:
    expected, then = generate(model, input_ids=IDS).sequences, state(model)
    scope = spectral(model, config=CONFIGS[0])
    workers[0].do(scope.__enter__)
    leave = Meanwhile(lambda: workers[0].do(lambda: scope.__exit__(None, None, None)))
    result = generate(model, input_ids=IDS, streamer=leave)
    assert torch.equal(result.sequences, expected)
    assert cache_of(result).config == CONFIGS[0]
    assert state(model) == then


def test_a_thread_started_within_a_scope_follows_it(model: LlamaForCausalLM, workers: list[Worker]) -> None:
    patch_unsloth_attention(model, config=CONFIGS[0])
    with spectral(model, config=CONFIGS[1]):
        assert workers[0].do(lambda: config_of(model)) == CONFIGS[1]
        with spectral(model, config=CONFIGS[2]):
            assert workers[0].do(lambda: config_of(model)) == CONFIGS[2]
        unpatch_unsloth_attention(model)
        assert config_of(model) is None
    assert workers[0].do(lambda: config_of(model)) == CONFIGS[0]


def test_a_streamer_s_thread_within_a_scope(model: LlamaForCausalLM) -> None:
    class Tokenizer:
        def decode(self, ids: Any, **_: Any) -> str:
            return "".join(f"{int(token)} " for token in ids)

    streamer, results = TextIteratorStreamer(Tokenizer(), timeout=60), []  # type: ignore[arg-type]
    with spectral(model, config=CONFIGS[3]):
        thread = threading.Thread(target=lambda: results.append(generate(model, streamer=streamer)))
        thread.start()
        assert "".join(streamer)
        thread.join()
    assert cache_of(results[0]).config == CONFIGS[3]


def test_patching_within_a_scope_is_for_that_scope(model: LlamaForCausalLM, workers: list[Worker]) -> None:
    then = state(model)
    with spectral(model, config=CONFIGS[0]):
        patch_unsloth_attention(model, config=CONFIGS[1])
        assert config_of(model) == CONFIGS[1]
        workers[0].do(lambda: patch_unsloth_attention(model, config=CONFIGS[2]))
        assert config_of(model) == CONFIGS[1]
    assert config_of(model) == CONFIGS[2], "patched by a thread that is in no scope"
    unpatch_unsloth_attention(model)
    assert state(model) == then


def test_a_cache_from_outside_a_scope_outlives_it_and_one_from_within_does_not(
    model: LlamaForCausalLM, workers: list[Worker]
) -> None:
    then = state(model)
    with spectral(model):
        SpectralCache(model)
    assert state(model) == then
    with spectral(model):
        cache = workers[0].do(lambda: SpectralCache(model))
    use(model, cache)
    unpatch_unsloth_attention(model)
    assert state(model) == then


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_attention_that_was_set_anew_is_given_back_by_the_last_scope(
    model: LlamaForCausalLM, workers: list[Worker], order: tuple[int, int]
) -> None:
    SpectralCache(model)
    model.set_attn_implementation("eager")
    scopes = [spectral(model), spectral(model)]
    for worker, scope in zip(workers, scopes, strict=False):
        worker.do(scope.__enter__)
        assert model.config._attn_implementation == ATTENTION_NAME
    for number in order:
        assert model.config._attn_implementation == ATTENTION_NAME
        workers[number].do(lambda scope=scopes[number]: scope.__exit__(None, None, None))
    assert model.config._attn_implementation == "eager"
    with spectral(model):
        cache = workers[0].do(lambda: SpectralCache(model))
    use(model, cache)
    unpatch_unsloth_attention(model)
    assert model.config._attn_implementation == "sdpa"


# Contexts that are no threads


def test_tasks_have_scopes_of_their_own(model: LlamaForCausalLM) -> None:
    then = state(model)

    async def task(config: SpectralConfig) -> None:
        for _ in range(3):
            with spectral(model, config=config):
                await asyncio.sleep(0)
                assert config_of(model) == config
                assert await asyncio.to_thread(config_of, model) == config
                await asyncio.sleep(0)

    async def run() -> None:
        await asyncio.gather(*(task(config) for config in CONFIGS))

    asyncio.run(run())
    assert state(model) == then


def test_a_task_that_outlives_the_scope_it_was_started_in(model: LlamaForCausalLM) -> None:
    then = state(model)
    patch_unsloth_attention(model, config=CONFIGS[1])

    async def run() -> SpectralConfig | None:
        over = asyncio.Event()

        async def late() -> SpectralConfig | None:
            await over.wait()
            config = config_of(model)
            unpatch_unsloth_attention(model)
            return config

        with spectral(model, config=CONFIGS[0]):
            task = asyncio.create_task(late())
        over.set()
        return await task

    assert asyncio.run(run()) == CONFIGS[1]
    assert state(model) == then


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_generators_leave_their_scopes_in_any_order(model: LlamaForCausalLM, order: tuple[int, int]) -> None:
    def answers(config: SpectralConfig) -> Iterator[SpectralConfig | None]:
        with spectral(model, config=config):
            while True:
                yield config_of(model)

    then = state(model)
    generators = [answers(config) for config in CONFIGS[:2]]
    assert [next(generator) for generator in generators] == CONFIGS[:2]
    generators[order[0]].close()
    assert config_of(model) == CONFIGS[order[1]]
    generators[order[1]].close()
    assert state(model) == then
    assert config_of(model) is None


def test_a_generator_closed_by_another_thread(model: LlamaForCausalLM, workers: list[Worker]) -> None:
    def within() -> Iterator[None]:
        with spectral(model, config=CONFIGS[0]):
            yield

    then, generator = state(model), within()
    next(generator)
    workers[0].do(generator.close)
    assert state(model) == then
    patch_unsloth_attention(model, config=CONFIGS[2])
    assert config_of(model) == CONFIGS[2]
    unpatch_unsloth_attention(model)
    assert state(model) == then
    with spectral(model, config=CONFIGS[1]):
        assert config_of(model) == CONFIGS[1]
    assert state(model) == then


def test_a_function_decorated_with_a_scope(model: LlamaForCausalLM) -> None:
    then = state(model)

    @spectral(model, config=CONFIGS[0])
    def answer(depth: int) -> SpectralConfig | None:
        return answer(depth - 1) if depth else config_of(model)

    assert answer(2) == CONFIGS[0]
    assert state(model) == then


# Copies


def pickled(model: LlamaForCausalLM) -> Any:
    """A copy by way of a process that has never seen a spectral cache."""
    data = pickle.dumps(model)
    del AttentionInterface._global_mapping[ATTENTION_NAME]
    return pickle.loads(data)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("how", ["patch", "scope", "scope in a patch", "cache"])
def test_a_copy_stays_as_it_was_copied_until_it_is_unpatched(
    model: LlamaForCausalLM, how: str, duplicate: Callable[[Any], Any]
) -> None:
    then, expected = state(model), generate(model).sequences
    clean = copy.deepcopy(model)
    with ExitStack() as stack:
        if "patch" in how:
            patch_unsloth_attention(model, config=CONFIGS[0])
        if "scope" in how:
            stack.enter_context(spectral(model, config=CONFIGS[1]))
        if how == "cache":
            SpectralCache(model)
        twin = duplicate(model)
        stack.enter_context(spectral(twin, config=CONFIGS[2]))
        assert config_of(twin) == CONFIGS[2]
    unpatch_unsloth_attention(model)
    assert state(model) == then
    assert config_of(twin) == {"patch": CONFIGS[0], "cache": None}.get(how, CONFIGS[1])
    use(twin, SpectralCache(twin))
    unpatch_unsloth_attention(twin)
    for name in ("hooks", "configs", "implementations"):
        assert state(twin)[name] == state(clean)[name]
    assert [set(module) for module in state(twin)["attributes"]] == [
        set(module) for module in state(clean)["attributes"]
    ]
    assert torch.equal(generate(twin).sequences, expected)


def test_a_copy_made_while_it_generates(model: LlamaForCausalLM) -> None:
    model.for_training = None
    patch_unsloth_attention(model, config=CONFIGS[0])
    twins: list[Any] = []
    generate(model, streamer=Meanwhile(lambda: twins.append(copy.deepcopy(model))))
    assert not is_enabled(model)
    assert config_of(twins[0]) == CONFIGS[0]
    unpatch_unsloth_attention(twins[0])
    assert not is_enabled(twins[0])
    assert config_of(twins[0]) is None
