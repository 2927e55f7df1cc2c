"""Time to the first token behind 1k to 8k tokens, cold against restored from a snapshot, and the size of the file.

Cold: a prefill of the context and a question, with the dense cache and the spectral one. Restored: the snapshot of the
context is loaded, all checksums compared, and the question fed. ``first_load`` is the first one in a process, which
also hashes the model's weights. The file was just written, so it is in the page cache.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import Target, arguments, finish, summarize
from smollm2 import Subject
from transformers import DynamicCache

from unsloth_spectral import SpectralCache, SpectralConfig
from unsloth_spectral.integrations.huggingface import identity
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument

LENGTHS = (1024, 2048, 4096, 8064)
QUESTION = 16
WANTED_SPEEDUP, WANTED_AT = 20.0, 4096


def milliseconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - started)


def measure(subject: Subject, length: int, repeats: int, path: Path) -> dict[str, Any]:
    model = subject.model
    config = SpectralConfig()
    context, question = subject.ids(0, length), subject.ids(length, QUESTION)

    def first_token(cache: Any, input_ids: torch.Tensor) -> int:
        with torch.inference_mode():
            output = model(input_ids=input_ids, **cache_argument(cache), use_cache=True, logits_to_keep=1)
            return int(output.logits[0, -1].argmax())

    def cold(make: Callable[[], Any]) -> int:
        cache = make()
        first_token(cache, context)
        return first_token(cache, question)

    def dense() -> DynamicCache:
        return DynamicCache(config=model.config)

    def spectral() -> SpectralCache:
        return SpectralCache(model, config=config, use_profile=False)

    def restored() -> int:
        return first_token(SpectralCache.load(path, model, context), question)

    cache = spectral()
    subject.prefill(context, cache)
    save = milliseconds(lambda: cache.save(path, context))
    identity._known.clear()
    first_load = milliseconds(lambda: SpectralCache.load(path, model, context))
    first_tokens: list[int] = []
    colds = repeats if length <= WANTED_AT else 1
    row = {
        "tokens": length,
        "cold_dense_ms": summarize([milliseconds(lambda: cold(dense)) for _ in range(colds)]).median,
        "cold_spectral_ms": summarize(
            [milliseconds(lambda: first_tokens.append(cold(spectral))) for _ in range(colds)]
        ).median,
        "restored_ms": summarize(
            [milliseconds(lambda: first_tokens.append(restored())) for _ in range(3 * repeats)]
        ).median,
        "load_ms": summarize(
            [milliseconds(lambda: SpectralCache.load(path, model, context)) for _ in range(3 * repeats)]
        ).median,
        "first_load_ms": first_load,
        "save_ms": save,
        "file_bytes": path.stat().st_size,
        "stored_bytes": cache.stats().stored_bytes,
        "dense_fp16_bytes": 2 * sum(layer.elements for layer in cache.stats().layers),
    }
    assert len(set(first_tokens)) == 1, "the restored cache gives another first token"
    row["speedup"] = row["cold_dense_ms"] / row["restored_ms"]
    row["file_factor"] = row["dense_fp16_bytes"] / row["file_bytes"]
    print(
        f"{length:>5} tokens: cold {row['cold_dense_ms']:8.0f} ms dense, {row['cold_spectral_ms']:8.0f} ms spectral; "
        f"restored {row['restored_ms']:6.0f} ms, {row['speedup']:.1f}x; file {row['file_bytes'] / 1e6:.1f} MB, "
        f"{row['file_factor']:.1f}x smaller than dense fp16"
    )
    return row


def main() -> None:
    options = arguments("snapshots", __doc__ or "", repeats=2)
    subject = Subject()
    subject.prefill(subject.ids(0, 64))  # pages the weights in
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(subject, length, options.repeats, Path(folder) / "a.safetensors") for length in LENGTHS]
    at = next(row for row in rows if row["tokens"] == WANTED_AT)
    results = {"benchmark": "snapshots", "model": "SmolLM2-135M-Instruct", "preset": "balanced", "rows": rows}
    finish(options.json, results, [Target(f"speedup at {WANTED_AT}", WANTED_SPEEDUP, at["speedup"], at_least=True)])


if __name__ == "__main__":
    main()
