"""torch's default dtype and device, which inference scripts set for the model they build, change nothing here."""

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BatchEncoding, LlamaForCausalLM

from unsloth_spectral import SpectralCache, SpectralConfig
from unsloth_spectral.attention import cpu
from unsloth_spectral.cache.layer import SpectralLayer
from unsloth_spectral.codec.chunk.codec import ChunkCodec
from unsloth_spectral.codec.chunk.layout import Planes
from unsloth_spectral.codec.spectral import kernel
from unsloth_spectral.eval.agreement import compare_logits
from unsloth_spectral.eval.chat import Conversation
from unsloth_spectral.eval.methods.kivi import Kivi
from unsloth_spectral.eval.methods.lloyd_max import LloydMax
from unsloth_spectral.eval.methods.registry import methods
from unsloth_spectral.eval.profile import measure_profile
from unsloth_spectral.eval.spectrum import measure_spectrum
from unsloth_spectral.eval.tasks.drift import Drift
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument
from unsloth_spectral.integrations.huggingface.roundtrip import RoundTripCache
from unsloth_spectral.integrations.models import LoadedModel
from unsloth_spectral.rsvd import batched_gram_svd, batched_randomized_svd, svd_error_bound

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
every_default = pytest.mark.parametrize("default", [*DTYPES, "meta"])
Build = Callable[..., LlamaForCausalLM]

BLOCK, RESIDUAL = 128, 16
CONFIGS = {
    "balanced": SpectralConfig(preset="balanced", block_size=BLOCK, residual_length=RESIDUAL),
    "an error limit": SpectralConfig(preset="balanced", error_limit=0.3, block_size=BLOCK, residual_length=RESIDUAL),
    "rank": SpectralConfig(rank_keys=6, rank_values=12, block_size=BLOCK, residual_length=RESIDUAL),
}


KEPT = [
    cached
    for cached in gc.get_objects()
    if type(cached) is functools._lru_cache_wrapper and cached.__module__.startswith("unsloth_spectral")
]


def forget_tables() -> None:
    """Empty the library's own caches, so that everything in them is made anew, under the default at hand."""
    assert len(KEPT) > 10
    for cached in KEPT:
        cached.cache_clear()


