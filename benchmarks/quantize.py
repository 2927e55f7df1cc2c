"""Symmetric int8 quantization: one broadcast operation for all heads against a loop over heads."""

from collections.abc import Callable
from functools import partial

import torch
from harness import Target, alternate, arguments, finish
from torch import Tensor

from unsloth_spectral.codec.rank.int8 import quantize_int8

# Coefficients of one block [heads, rank, tokens] at the default ranks, and of a long block.
SHAPES = ((8, 16, 512), (8, 32, 512), (32, 32, 512), (8, 32, 4096))
TINY = torch.finfo(torch.float32).tiny


def per_head_loop(x: Tensor) -> tuple[Tensor, Tensor]:
    """The plain way: each head on its own, zeros included."""
    codes, scales = [], []
    for head in x:
        scale = head.abs().max().clamp_min(TINY) / 127
        codes.append((head / scale).round_().to(torch.int8))
        scales.append(scale)
    return torch.stack(codes), torch.stack(scales)[:, None, None]


def main() -> None:
    options = arguments("quantize", __doc__ or "", repeats=60)
    generator = torch.Generator().manual_seed(0)
    rows, targets = [], []
    for shape in SHAPES:
        x = torch.randn(shape, generator=generator)
        x[-1] = 0.0  # a head that a careless loop divides by zero
        expected, actual = per_head_loop(x), quantize_int8(x, dims=(-2, -1))
        assert torch.equal(expected[0], actual[0]), "the contenders must compute the same codes"
        contenders: dict[str, Callable[[], object]] = {
            "vectorized": partial(quantize_int8, x, dims=(-2, -1)),
            "per-head loop": partial(per_head_loop, x),
        }
        timings = alternate(contenders, options.repeats)
        speedup = timings["per-head loop"].median / timings["vectorized"].median
        rows.append(
            {
                "shape": shape,
                **{name: {"median_ms": timing.median} for name, timing in timings.items()},
                "speedup": speedup,
            }
        )
        print(f"{shape!s:>16}: vectorized {timings['vectorized'].median:.3f} ms, speedup {speedup:.2f}x")
        if shape == SHAPES[0]:
            targets.append(Target(f"speedup over the per-head loop at {list(shape)}", 5.0, speedup, at_least=True))
    finish(options.json, {"benchmark": "quantize", "rows": rows}, targets)


if __name__ == "__main__":
    main()
