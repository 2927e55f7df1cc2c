"""Codes of different widths as streams of bits, so that a width is exactly what it costs.

Tokens come in tiles of 128; within a tile component follows component, a component of width ``b`` as ``16 b`` bytes:
the bits of one token behind those of another, lowest first. So what attention reads at a time lies together, and grows
at its end. A component's stream runs on from tile to tile. What it goes on from before the first tile, the last byte of
what comes before, is kept apart: its carry.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from unsloth_spectral.codec.config import GROUP_SIZE

TILE_TOKENS = GROUP_SIZE  # a tile's tokens share scales too
ROW_BYTES = TILE_TOKENS // 8  # bytes of a tile that one bit of a component's takes
MAX_NBITS = 8


def num_tiles(num_tokens: int) -> int:
    """Tiles that hold ``num_tokens``."""
    return -(-num_tokens // TILE_TOKENS)


def pack(codes: Tensor, widths: Sequence[int]) -> Tensor:
    """Pack ``codes [B, C, T]`` uint8 into streams ``[B, tiles, sum of widths, 16]`` uint8.

    ``widths [C]`` are 1 to 8; a code of width ``b`` is below ``2 ** b``. Tokens that fill up the last tile get code 0.
    """
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % TILE_TOKENS)).unflatten(-1, (-1, TILE_TOKENS))
    batch, _, tiles, _ = codes.shape
    streams = codes.new_empty(batch, tiles, sum(widths), ROW_BYTES)
    for nbits, (components, rows) in _places(tuple(widths), codes.device).items():
        shifts = torch.arange(nbits, dtype=torch.uint8, device=codes.device)
        bits = (codes[:, components].transpose(1, 2)[..., None] >> shifts & 1).flatten(-2)
        weights = 1 << torch.arange(8, dtype=torch.uint8, device=codes.device)
        packed = (bits.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)
        streams[:, :, rows] = packed.reshape(batch, tiles, len(rows), ROW_BYTES)
    return streams


def unpack(streams: Tensor, carries: Tensor, widths: Sequence[int]) -> Tensor:
    """The windows of ``streams``, ``[B, C, T]`` uint8, ``T`` a multiple of 128: of each token the last 8 bits up to its
    own, the newest the highest.

    ``carries [B, C]`` uint8 are the bytes before the first tile.
    """
    batch, tiles = streams.shape[:2]
    windows = streams.new_empty(batch, len(widths), tiles, TILE_TOKENS)
    for nbits, (components, rows) in _places(tuple(widths), streams.device).items():
        own = streams[:, :, rows].reshape(batch, tiles, len(components), -1).transpose(1, 2)
        before = torch.cat([carries[:, components, None], own[:, :, :-1, -1]], 2)[..., None]
        # A byte behind the last, for the last window, which takes no bit of it.
        run = torch.cat([before, own, before], -1).to(torch.int32)
        ends = (torch.arange(TILE_TOKENS, dtype=torch.int64, device=streams.device) + 1) * nbits
        pairs = run[..., ends // 8] | run[..., ends // 8 + 1] << 8
        windows[:, components] = (pairs >> ends % 8 & 255).to(torch.uint8)
    return windows.flatten(2)


def last_bytes(streams: Tensor, carries: Tensor, widths: Sequence[int], tiles: int) -> Tensor:
    """The bytes ``[B, C]`` uint8 that streams go on from behind their first ``tiles``."""
    if not tiles:
        return carries
    ends = torch.tensor(widths, dtype=torch.int64, device=streams.device).cumsum(0) - 1
    return streams[:, tiles - 1, ends, -1]


@lru_cache(maxsize=256)
def _places(widths: tuple[int, ...], device: torch.device) -> dict[int, tuple[Tensor, Tensor]]:
    """For each width its components, ``[n]``, and their rows of 16 bytes, ``[n * width]``, both int64."""
    components: dict[int, list[int]] = {}
    rows: dict[int, list[int]] = {}
    first = 0
    for component, nbits in enumerate(widths):
        components.setdefault(nbits, []).append(component)
        rows.setdefault(nbits, []).extend(range(first, first + nbits))
        first += nbits
    return {
        nbits: (
            torch.tensor(components[nbits], dtype=torch.int64, device=device),
            torch.tensor(rows[nbits], dtype=torch.int64, device=device),
        )
        for nbits in components
    }
