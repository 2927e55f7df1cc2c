"""Which path serves a call."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from unsloth_spectral.attention import direct
from unsloth_spectral.attention.scores import ScoreOptions
from unsloth_spectral.codec.block import Block, ExactBlock

# Rebuilding a tile costs the same for any number of queries, the direct path's products grow with them. Measured on
# SmolLM2's shapes (benchmarks/attention_paths.py); see there for the crossing.
DIRECT_QUERY_LENGTH = 64
_TILE_TOKENS = 1024


def attend(query: Tensor, blocks: Sequence[Block], mask: Tensor | None, options: ScoreOptions) -> Tensor:
    """Attention of ``query [B, num_attention_heads, Q, D]`` over ``blocks``, answered in the query's dtype.

    ``mask`` is ``[B or 1, 1, Q, kv_length]`` in the order of ``blocks``, bool or additive, or None for no mask at all.
    """
    pieces = blocks if query.shape[2] <= DIRECT_QUERY_LENGTH else rebuilt_tiles(blocks)
    return direct.attend(query, pieces, mask, options).to(query.dtype)


def rebuilt_tiles(blocks: Sequence[Block]) -> Iterator[Block]:
    """The same tokens as dense tiles, one at a time, so that the whole cache is never rebuilt at once."""
    for block in blocks:
        for tile in block.tiles(_TILE_TOKENS):
            yield ExactBlock(*tile.reconstruct())
