"""One decode step of attention on a GPU: the kernels against torch on the codes, and torch's SDPA on dense tensors.

Llama-3-8B's shapes in bfloat16 with random keys of a falling spectrum. Kernels are timed as a replayed graph, so that
launches do not count.
"""

from typing import Any

import torch
from harness import arguments, finish
from torch import Tensor
from triton.testing import do_bench

from unsloth_spectral.attention import direct, gpu
from unsloth_spectral.attention.scores import ScoreOptions
from unsloth_spectral.codec.block import Block, ExactBlock
from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.codec.observed import Observed
from unsloth_spectral.codec.registry import make_codec
from unsloth_spectral.rope import Rotation

HEADS, GROUP, HEAD_DIM = 8, 4, 128
CASES = ((1, 4096), (1, 32_768), (8, 4096))  # sequences, tokens of each


def exact(*shape: int) -> ExactBlock:
    keys, values = torch.randn(2, *shape, device="cuda").bfloat16()
    return ExactBlock(keys, values)


def tokens(batch: int, length: int) -> tuple[list[Block], ExactBlock]:
    """Blocks of sink tokens, sealed tokens and a residual; and the sealed tokens before sealing."""
    dense = exact(batch, HEADS, length, HEAD_DIM)
    spectrum = torch.arange(1, HEAD_DIM + 1, device="cuda") ** -0.7
    dense = ExactBlock((dense.keys * spectrum + 0.5).bfloat16(), dense.values)
    angles = torch.arange(length)[:, None] * torch.logspace(0, -4, HEAD_DIM // 2, dtype=torch.float64)
    table = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)[None].cuda()
    half = HEAD_DIM // 2
    rotation = Rotation.of(table, slice(0, half), slice(half, HEAD_DIM))
    sealed = make_codec(SpectralConfig(preset="balanced"), 1).layer(0).seal(dense, None, Observed(rotation))
    assert sealed is not None
    return [exact(batch, HEADS, 4, HEAD_DIM), sealed, exact(batch, HEADS, 150, HEAD_DIM)], dense


def replayed(blocks: list[Block], query: Tensor, options: ScoreOptions) -> Any:
    gpu.attend(query, blocks, None, options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gpu.attend(query, blocks, None, options)
    return graph.replay


def main() -> None:
    parsed = arguments("gpu/attention", __doc__ or "", repeats=1)
    torch.manual_seed(0)
    options, rows = ScoreOptions(HEAD_DIM**-0.5), []
    for batch, length in CASES:
        blocks, dense = tokens(batch, length)
        query = torch.randn(batch, HEADS * GROUP, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        keys, values = dense.reconstruct()
        runs = {
            "dense": lambda q=query, k=keys, v=values: torch.nn.functional.scaled_dot_product_attention(
                q, k, v, enable_gqa=True
            ),
            "direct": lambda q=query, b=blocks: direct.attend(q, b, None, options),
            "kernels": replayed(blocks, query, options),
        }
        by_kernels, by_torch = gpu.attend(query, blocks, None, options), direct.attend(query, blocks, None, options)
        milliseconds = {name: do_bench(run, return_mode="median") for name, run in runs.items()}
        error = float((by_kernels - by_torch).norm() / by_torch.norm())
        rows.append({"batch": batch, "context": length, "milliseconds": milliseconds, "error": error})
        print(batch, length, {name: round(value, 4) for name, value in milliseconds.items()}, f"error {error:.1e}")
    finish(parsed.json, {"benchmark": "gpu_attention", "gpu": torch.cuda.get_device_name(), "rows": rows}, [])


if __name__ == "__main__":
    main()
