"""SmolLM2 end to end at 1k to 8k tokens: prefill, sealing, decoding and bytes, dense against spectral.

The dense contenders are the library's own: DynamicCache, which copies itself at every step, and StaticCache, which is
written in place. Decode steps of all contenders alternate, so that a busy moment hits all of them alike.
"""

import time
from typing import Any

import torch
from harness import Target, arguments, finish, summarize
from smollm2 import Subject
from transformers import DynamicCache, StaticCache

from unsloth_spectral import SpectralCache, SpectralConfig
from unsloth_spectral.codec.tensors import storage_bytes
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument

LENGTHS = (1024, 2048, 4096, 8064)  # the last leaves room for decoding within the model's 8,192 positions


def contenders(subject: Subject, length: int, steps: int) -> dict[str, Any]:
    return {
        "dense (DynamicCache)": DynamicCache(config=subject.model.config),
        "dense (StaticCache)": StaticCache(config=subject.model.config, max_cache_len=length + steps + 8),
        "rank 16/32": SpectralCache(subject.model, config=SpectralConfig(rank_keys=16, rank_values=32)),
    }


def stored_bytes(cache: Any) -> int:
    if isinstance(cache, SpectralCache):
        return cache.stats().stored_bytes
    return storage_bytes(*(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))


def decode_step(subject: Subject, token: torch.Tensor, cache: Any) -> float:
    started = time.perf_counter()
    with torch.inference_mode():
        subject.model(input_ids=token, **cache_argument(cache), use_cache=True)
    return 1e3 * (time.perf_counter() - started)


def main() -> None:
    options = arguments("end_to_end", __doc__ or "", repeats=30)
    subject = Subject()
    subject.prefill(subject.ids(0, 64))
    rows: list[dict[str, Any]] = []
    targets = []
    for length in LENGTHS:
        caches, entries = contenders(subject, length, options.repeats), {}
        for name, cache in caches.items():
            started = time.perf_counter()
            subject.prefill(subject.ids(0, length), cache)
            entry: dict[str, Any] = {"context": length, "cache": name, "prefill_s": time.perf_counter() - started}
            if isinstance(cache, SpectralCache):
                entry["seal_s"] = cache.stats().seal_seconds
                share = entry["seal_s"] / (entry["prefill_s"] - entry["seal_s"])
                targets.append(Target(f"sealing over prefill at {length} tokens", 0.05, share, at_least=False))
            entry["stored_bytes"] = stored_bytes(cache)
            entries[name] = entry
        token = subject.ids(length, 1)
        steps: dict[str, list[float]] = {name: [] for name in caches}
        for _ in range(options.repeats):
            for name, cache in caches.items():
                steps[name].append(decode_step(subject, token, cache))
        for name, entry in entries.items():
            timing = summarize(steps[name])
            entry["decode_ms"], entry["decode_tokens_per_s"] = timing.median, 1e3 / timing.median
            entry["decode_ms_quartiles"] = (timing.lower_quartile, timing.upper_quartile)
            rows.append(entry)
            print(
                f"{length:>6} {name:<21} prefill {entry['prefill_s']:6.1f} s  seal {entry.get('seal_s', 0):5.2f} s  "
                f"decode {entry['decode_tokens_per_s']:5.1f} tokens/s  {entry['stored_bytes'] / 1e6:6.1f} MB"
            )
    finish(options.json, {"benchmark": "end_to_end", "rows": rows}, targets)


if __name__ == "__main__":
    main()
