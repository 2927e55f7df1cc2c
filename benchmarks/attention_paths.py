"""The direct path against rebuilt tiles by the number of queries, to choose where `attention.dispatch` switches."""

from collections.abc import Callable
from functools import partial

import torch
from harness import alternate, arguments, finish

from unsloth_spectral.attention import direct
from unsloth_spectral.attention.dispatch import DIRECT_QUERY_LENGTH, rebuilt_tiles
from unsloth_spectral.attention.scores import ScoreOptions, causal_mask
from unsloth_spectral.cache.layer import SpectralLayer
from unsloth_spectral.codec.block import Block
from unsloth_spectral.codec.config import SpectralConfig

KV_LENGTH = 4096
QUERY_LENGTHS = (1, 4, 16, 32, 64, 128, 256, 512)
# num_attention_heads, num_key_value_heads, head_dim
SHAPES = {"SmolLM2-135M": (9, 3, 64), "Llama-3-8B": (32, 8, 128)}


def sealed_layer(num_key_value_heads: int, head_dim: int) -> SpectralLayer:
    generator = torch.Generator().manual_seed(0)
    layer = SpectralLayer(SpectralConfig(rank_keys=16, rank_values=32))
    keys, values = (torch.randn(1, num_key_value_heads, KV_LENGTH, head_dim, generator=generator) for _ in range(2))
    layer.append(keys, values)
    layer.seal()
    return layer


def by_tiles(
    query: torch.Tensor, blocks: list[Block], mask: torch.Tensor | None, options: ScoreOptions
) -> torch.Tensor:
    return direct.attend(query, rebuilt_tiles(blocks), mask, options)


@torch.inference_mode()
def main() -> None:
    options = arguments("attention_paths", __doc__ or "", repeats=11)
    rows = []
    for name, (num_attention_heads, num_key_value_heads, head_dim) in SHAPES.items():
        blocks = sealed_layer(num_key_value_heads, head_dim).blocks
        for query_length in QUERY_LENGTHS:
            query = torch.randn(1, num_attention_heads, query_length, head_dim)
            mask = None if query_length == 1 else causal_mask(query_length, KV_LENGTH, query.device)
            score_options = ScoreOptions(head_dim**-0.5)
            contenders: dict[str, Callable[[], object]] = {
                path: partial(function, query, blocks, mask, score_options)
                for path, function in (("direct", direct.attend), ("tiles", by_tiles))
            }
            timings = alternate(contenders, options.repeats)
            milliseconds = {path: timing.median for path, timing in timings.items()}
            rows.append({"shape": name, "query_length": query_length, "kv_length": KV_LENGTH, "ms": milliseconds})
            print(
                f"{name:>13} {query_length:>4} queries: direct {milliseconds['direct']:8.2f} ms, "
                f"tiles {milliseconds['tiles']:8.2f} ms"
            )
    finish(
        options.json,
        {"benchmark": "attention_paths", "rows": rows, "direct_up_to": DIRECT_QUERY_LENGTH},
        [],
    )


if __name__ == "__main__":
    main()
