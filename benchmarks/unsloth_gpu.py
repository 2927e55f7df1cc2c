"""Unsloth on a GPU: its own dense fast path against the same model patched, in 4 bits.

The model has Llama-3.2-3B's shapes and random weights: bytes and milliseconds do not depend on the weights. Both
contenders go through ``model.generate``; a step is timed from one call of a logits processor to the next.
"""

import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import unsloth  # before transformers, as Unsloth requires

# isort: split
import torch
from harness import arguments, finish, summarize
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, PreTrainedTokenizerFast

from unsloth_spectral import patch_unsloth_attention, unpatch_unsloth_attention
from unsloth_spectral.integrations.huggingface.cache_argument import cache_of

CASES = ((1, 4096), (1, 32_000), (8, 4096))  # sequences, tokens of each
LONGEST = 33_000
NEW_TOKENS, WARM_STEPS = 32, 4


class Clock(LogitsProcessor):
    """Records the time at which each step's logits are ready."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return scores


def save_model(folder: Path) -> None:
    """Save a model with Llama-3.2-3B's shapes and random weights."""
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dtype="bfloat16",
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def measure(model: Any, ids: torch.Tensor, new_tokens: int, weights: int) -> dict[str, Any]:
    """One call of generate: prefill, median step, bytes of the cache and the peak above the ``weights``."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    clock = Clock()
    torch.cuda.synchronize()
    started = time.perf_counter()
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        logits_processor=[clock],
    )
    peak = torch.cuda.max_memory_allocated() - weights
    steps = [1e3 * (b - a) for a, b in zip(clock.times[WARM_STEPS:], clock.times[WARM_STEPS + 1 :], strict=False)]
    timing = summarize(steps)
    count = getattr(cache_of(output), "stats", None)
    stats = count() if count else None
    return {
        "prefill_s": clock.times[0] - started,
        "step_ms": timing.median,
        "step_ms_quartiles": (timing.lower_quartile, timing.upper_quartile),
        "tokens_per_s": 1e3 * len(ids) / timing.median,
        "peak_mb": peak / 1e6,
        "stored_mb": stats.stored_bytes / 1e6 if stats else None,
        "dense_mb": stats.dense_bytes / 1e6 if stats else None,
        "seal_s": stats.seal_seconds if stats else None,
    }


def main() -> None:
    options = arguments("unsloth_gpu", __doc__ or "", repeats=3)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder))
        gc.collect()
        torch.cuda.empty_cache()
        model, _ = unsloth.FastLanguageModel.from_pretrained(folder, max_seq_length=LONGEST, load_in_4bit=True)
    unsloth.FastLanguageModel.for_inference(model)
    # Before the first call: Unsloth's buffers stay on the model afterwards.
    weights = torch.cuda.memory_allocated()
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    for batch, length in CASES:
        ids = torch.randint(3, 128_000, (batch, length), generator=generator).to(model.device)
        runs_by_cache: dict[str, list[dict[str, Any]]] = {"Unsloth, dense": [], "patched, balanced": []}
        for _ in range(options.repeats):
            for name, runs in runs_by_cache.items():
                if name != "Unsloth, dense":
                    patch_unsloth_attention(model, preset="balanced")
                try:
                    runs.append(measure(model, ids, NEW_TOKENS, weights))
                finally:
                    unpatch_unsloth_attention(model)
        for name, runs in runs_by_cache.items():
            best = sorted(runs, key=lambda run: run["step_ms"])[len(runs) // 2]
            row = {"batch": batch, "context": length, "cache": name, **best}
            row["prefill_s"] = min(run["prefill_s"] for run in runs)
            rows.append(row)
            print(
                f"{batch} x {length:>6} {name:<18} prefill {row['prefill_s']:6.2f} s  step {row['step_ms']:7.1f} ms  "
                f"{row['tokens_per_s']:6.1f} tokens/s  peak {row['peak_mb']:8.0f} MB  stored {row['stored_mb']}",
                flush=True,
            )
    finish(options.json, {"benchmark": "unsloth_gpu", "model": "Llama-3.2-3B's shapes, 4 bits", "rows": rows}, [])


if __name__ == "__main__":
    main()
