"""Attention paths on a CPU by the number of queries, to choose where `attention.dispatch` switches.

Direct: torch products on the stored codes; tiles: blocks rebuilt and multiplied by torch; native: the compiled kernel.
"""

from collections.abc import Callable
from functools import partial

import torch
from decode import SHAPES, sealed_layers
from harness import alternate, arguments, finish

from unsloth_spectral.attention import cpu, direct
from unsloth_spectral.attention.dispatch import DIRECT_QUERY_LENGTH, NATIVE_QUERY_LENGTH, rebuilt_tiles
from unsloth_spectral.attention.scores import ScoreOptions, causal_mask
from unsloth_spectral.codec.block import Block

LENGTHS = (1024, 8192)
QUERY_LENGTHS = (1, 4, 16, 32, 64, 128, 256, 512)
MOST_DIRECT = 64  # queries for which the direct path is timed: twice as many as it serves


def by_tiles(
    query: torch.Tensor, blocks: list[Block], mask: torch.Tensor | None, options: ScoreOptions
) -> torch.Tensor:
    return direct.attend(query, rebuilt_tiles(blocks), mask, options)


@torch.inference_mode()
def main() -> None:
    options = arguments("attention_paths", __doc__ or "", repeats=7)
    rows = []
    for name, shape in SHAPES.items():
        _, query_heads, head_dim = shape
        for length in LENGTHS:
            blocks = sealed_layers(shape, length, 1)[0]
            for query_length in QUERY_LENGTHS:
                query = torch.randn(1, query_heads, query_length, head_dim)
                mask = None if query_length == 1 else causal_mask(query_length, length, query.device)
                call_arguments = (query, blocks, mask, ScoreOptions(head_dim**-0.5))
                contenders: dict[str, Callable[[], object]] = {
                    "tiles": partial(by_tiles, *call_arguments),
                    "native": partial(cpu.attend, *call_arguments),
                }
                if query_length <= MOST_DIRECT:
                    contenders["direct"] = partial(direct.attend, *call_arguments)
                timings = alternate(contenders, options.repeats)
                milliseconds = {path: timing.median for path, timing in timings.items()}
                rows.append({"shape": name, "query_length": query_length, "kv_length": length, "ms": milliseconds})
                shown = "".join(f"  {path} {ms:8.2f} ms" for path, ms in milliseconds.items())
                print(f"{name:>13} {length:>6} tokens {query_length:>4} queries:{shown}")
    limits = {"direct_up_to": DIRECT_QUERY_LENGTH, "native_up_to": NATIVE_QUERY_LENGTH}
    finish(options.json, {"benchmark": "attention_paths", "rows": rows, **limits}, [])


if __name__ == "__main__":
    main()
