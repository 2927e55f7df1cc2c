"""``python case.py BACKEND FAMILY PRECISION FOLDER CHECK ...``: one family on one backend of the real package.

Prints the checks passed and failed as a line of JSON.
"""

import contextlib
import json
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from real_unsloth import shims

FAST = ("llama", "llama, scaled RoPE", "mistral", "gemma", "gemma2", "qwen2", "qwen3")


def main(backend: str, family: str, precision: str, folder: Path, names: list[str]) -> None:
    is_fast = backend == "gpu" and family in FAST
    if backend == "gpu":
        shims.install(is_fast)
    import torch
    import unsloth  # before transformers, as it asks for
    from real_unsloth import checkpoints

    torch.set_num_threads(1)
    checkpoints.save(family, folder)
    classes = unsloth.FastLanguageModel if is_fast or backend == "cpu" else unsloth.FastModel
    options = {"max_seq_length": 2048, "load_in_4bit": precision == "4 bit"}
    # In half precision Unsloth chooses the type by the card.
    options["dtype"] = torch.float32 if precision == "float32" else None
    if backend == "gpu":
        shims.claim(bfloat16=precision in ("float32", "bfloat16"))
        options |= {"device_map": {"": "cpu"}, "use_gradient_checkpointing": False}
    model, tokenizer = classes.from_pretrained(str(folder), **options)
    passed, failed = [], {}
    chosen = all_checks(classes, tokenizer, shims.CudaOnCpu if is_fast else contextlib.nullcontext)
    for name in names:
        try:
            chosen[name](model)
            passed.append(name)
        except Exception:
            failed[name] = traceback.format_exc()
    types = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})
    facts = {"unsloth": unsloth.__version__, "weights": types, "passed": passed, "failed": failed}
    print("RESULT " + json.dumps(facts))


def all_checks(classes: Any, tokenizer: Any, on_thread: Callable[[], Any]) -> dict[str, Callable[[Any], Any]]:
    from real_unsloth import checks

    lora = {"r": 4, "lora_dropout": 0.0, "use_gradient_checkpointing": False}
    return {
        "bypass": checks.a_bypass_is_an_error,
        "tokens, updates": checks.same_tokens_and_every_update,
        "left padding": checks.same_tokens_with_left_padding,
        "tokens as dense": checks.same_tokens_as_the_dense_cache,
        "logits as dense": checks.as_near_as_the_dense_cache,
        "bytes": checks.bytes_fall_with_the_balanced_preset,
        "ranks": checks.ranks_are_taken,
        "streaming": partial(checks.streaming, tokenizer=tokenizer, on_thread=on_thread),
        "unpatch": checks.unpatching_restores,
        "own caches": checks.own_caches_and_turns,
        "fast_generate": checks.fast_generate_without_vllm,
        "training": partial(checks.training_in_between, classes=classes),
        "adapter": partial(checks.adapters, add=partial(classes.get_peft_model, **lora)),
    }


if __name__ == "__main__":
    main(*sys.argv[1:4], Path(sys.argv[4]), sys.argv[5:])
