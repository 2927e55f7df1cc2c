"""SmolLM2 in float32 and bfloat16: bits, bytes and agreement, dense against spectral.

Agreement is measured with the dense cache of the float32 model, which shows the cost of the dtype beside that of the
codec, and with the dense cache in the same dtype. No profile is used.
"""

import copy
from typing import Any

import torch
from harness import Target, arguments, finish
from smollm2 import CONTINUATION, PREFIX, STARTS, Subject, mean_fidelity
from torch import Tensor

from unsloth_spectral import SpectralCache
from unsloth_spectral.codec.config import PRESETS
from unsloth_spectral.eval.agreement import Agreement, compare_logits

# A CPU reads bfloat16 slowly, and float16 slower still: one slice and no float16.
DTYPES = (torch.float32, torch.bfloat16)
METHODS = ("dense", "balanced")
SLICES = STARTS[:1]


class Run:
    """Measures the slices in one dtype after another."""

    def __init__(self, subject: Subject) -> None:
        self._subject, self._model = subject, subject.model
        self._exact: list[Tensor] = []

    def rows(self, dtype: torch.dtype) -> list[dict[str, Any]]:
        """One row per method, means over the slices; float32 must come first."""
        self._subject.model = copy.deepcopy(self._model).to(dtype)
        agreements: dict[str, list[tuple[Agreement, Agreement]]] = {method: [] for method in METHODS}
        sizes: dict[str, dict[str, float | None]] = {}
        for number, start in enumerate(SLICES):
            ids = self._subject.ids(start, PREFIX + CONTINUATION + 1)
            dense: Tensor | None = None
            for method in METHODS:
                cache: Any = None
                if method != "dense":
                    cache = SpectralCache(self._subject.model, preset=method, use_profile=False)
                cache = self._subject.prefill(ids[:, :PREFIX], cache)
                sizes[method] = _sizes(cache)
                logits = self._subject.logits(ids[:, PREFIX:-1], cache)
                dense = logits if dense is None else dense
                if len(self._exact) == number:
                    self._exact.append(logits)
                targets = ids[0, PREFIX + 1 :]
                agreements[method].append(
                    (compare_logits(self._exact[number], logits, targets), compare_logits(dense, logits, targets))
                )
                print(f"{dtype} {method} {start}: KL {agreements[method][-1][0].kl:.4f}", flush=True)
        return [
            {
                "dtype": str(dtype).removeprefix("torch."),
                "method": method,
                **sizes[method],
                "from_float32": mean_fidelity([pair[0] for pair in pairs]),
                "from_dense": mean_fidelity([pair[1] for pair in pairs]),
            }
            for method, pairs in agreements.items()
        ]


def _sizes(cache: Any) -> dict[str, float | None]:
    if not isinstance(cache, SpectralCache):
        nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        return {"stored_mb": nbytes / 1e6, "cold_bits_per_element": None}
    stats = cache.stats()
    return {"stored_mb": stats.stored_bytes / 1e6, "cold_bits_per_element": stats.cold_bits_per_element}


def main() -> None:
    options = arguments("half_precision", __doc__ or "", repeats=1)
    run = Run(Subject())
    rows = [row for dtype in DTYPES for row in run.rows(dtype)]
    targets = [
        Target(
            f"{row['dtype']} {row['method']}: bits", 1.05 * PRESETS[row["method"]], row["cold_bits_per_element"], False
        )
        for row in rows
        if row["method"] != "dense"
    ]
    finish(options.json, {"benchmark": "half_precision", "prefix": PREFIX, "slices": SLICES, "rows": rows}, targets)


if __name__ == "__main__":
    main()