@contextlib.contextmanager
def torch_default(name: str) -> Iterator[None]:
    """With a default dtype, or a default device on which nothing can be computed."""
    forget_tables()
    try:
        if name == "meta":
            with torch.device("meta"):
                yield
        else:
            torch.set_default_dtype(DTYPES.get(name, torch.float32))
            yield
    finally:
        torch.set_default_dtype(torch.float32)
        forget_tables()


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def token_ids(batch: int, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(3, 128, (batch, count), generator=generator, dtype=torch.int64, device="cpu")


def plain(value: Any) -> Any:
    """Without the seconds that something took, and tensors as their bits."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), str(value.device), tuple(value.shape), value.contiguous().view(torch.uint8).tolist()
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items() if "seconds" not in name}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value


@torch.no_grad()
def history(model: LlamaForCausalLM, config: SpectralConfig, folder: Path) -> Any:
    """All that happens to a cache: two prompts, one padded, decoding, sealing, taking back, beams, a file."""
    cache = SpectralCache(model, config=config, use_profile=False)
    mask = torch.ones(2, 0, dtype=torch.int64, device="cpu")
    results: list[Any] = []

    def feed(*counts: int) -> None:
        nonlocal mask
        for count in counts:
            new = mask.new_ones(len(mask), count)
            new[1, : 30 * (mask.shape[1] == 0)] = 0
            mask = torch.cat([mask, new], -1)
            positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -count:]
            ids = token_ids(len(mask), count, seed=mask.shape[1])
            output = model(ids, attention_mask=mask, position_ids=positions, **cache_argument(cache))
            results.append(output.logits[:, -1])

    feed(300, *[1] * 3, 140, *[1] * 2)
    cache.crop(-40)
    mask = mask[:, :-40]
    feed(1, 1)
    for layer in cache.layers:
        layer.batch_repeat_interleave(2)
        layer.reorder_cache(torch.tensor([1, 0, 3, 2], dtype=torch.int64, device="cpu"))
        layer.batch_select_indices(torch.tensor([0, 2], dtype=torch.int64, device="cpu"))
    mask = mask[[1, 1]]
    feed(1, 1)
    results.append(cache.stats().to_dict())
    path = folder / f"{len(list(folder.iterdir()))}.safetensors"
    cache.save(path)
    cache = SpectralCache.load(path, model)
    feed(1, 1)
    results.append([tensor for layer in cache.layers for tensor in layer.spectral.reconstruct()])
    cache.reset()
    return plain(results)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("snapshots")


@pytest.fixture(scope="module")
def expected() -> dict[tuple[Any, ...], Any]:
    """Results under torch's own defaults."""
    return {}


@every_default
@pytest.mark.parametrize(
    ("codec", "dtype", "has_kernel"),
    [
        ("balanced", torch.float32, True),
        ("balanced", torch.float32, False),
        ("balanced", torch.bfloat16, True),
        ("an error limit", torch.float32, True),
        ("an error limit", torch.bfloat16, False),
        ("rank", torch.float32, False),
    ],
    ids=str,
)
def test_a_cache(
    codec: str,
    dtype: torch.dtype,
    has_kernel: bool,
    default: str,
    tiny_llama: Build,
    folder: Path,
    expected: dict[tuple[Any, ...], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A head_dim that is no power of two: the values' rotation is then drawn at random.
    model = tiny_llama(initializer_range=0.15, head_dim=24).to(dtype)
    if not has_kernel:
        monkeypatch.setattr(cpu, "obstacle", lambda *_: "none here")
        monkeypatch.setattr(kernel, "is_available", lambda: False)
    key = (codec, dtype, has_kernel)
    if key not in expected:
        with torch_default("float32"):
            expected[key] = history(model, CONFIGS[codec], folder)
    with torch_default(default):
        assert history(model, CONFIGS[codec], folder) == expected[key]


class Tokenizer:
    """One token a character."""

    bos_token, eos_token_id, chat_template = "^", 2, None

    def __call__(self, text: str, **_: Any) -> Any:
        return BatchEncoding({"input_ids": [3 + ord(character) % 120 for character in text]})

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(97 + token % 26) for token in ids)


DOCUMENT = "".join(chr(97 + token % 26) for token in token_ids(1, 800, seed=1)[0].tolist())


def profile(loaded: LoadedModel) -> Any:
    measured = measure_profile(loaded, document=DOCUMENT, starts=(0, 100), prefix=600, continuation=20)
    budget = SpectralCache(loaded.model, config=CONFIGS["balanced"])
    return measured, measured.to_fields(), budget.profile


def round_trips(loaded: LoadedModel) -> Any:
    results: list[Any] = []
    for codec in (Kivi(2), LloydMax(3)):
        cache = RoundTripCache(loaded.model, codec, residual_length=RESIDUAL)
        with torch.no_grad():
            output = loaded.model(token_ids(2, 200, seed=2), **cache_argument(cache))
        cache.layers[0].batch_select_indices(torch.tensor([1], dtype=torch.int64, device="cpu"))
        results += [output.logits, cache.layers[0].keys, cache.stats().to_dict()]
    return results


def linear_algebra(loaded: LoadedModel) -> Any:
    matrices = numbers(3, 200, 24)
    generator = torch.Generator("cpu").manual_seed(0)
    svd = batched_randomized_svd(matrices, k=6, generator=generator)
    return *svd, *batched_gram_svd(matrices, 6), svd_error_bound(svd.S, 3, 2, 1)


def chunks(loaded: LoadedModel) -> Any:
    results = []
    for theta in (None, 10_000.0):
        codec, chunk = ChunkCodec(3.0, Planes(16), theta), numbers(2, 2, 256, 32)
        record = codec.encode(chunk)
        results += [record, codec.decode(record, chunk.shape, chunk.dtype)]
    return results


def spectra(loaded: LoadedModel) -> Any:
    return measure_spectrum(loaded.model, token_ids(1, 100, seed=3), block_size=32).to_dict()


def fidelity(loaded: LoadedModel) -> Any:
    return compare_logits(numbers(9, 50), numbers(9, 50, seed=1), token_ids(1, 9, seed=4)[0] % 50).to_dict()


def drift(loaded: LoadedModel) -> Any:
    task = Drift(document=DOCUMENT, starts=(0,), context_length=300, num_tokens=4)
    names = ("dense", "spectral balanced")
    return [task.run(loaded, methods()[name], task.cases(loaded)[0]).metrics for name in names]


def chat(loaded: LoadedModel) -> Any:
    conversation = Conversation(loaded, DOCUMENT[:300], config=CONFIGS["balanced"], answer_length=4)
    return ["".join(conversation.ask(question)) for question in ("what?", "why?")]


def layer_alone(loaded: LoadedModel) -> Any:
    """A layer that got no queries, positions or mask."""
    layer = SpectralLayer(CONFIGS["balanced"])
    layer.append(*numbers(2, 1, 2, 300, 16))
    layer.seal()
    return layer.reconstruct(), layer.stats().sealed_tokens


@every_default
@pytest.mark.parametrize(
    "measure",
    [profile, round_trips, linear_algebra, chunks, spectra, fidelity, drift, chat, layer_alone],
    ids=lambda measure: measure.__name__,
)
def test_measuring(
    measure: Callable[[LoadedModel], Any], default: str, tiny_llama: Build, expected: dict[tuple[Any, ...], Any]
) -> None:
    loaded = LoadedModel(tiny_llama(initializer_range=0.15), Tokenizer(), "tiny")
    if (measure,) not in expected:
        with torch_default("float32"):
            expected[measure,] = plain(measure(loaded))
    with torch_default(default):
        assert plain(measure(loaded)) == expected[measure,]
