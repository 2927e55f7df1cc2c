"""``python case.py WAY``: a process that has loaded Unsloth, and runs each case in a fork of itself.

Cases come as lines of JSON with ``family``, ``precision``, ``folder`` and ``checks``; each is answered by its exit
status. What it prints is in ``output.txt`` in its folder, and its result in ``result.json``.

Where there is a GPU there are no shims, and each fork loads Unsloth for itself: CUDA does not survive a fork.
"""

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from real_unsloth import shims

MOST_SECONDS = 900
FAST_PATH, FAST_MODEL, CPU_BACKEND = "fast path", "FastModel", "CPU backend"


def serve(way: str) -> None:
    """Load Unsloth once, which takes ten seconds, then run what comes."""
    import torch

    on_gpu = torch.cuda.device_count() > 0
    if not on_gpu:
        load(way, on_gpu)
    print("LOADED", way, flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        child = os.fork()
        if not child:
            signal.alarm(MOST_SECONDS)
            output = os.open(Path(case["folder"]) / "output.txt", os.O_WRONLY | os.O_CREAT)
            for stream in (1, 2):
                os.dup2(output, stream)
            # torch makes its thread pool anew in a fork, and two threads that ask for it at once may find none.
            torch.set_num_threads(1)
            try:
                if on_gpu:
                    load(way, on_gpu)
                run(way, case, on_gpu)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print("ENDED", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def load(way: str, on_gpu: bool) -> None:
    import torch

    if way != CPU_BACKEND and not on_gpu:
        shims.install(way == FAST_PATH)
    torch.set_num_threads(1)
    import unsloth  # noqa: F401, before transformers, as it asks for
    from real_unsloth import checks  # noqa: F401


def run(way: str, case: dict[str, Any], on_gpu: bool) -> None:
    """Load the model of ``case`` and put its checks to it."""
    import torch
    import unsloth
    from real_unsloth import checkpoints

    folder, precision = Path(case["folder"]), case["precision"]
    os.chdir(folder)
    checkpoints.save(case["family"], folder / "model")
    classes = unsloth.FastModel if way == FAST_MODEL else unsloth.FastLanguageModel
    options = {"max_seq_length": 2048, "load_in_4bit": precision == "4 bit"}
    # In half precision Unsloth chooses the type by the card.
    options["dtype"] = None if precision in ("float16", "bfloat16") else torch.float32
    if on_gpu and precision == "float16":
        options["dtype"] = torch.float16
    elif not on_gpu and way != CPU_BACKEND:
        shims.claim(bfloat16=precision != "float16")
        options |= {"device_map": {"": "cpu"}, "use_gradient_checkpointing": False}
    model, tokenizer = classes.from_pretrained(str(folder / "model"), **options)
    passed, failed = [], {}
    on_thread = shims.CudaOnCpu if way == FAST_PATH and not on_gpu else contextlib.nullcontext
    checks = all_checks(classes, tokenizer, on_thread)
    for name in case["checks"]:
        try:
            checks[name](model)
            passed.append(name)
        except Exception:
            failed[name] = traceback.format_exc()
    types = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    facts = {"unsloth": unsloth.__version__, "device": device, "weights": types, "passed": passed, "failed": failed}
    (folder / "result.json").write_text(json.dumps(facts), encoding="utf-8")


def all_checks(classes: Any, tokenizer: Any, on_thread: Callable[[], Any]) -> dict[str, Callable[[Any], Any]]:
    from real_unsloth import checks

    lora = {"r": 4, "lora_dropout": 0.0, "use_gradient_checkpointing": False}
    return {
        "bypass": checks.a_bypass_is_an_error,
        "tokens, updates": checks.same_tokens_and_every_update,
        "left padding": checks.same_tokens_with_left_padding,
        "tokens as dense": checks.same_tokens_as_the_dense_cache,
        "logits as dense": checks.as_near_as_the_dense_cache,
        "logits as unpatched": partial(checks.as_near_as_the_dense_cache, unpatched=True),
        "bytes": checks.bytes_fall_with_the_balanced_preset,
        "image": checks.an_image_is_seen,
        "ranks": checks.ranks_are_taken,
        "streaming": partial(checks.streaming, tokenizer=tokenizer, on_thread=on_thread),
        "unpatch": checks.unpatching_restores,
        "own caches": checks.own_caches_and_turns,
        "fast_generate": checks.fast_generate_without_vllm,
        "training": partial(checks.training_in_between, classes=classes),
        "adapter": partial(checks.adapters, add=partial(classes.get_peft_model, **lora)),
    }


if __name__ == "__main__":
    serve(sys.argv[1])
