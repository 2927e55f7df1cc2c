"""The choice of an attention path for each call."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unsloth_spectral.attention import cpu, direct, gpu
from unsloth_spectral.attention.scores import ScoreOptions
from unsloth_spectral.autocast import no_autocast
from unsloth_spectral.codec.block import Block, ExactBlock
from unsloth_spectral.native import library

# Rebuilding a tile costs the same for any number of queries; the direct path's products grow with it. The two take
# equal time at 16 queries on SmolLM2's shapes and between 32 and 64 on Llama-3-8B's (benchmarks/attention_paths.py).
DIRECT_QUERY_LENGTH = 32
# The compiled kernel is 2.5 to 4.5 times as fast as rebuilding at 256 queries (benchmarks/attention_paths.py), with
# AVX-512; where it is built for less, the gain is smaller.
NATIVE_QUERY_LENGTH = 256
_REBUILT_TOKENS = 1024  # at a time, on the "tiles" path


@dataclass(frozen=True, slots=True)
class AttentionPath:
    """A way to attend, what it serves, and why it is not available here (None where it is)."""

    name: str
    serves: str
    obstacle: str | None = None


def available_paths() -> tuple[AttentionPath, ...]:
    """Every attention path of this version, with the reason where a path cannot run here."""
    return (
        AttentionPath("dense", "prefill and contexts too short to seal: torch's SDPA on exact tensors"),
        AttentionPath("direct", f"up to {DIRECT_QUERY_LENGTH} queries at a time: torch products on the stored codes"),
        AttentionPath("tiles", f"more queries: blocks rebuilt {_REBUILT_TOKENS:,} tokens at a time"),
        AttentionPath(
            "native",
            f"up to {NATIVE_QUERY_LENGTH} queries at a time on a CPU: a compiled kernel on the spectral codec's codes"
            + (f" ({library.chosen()})" if library.chosen() else ""),
            library.obstacle(),
        ),
        AttentionPath(
            "triton",
            f"up to {DIRECT_QUERY_LENGTH} queries at a time on a GPU: compiled kernels on the spectral codec's codes",
            gpu.missing(),
        ),
    )


def attend(query: Tensor, blocks: Sequence[Block], mask: Tensor | None, options: ScoreOptions) -> Tensor:
    """Attention of ``query [B, num_attention_heads, Q, D]`` over ``blocks``, in the query's dtype.

    ``mask`` is ``[B or 1, 1, Q, kv_length]`` in the order of ``blocks``, bool or additive, or None for no mask at all.
    """
    with no_autocast(query.device):
        if query.shape[2] <= NATIVE_QUERY_LENGTH and cpu.obstacle(query, blocks) is None:
            return cpu.attend(query, blocks, mask, options).to(query.dtype)
        if query.shape[2] > DIRECT_QUERY_LENGTH:
            return direct.attend(query, rebuilt_tiles(blocks), mask, options).to(query.dtype)
        if gpu.obstacle(query, blocks) is None:
            try:
                return gpu.attend(query, blocks, mask, options).to(query.dtype)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a compiler may raise anything on an untested card
                gpu.give_up(query.device, error)
        return direct.attend(query, blocks, mask, options).to(query.dtype)


def rebuilt_tiles(blocks: Sequence[Block]) -> Iterator[Block]:
    """The same tokens as dense tiles, one at a time, so that the whole cache is never rebuilt at once."""
    for block in blocks:
        for tile in block.tiles(_REBUILT_TOKENS):
            yield ExactBlock(*tile.reconstruct())
