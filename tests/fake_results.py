"""Results like those of a run of all methods, made without a model, for tests of the plots and the page."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Family, settings, and the least bits and largest KL of the family's range.
FAMILIES: dict[str, dict[str, tuple[float, float]]] = {
    "rank": {"rank 16/32": (3.76, 0.110), "rank 24/40": (4.9, 0.046), "rank 32/48": (6.1, 0.021)},
    "spectral": {
        "spectral quality": (3.01, 0.0020),
        "spectral balanced": (2.13, 0.0067),
        "spectral small": (1.38, 0.025),
    },
    "kivi": {"kivi 2": (3.0, 0.162), "kivi 3": (4.0, 0.016), "kivi 4": (5.0, 0.0028)},
    "turboquant": {"turboquant 2": (2.25, 0.112), "turboquant 3": (3.26, 0.018), "turboquant 4": (4.21, 0.0045)},
    "quarot": {"quarot 2": (2.5, 0.19), "quarot 4": (4.5, 0.004)},
    "hqq": {"hqq 2": (2.9, 0.3), "hqq 4": (4.9, 0.0035)},
    "quanto": {"quanto 2": (3.1, 0.44), "quanto 4": (5.1, 0.0041)},
    "int8": {"int8": (8.25, 0.0001)},
}


def write_results(
    folder: Path, families: dict[str, dict[str, tuple[float, float]]] = FAMILIES, tasks: Sequence[str] | None = None
) -> Path:
    """A results folder of ``tasks`` (fidelity, needle, needle-depth, lengths and drift), and a failure."""
    tasks = tasks or list(CASES)
    source = random.Random(0)
    members = {"dense": ("dense", None, 0.0)}
    for family, settings in families.items():
        members |= {name: (family, bits, kl) for name, (bits, kl) in settings.items()}
    lines: list[dict[str, Any]] = []
    for task in tasks:
        for case in CASES[task]:
            for name, (family, bits, kl) in members.items():
                metrics, series = _outcome(task, case, family, bits, kl, source)
                stored = 94_371_840 if bits is None else int(94_371_840 * bits / 16 * 1.12)
                footprint = {"stored_bytes": stored, "dense_bytes": 94_371_840, "cold_bits_per_element": bits}
                line = {"task": task, "method": name, "family": family, "case": case, "metrics": metrics}
                lines.append({**line, "footprint": footprint, "series": series, "seconds": 3 + source.random()})
    last = {name: lines[-1][name] for name in ("task", "method", "family", "case")}
    lines[-1] = {**last, "error": "OutOfMemoryError: tried to allocate 2.00 GiB", "seconds": 1.0}
    config = {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "dtype": "float16",
        "settings": {},
        "tasks": list(tasks),
        "task_settings": {task: {"context_length": 4096} for task in tasks},
        "methods": list(members),
    }
    environment = {
        "date": "2026-11-24T12:00:00+00:00",
        "unsloth_spectral": "0.1.0",
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "python": "3.11.9",
        "platform": "Linux x86_64",
        "processor": "A Processor (AVX512)",
        "threads": 2,
        "gpu": "none",
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "predictions.jsonl").write_text("")
    return folder


CASES = {
    "fidelity": ["slice=20000", "slice=50000", "slice=80000"],
    "needle": ["facts=16 seed=0", "facts=16 seed=1"],
    "needle-depth": [
        f"length={length} depth={depth:.2f}" for length in (1024, 2048, 4096, 8192) for depth in (0, 0.25, 0.5, 0.75, 1)
    ],
    "lengths": [f"length={length}" for length in (512, 1024, 2048, 4096, 8064)],
    "drift": ["prompt=0", "prompt=1"],
}


def _outcome(
    task: str, case: str, family: str, bits: float | None, kl: float, source: random.Random
) -> tuple[dict[str, float], dict[str, list[float]]]:
    noise = math.exp(source.gauss(0, 0.15))
    if task == "fidelity":
        change = 14 * kl * noise
        metrics = {"kl": kl * noise, "top1_agreement": 1 / (1 + 3 * kl**0.6), "perplexity": 13.9 + change}
        series = {}
        if family.startswith("spectral"):
            series = {
                side: [2 + offset + math.sin(layer / 4) + source.random() / 3 for layer in range(30)]
                for side, offset in {"bits_keys": 0, "bits_values": 0.6}.items()
            }
        return {**metrics, "perplexity_change": change}, series
    if task == "needle":
        return {"retrieved": round(16 / (1 + 4 * kl)) / 16, "exact": 1 / (1 + 9 * kl)}, {}
    if task == "needle-depth":
        length = int(case.split()[0].split("=")[1])
        return {"retrieved": float(source.random() > kl * length / 2000)}, {}
    if task == "lengths":
        cold = int(case.split("=")[1]) - 68
        return {"factor": 1 if bits is None else (cold + 68) / (68 + cold * bits / 16), "kl": kl * noise}, {}
    rows = [kl * noise * (1 + step / 100) * math.exp(source.gauss(0, 1)) for step in range(256)]
    return {"kl": sum(rows) / len(rows), "first_difference": 256 / (1 + 40 * kl)}, {"kl": rows}
