"""The time of sealing SmolLM2's prefill by part, and of gathering the query metric; ``--lengths`` in tokens.

The library's functions are wrapped while a spectral prefill runs; the time of a part excludes parts inside it. Dense
prefills of the unpatched model alternate with the spectral ones.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from harness import SETTLE_SECONDS, Target, arguments, finish, summarize
from smollm2 import Subject
from transformers import AttentionInterface, DynamicCache

from unsloth_spectral import SpectralCache, unpatch_unsloth_attention
from unsloth_spectral.cache.layer import SpectralLayer
from unsloth_spectral.cache.queries import QuerySampler
from unsloth_spectral.codec.spectral import codec, keys, statistics, values
from unsloth_spectral.codec.spectral.allocate import Budget
from unsloth_spectral.integrations.huggingface import attention, support

LENGTHS = (1024, 2048, 4096, 8192)
PRESET = "balanced"
TARGET_LENGTH, TARGET_SHARE = 4096, 0.03

GATHERING = ("attention function", "observe", "metric")
SEALING = ("metric", "centre", "basis", "allocation", "encode keys", "encode values", "rest of sealing")
# Owner and name of each function, and the part that its time counts for.
PARTS = (
    (attention, "sdpa_attention_forward", "attention"),
    (attention, "rotation_of", "positions"),
    (SpectralLayer, "observe", "observe"),
    (SpectralLayer, "seal", "rest of sealing"),
    (QuerySampler, "sample", "metric"),
    (codec, "metric_of", "metric"),
    (statistics, "centre", "centre"),
    (statistics, "covariance", "basis"),
    (statistics, "principal_basis", "basis"),
    (Budget, "allocate", "allocation"),
    (keys, "plan", "encode keys"),
    (keys, "encode", "encode keys"),
    (values, "encode", "encode values"),
)


@dataclass(slots=True)
class Stopwatch:
    """Seconds of each part, without parts inside it."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _inner: list[float] = field(default_factory=list)

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - started
                self.seconds[part] += took - self._inner.pop()
                if self._inner:
                    self._inner[-1] += took

        return timed

    @contextmanager
    def on_parts(self) -> Iterator[None]:
        with ExitStack() as stack:
            for owner, name, part in PARTS:
                stack.enter_context(patch.object(owner, name, self.wrap(part, getattr(owner, name))))
            # Its time without the other parts.
            stack.callback(AttentionInterface.register, support.ATTENTION_NAME, attention.attend)
            AttentionInterface.register(support.ATTENTION_NAME, self.wrap("attention function", attention.attend))
            yield


def dense(subject: Subject, input_ids: torch.Tensor) -> dict[str, float]:
    unpatch_unsloth_attention(subject.model)
    watch, cache = Stopwatch(), DynamicCache(config=subject.model.config)
    watch.wrap("model", subject.prefill)(input_ids, cache)
    return {"prefill": watch.seconds["model"]}


def spectral(subject: Subject, input_ids: torch.Tensor) -> dict[str, float]:
    # The cache first, because making it registers the attention function, which is then wrapped.
    watch, cache = Stopwatch(), SpectralCache(subject.model, preset=PRESET)
    with watch.on_parts():
        watch.wrap("model", subject.prefill)(input_ids, cache)
    seconds = dict(watch.seconds)
    assert cache.stats().layers[0].sealed_tokens, "nothing was sealed"
    missing = {part for _, _, part in PARTS} - seconds.keys()
    assert not missing, f"the prefill does not go through {', '.join(missing)}"
    totals = {"prefill": sum(seconds.values())}
    for name, parts in (("gathering", GATHERING), ("sealing", SEALING)):
        totals[name] = sum(seconds[part] for part in parts)
    # The time that a dense cache's prefill would have taken in this run, so that a slow moment affects both sides.
    without = totals["prefill"] - sum(seconds[part] for part in {*GATHERING, *SEALING})
    shares = {f"{name} over prefill": totals[name] / without for name in ("gathering", "sealing")}
    return {**totals, **shares, **seconds}


def measure(subject: Subject, length: int, repeats: int) -> dict[str, Any]:
    """Medians of all times of the contenders, which alternate."""
    input_ids, contenders = subject.ids(0, length), {"dense": dense, "spectral": spectral}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    spectral(subject, input_ids)
    for _ in range(repeats):
        for name, run in contenders.items():
            time.sleep(SETTLE_SECONDS)
            runs[name].append(run(subject, input_ids))
    row: dict[str, Any] = {"context": length, "repeats": repeats}
    for name, repeated in runs.items():
        timings = {part: summarize([times[part] for times in repeated]) for part in repeated[0]}
        row[name] = {part: asdict(timing) for part, timing in timings.items()}
    return row


def show(row: dict[str, Any]) -> None:
    medians = {part: timing["median"] for part, timing in row["spectral"].items()}
    print(
        f"{row['context']:>6} tokens: prefill dense {row['dense']['prefill']['median']:.2f} s, "
        f"spectral {medians['prefill']:.2f} s; sealing {medians['sealing']:.3f} s "
        f"({medians['sealing over prefill']:.1%}), gathering {medians['gathering']:.3f} s "
        f"({medians['gathering over prefill']:.2%})"
    )
    parts = dict.fromkeys((*GATHERING, *SEALING, "positions"))
    print("       ", ", ".join(f"{part} {1e3 * medians[part]:.1f} ms" for part in parts))


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    chosen, sys.argv[1:] = parser.parse_known_args()
    options = arguments("sealing", __doc__ or "", repeats=5)
    subject, rows, targets = Subject(), [], []
    for length in chosen.lengths:
        row = measure(subject, length, options.repeats)
        rows.append(row)
        show(row)
        if length == TARGET_LENGTH:
            share = row["spectral"]["gathering over prefill"]["median"]
            name = f"gathering the query metric over prefill at {length} tokens"
            targets.append(Target(name, TARGET_SHARE, share, at_least=False))
    finish(options.json, {"benchmark": "sealing", "preset": PRESET, "rows": rows}, targets)


if __name__ == "__main__":
    main()
