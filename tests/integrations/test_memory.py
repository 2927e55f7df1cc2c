"""``stats()`` against the actual memory: every storage that a cache keeps alive, and the memory of the process.

Run as a script, this file is the process that is measured: ``test_memory.py FRAME layers|model``.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest
import torch

from unsloth_spectral.cache.layer import SpectralLayer
from unsloth_spectral.cache.stats import CacheStats
from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.codec.registry import make_codec
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument
from unsloth_spectral.rope import Rotation

Path: TypeAlias = tuple[str, ...]

MB = 10**6
HEAD_DIM = 64

# Transformers is imported where it is used: the process that does without starts in half the time.

# Tensors that a block counts already, or of a few bytes: those that the codec shares with its blocks, variances between
# two sealings, and the kernel's memo of a block.
NOT_COUNTED = ("_plan.vectors", "_plan.vector_scales", "_mean", "_largest", "budget.seen")
NOT_COUNTED_BYTES = 4096  # of a layer
# The kernel's tables, shared by all blocks of equal steps of positions; per rotary pair: cosines and sines of a tile's
# tokens as integers, their coefficients in up to 16 smooth functions, and the angles to the next token and tile.
TABLE_BYTES = (2 * 2 * 128 + 2 * 4 * 16 + 32) * HEAD_DIM // 2
# Counted by each holder: blocks in one basis that do not join share the basis.
COUNTED_BY_EACH = ("keys.vectors", "keys.vector_scales", "keys.mean", "values.largest")
# Counted once, by the first holder: all layers share the positions.
SHARED = ("rotation.unit", "rotation.step", "rotation.rows", "rotation.places.table", "_tiers.padding")

CONFIGS = {
    "spectral": {"preset": "balanced"},
    "rank": {"rank_keys": 8, "rank_values": 16},
}
kinds = pytest.mark.parametrize("kind", CONFIGS)
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def held(value: Any, path: Path = ()) -> Iterator[tuple[Path, torch.Tensor]]:
    """Every tensor in ``value`` by each path that leads to it, through attributes, slots and containers."""
    if isinstance(value, torch.Tensor):
        yield path, value
        return
    if isinstance(value, str | bytes | int | float | None | type | torch.dtype) or callable(value):
        return
    if isinstance(value, dict):
        parts = list(value.items())
    elif isinstance(value, list | tuple | set):
        parts = list(enumerate(value))
    else:
        slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        parts = [(name, getattr(value, name)) for name in [*getattr(value, "__dict__", ()), *slots]]
    for name, part in parts:
        yield from held(part, (*path, str(name)))


def ends_with(path: Path, endings: tuple[str, ...]) -> bool:
    return ".".join(name for name in path if not name.isdigit()).endswith(endings)


def check_bytes(cache: Any) -> None:
    """Every storage is counted, to the byte, by each of its holders; uncounted storages are negligible."""
    nbytes: dict[int, int] = {}
    holders: defaultdict[int, set[Path]] = defaultdict(set)
    steps = set()
    for path, tensor in held([layer.spectral for layer in cache.layers]):
        storage = tensor.untyped_storage()
        nbytes[storage.data_ptr()] = storage.nbytes()
        if "memo" not in path and not ends_with(path, NOT_COUNTED):
            holders[storage.data_ptr()].add(path)
        if ends_with(path, ("_tiers.cold.keys.rotation.step",)):
            steps.add(tuple(tensor.tolist()))
    times: dict[int, int] = {}
    for pointer, paths in holders.items():
        is_shared = all(ends_with(path, SHARED) for path in paths)
        is_one = len(paths) == 1 or not nbytes[pointer] or is_shared
        assert is_one or all(ends_with(path, COUNTED_BY_EACH) for path in paths), paths
        times[pointer] = 1 if is_shared else len(paths)
    stats, allocated = cache.stats(), sum(nbytes.values())
    assert stats.stored_bytes == sum(nbytes[pointer] * count for pointer, count in times.items())
    assert stats.stored_bytes == sum(layer.stored_bytes for layer in stats.layers)
    missed = sum(size for pointer, size in nbytes.items() if pointer not in holders)
    assert missed <= NOT_COUNTED_BYTES * len(cache.layers) + TABLE_BYTES * len(steps)
    # Counting twice errs on the side of more, and little.
    assert allocated - missed <= stats.stored_bytes <= 1.06 * allocated
    if cache.config.codec == "rank":
        assert stats.stored_bytes == allocated - missed


@kinds
@pytest.mark.parametrize("padding", [0, 40])
@torch.no_grad()
def test_every_storage_is_counted(kind: str, padding: int, tiny_llama: Callable[..., Any]) -> None:
    from unsloth_spectral import SpectralCache

    model = tiny_llama(num_hidden_layers=3, head_dim=HEAD_DIM)
    cache = SpectralCache(model, config=SpectralConfig(**CONFIGS[kind], block_size=128, residual_length=16))
    mask = torch.ones(2, 0, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    sealed = []

    def feed(*counts: int) -> None:
        nonlocal mask
        for count in counts:
            new = mask.new_ones(2, count)
            new[1, : padding * (mask.shape[1] == 0)] = 0
            mask = torch.cat([mask, new], -1)
            positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -count:]
            ids = torch.randint(3, 128, (2, count), generator=generator)
            model(ids, attention_mask=mask, position_ids=positions, **cache_argument(cache))
            check_bytes(cache)
        sealed.append(cache.stats().layers[0].sealed_tokens)

    feed(100, *[1] * 10)  # exact yet
    feed(290)
    feed(*[1] * 20, 90, *[1] * 50)
    feed(120)
    cache.crop(-200)
    mask = mask[:, :-200]
    check_bytes(cache)
    feed(*[1] * 10)
    for layer in cache.layers:
        layer.reorder_cache(torch.tensor([1, 0]))
        layer.batch_repeat_interleave(2)
        layer.batch_select_indices(torch.tensor([0, 3]))
    mask = mask.flip(0)
    check_bytes(cache)
    feed(100, *[1] * 50)
    exact, prefilled, decoded, more, cropped, reordered = sealed
    assert exact == 0 < prefilled < decoded < more > cropped < reordered, sealed
    cache.reset()
    assert cache.stats().stored_bytes == 0


def test_a_tensor_nobody_counts_is_found(tiny_llama: Callable[..., Any]) -> None:
    from unsloth_spectral import SpectralCache

    cache = SpectralCache(tiny_llama(head_dim=HEAD_DIM))
    for layer in range(2):
        cache.update(*torch.randn(2, 1, 2, 700, HEAD_DIM), layer)
        cache.layers[layer].spectral.seal()
    check_bytes(cache)
    cache.layers[1].spectral.extra = {"dense": [torch.zeros(1)]}
    with pytest.raises(AssertionError):
        check_bytes(cache)


# In the process that is measured


def anonymous_bytes() -> int:
    """Resident memory that is no file's, once the allocator has given back what is free."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    with open("/proc/self/statm") as file:
        _, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def by_layers(config: SpectralConfig, num_layers: int, num_tokens: int) -> tuple[list[SpectralLayer], CacheStats]:
    """Layers sealed one after another, so that at most one is dense."""
    heads, pairs = 4, HEAD_DIM // 2
    angle = torch.arange(num_tokens)[:, None] * 10_000.0 ** (-torch.arange(pairs) / pairs)
    table = torch.polar(torch.ones_like(angle), angle)[None]
    rotation = Rotation.of(table, slice(0, pairs), slice(pairs, HEAD_DIM))
    codec = make_codec(config, num_layers)
    layers = [SpectralLayer(config, codec.layer(number)) for number in range(num_layers)]
    for layer in layers:
        query, keys, values = torch.randn(3, 1, heads, num_tokens, HEAD_DIM)
        # Cloned: a view would keep the query too, until the sealing.
        layer.append((keys * torch.logspace(0, -1.5, HEAD_DIM)).clone(), values.clone())
        layer.observe(query / 8, rotation)
        layer.seal()
    return layers, CacheStats.of([layer.stats() for layer in layers])


