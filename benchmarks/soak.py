"""Twenty thousand tokens decoded one by one on a tiny random model: memory and time against the context.

The process may grow by the bytes that the cache reports; the time per token may grow linearly with the context.
"""

import gc
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from harness import Target, arguments, finish
from transformers import LlamaConfig, LlamaForCausalLM

from unsloth_spectral import SpectralCache
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument

TOKENS, WINDOW = 20_000, 1_000
# Until then, tables, buffers and the allocator's pools are still being created.
SETTLED = 2_000
PAGE = 4096


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=384,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=TOKENS,
    )
    return LlamaForCausalLM(config).eval()


def resident_bytes() -> int:
    gc.collect()
    return PAGE * int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])


@torch.inference_mode()
def decode() -> list[dict[str, Any]]:
    """One row per window: median milliseconds per token, stored bytes, bytes of the process."""
    model = tiny_model()
    cache, token, rows = SpectralCache(model), torch.ones(1, 1, dtype=torch.int64), []
    for _ in range(TOKENS // WINDOW):
        times = []
        for _ in range(WINDOW):
            started = time.perf_counter()
            token = model(input_ids=token, **cache_argument(cache), use_cache=True).logits[:, -1:].argmax(-1)
            times.append(1e3 * (time.perf_counter() - started))
        stats = cache.stats()
        row = {
            "context": stats.num_tokens,
            "ms": statistics.median(times),
            "ms_worst": max(times),
            "stored_bytes": stats.stored_bytes,
            "dense_bytes": stats.dense_bytes,
            "resident_bytes": resident_bytes(),
            "sealed_tokens": stats.layers[0].sealed_tokens,
            "exact_blocks": stats.exact_blocks,
        }
        rows.append(row)
        print(f"{row['context']:>6} tokens: {row['ms']:.2f} ms a token, stored {row['stored_bytes'] / 1e6:.2f} MB")
    assert rows[-1]["sealed_tokens"] > TOKENS - 2_000, "nothing was sealed"
    return rows


def targets_of(rows: list[dict[str, Any]]) -> list[Target]:
    settled = [row for row in rows if row["context"] >= SETTLED]
    contexts, times = [row["context"] for row in settled], [row["ms"] for row in settled]
    slope, start = statistics.linear_regression(contexts, times)
    beyond = max(ms / (start + slope * context) for context, ms in zip(contexts, times, strict=True))
    first, last = settled[0], settled[-1]
    grown = last["resident_bytes"] - first["resident_bytes"] - (last["stored_bytes"] - first["stored_bytes"])
    return [
        Target("slowest window over the line through all of them", 1.25, beyond, at_least=False),
        Target("growth of the process beyond the bytes stored, MB", 8.0, grown / 1e6, at_least=False),
    ]


def main() -> None:
    options = arguments("soak", __doc__ or "", repeats=1)
    rows = decode()
    finish(options.json, {"benchmark": "soak", "tokens": TOKENS, "rows": rows}, targets_of(rows))


if __name__ == "__main__":
    main()
