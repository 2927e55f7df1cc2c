"""The process's memory while SmolLM2 decodes behind 8,064 tokens, dense against spectral, each in a process of its own.

The peak is reset after the prefill, whose activations would hide the cache (Linux only: /proc).
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from harness import arguments, finish
from smollm2 import Subject
from transformers import DynamicCache

from unsloth_spectral import SpectralCache
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument

TOKENS, STEPS = 8064, 16
CACHES = ("none", "dense", "spectral")


def megabytes(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError(f"/proc/self/status has no {field}")


def measure(kind: str) -> dict[str, Any]:
    subject = Subject()
    # A short prefix touches everything but a long cache.
    length = 64 if kind == "none" else TOKENS
    cache: Any = SpectralCache(subject.model) if kind == "spectral" else DynamicCache(config=subject.model.config)
    subject.prefill(subject.ids(0, length), cache)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    for step in range(STEPS):
        with torch.inference_mode():
            subject.model(input_ids=subject.ids(length + step, 1), **cache_argument(cache), use_cache=True)
    stored = cache.stats().stored_bytes / 1e6 if kind == "spectral" else None
    return {"cache": kind, "peak_mb": megabytes("VmHWM"), "now_mb": megabytes("VmRSS"), "stored_mb": stored}


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2])))
        return
    options = arguments("decode_memory", __doc__ or "", repeats=1)
    rows = []
    for kind in CACHES:
        command = [sys.executable, __file__, "--one", kind]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        print(f"{kind:<9} peak {rows[-1]['peak_mb']:8.1f} MB")
    finish(options.json, {"benchmark": "decode_memory", "tokens": TOKENS, "rows": rows}, [])


if __name__ == "__main__":
    main()