def by_model(config: SpectralConfig, num_layers: int, num_tokens: int) -> tuple[list[SpectralLayer], CacheStats]:
    """The prefill of a model whose weights are small beside its cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from unsloth_spectral import SpectralCache

    shape = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8}
    options = {"vocab_size": 128, "head_dim": HEAD_DIM, "num_hidden_layers": num_layers, **shape}
    model = LlamaForCausalLM(LlamaConfig(**options)).eval()
    cache = SpectralCache(model, config=config)
    with torch.inference_mode():
        model(torch.randint(0, 128, (1, num_tokens)), **cache_argument(cache), logits_to_keep=1)
    return [layer.spectral for layer in cache.layers], cache.stats()


def measure(kind: str, source: str) -> dict[str, int]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = SpectralConfig(**CONFIGS[kind])
    build, num_layers, num_tokens = {"layers": (by_layers, 25, 4164), "model": (by_model, 32, 1604)}[source]
    build(config, 1, num_tokens)  # loads the libraries' code and makes their tables
    before = anonymous_bytes()
    layers, stats = build(config, num_layers, num_tokens)
    after = anonymous_bytes()
    # The same meter on tensors of known size.
    dense = [layer.reconstruct() for layer in layers[:3]]
    control = anonymous_bytes() - after
    return {
        "growth": after - before,
        "stored": stats.stored_bytes,
        "dense": stats.dense_bytes,
        "control": control,
        "control_expected": sum(tensor.nbytes for pair in dense for tensor in pair),
    }


def check_process(kind: str, source: str) -> None:
    # One arena: what other threads' arenas hold free is not given back.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, kind, source]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["dense"] > 200 * MB
    assert abs(record["control"] - record["control_expected"]) < 0.02 * record["control_expected"] + MB, record
    # A tenth and 3 MB: pages begun, and tables of the process. Less than one dense layer, which is 6 to 9 MB.
    assert abs(record["growth"] - record["stored"]) < 0.1 * record["stored"] + 3 * MB, record
    assert record["growth"] < 0.25 * record["dense"], record


@linux
def test_the_process_grows_by_what_is_stored() -> None:
    check_process("spectral", "layers")


@linux
@pytest.mark.slow
@kinds
def test_the_process_grows_by_what_is_stored_under_a_model(kind: str) -> None:
    check_process(kind, "model")


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
