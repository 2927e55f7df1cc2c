"""``python case.py BACKEND FAMILY FOLDER``: one family on one backend of the real package; prints the checks passed."""

import contextlib
import json
import os
import sys
import traceback
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from real_unsloth import shims

FAST = ("llama", "llama, scaled RoPE", "mistral", "gemma", "gemma2", "qwen2", "qwen3")


def main(backend: str, family: str, folder: Path, only: str | None) -> None:
    is_fast = backend == "gpu" and family in FAST
    if backend == "gpu":
        shims.install(is_fast)
    import torch
    import unsloth  # before transformers, as it asks for
    from real_unsloth import checkpoints, checks

    torch.set_num_threads(1)
    checkpoints.save(family, folder)
    classes = unsloth.FastLanguageModel if is_fast or backend == "cpu" else unsloth.FastModel
    options = {"max_seq_length": 2048, "load_in_4bit": False, "dtype": torch.float32}
    if backend == "gpu":
        options |= {"device_map": {"": "cpu"}, "use_gradient_checkpointing": False}
    model, tokenizer = classes.from_pretrained(str(folder), **options)
    on_thread = shims.CudaOnCpu if is_fast else contextlib.nullcontext
    lora = {"r": 4, "lora_dropout": 0.0, "use_gradient_checkpointing": False}
    chosen = {
        "tokens, updates": checks.same_tokens_and_every_update,
        "left padding": checks.same_tokens_with_left_padding,
        "bytes": checks.bytes_fall_with_the_balanced_preset,
        "ranks": checks.ranks_are_taken,
        "streaming": partial(checks.streaming, tokenizer=tokenizer, on_thread=on_thread),
        "unpatch": checks.unpatching_restores,
        "own caches": checks.own_caches_and_turns,
        "fast_generate": checks.fast_generate_without_vllm,
        "training": partial(checks.training_in_between, classes=classes),
        "adapter": partial(checks.adapters, add=partial(classes.get_peft_model, **lora)),
    }
    if is_fast:
        chosen = {"bypass": checks.a_bypass_is_an_error, **chosen}
    passed, failed = [], {}
    for name, check in chosen.items():
        if only is None or name in only.split("|"):
            try:
                check(model)
                passed.append(name)
            except Exception:
                failed[name] = traceback.format_exc()
    facts = {"unsloth": unsloth.__version__, "generate": model.generate.__name__, "passed": passed, "failed": failed}
    print("RESULT " + json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), os.environ.get("CHECKS"))
