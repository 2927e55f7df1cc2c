"""Codes of different widths as streams of bits, so that a width is exactly what it costs.

Tokens come in tiles of 128; within a tile component follows component, a component of width ``b`` as ``16 b`` bytes:
the bits of one token behind those of another, lowest first. So what attention reads at a time lies together, and grows
at its end. A component's stream runs on from tile to tile. What it goes on from before the first tile, the last byte of
what comes before, is kept apart: its carry.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np
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


def last_bytes(streams: Tensor, carries: Tensor, widths: Sequence[int], num_tokens: int) -> Tensor:
    """The bytes ``[B, C]`` uint8 that streams go on from behind their first ``num_tokens``, a multiple of 8."""
    if not num_tokens:
        return carries
    tile, within = (num_tokens - 1) // TILE_TOKENS, (num_tokens - 1) % TILE_TOKENS + 1
    return streams[:, tile].flatten(1)[:, _last_places(tuple(widths), within, streams.device)]


def filled(streams: Tensor, later: Tensor, widths: Sequence[int], start: int, count: int) -> Tensor:
    """``streams [B, tiles, rows, 16]`` whose last tile has ``start`` tokens, and behind these ``count`` more, which are
    the first ones of ``later [B, 1, rows, 16]``; both numbers are multiples of 8, and the tile has room."""
    together = streams.clone()
    to, by = _first_places(tuple(widths), start, count, streams.device)
    together[:, -1].flatten(1)[:, to] = later[:, 0].flatten(1)[:, by]
    return together


@lru_cache(maxsize=256)
def _first_places(widths: tuple[int, ...], start: int, count: int, device: torch.device) -> Tensor:
    """``[2, n]`` int64, places within a tile: those of the bytes of each component's ``count`` tokens from ``start``
    on, and those of its first ``count`` tokens."""
    nbits = np.array(widths, dtype=np.int64)
    begins, lengths = (nbits.cumsum() - nbits) * ROW_BYTES, count * nbits // 8
    firsts = begins.repeat(lengths) + np.arange(lengths.sum()) - (lengths.cumsum() - lengths).repeat(lengths)
    places = np.stack([firsts + (start * nbits // 8).repeat(lengths), firsts])
    return torch.from_numpy(places).to(device)


@lru_cache(maxsize=256)
def _last_places(widths: tuple[int, ...], num_tokens: int, device: torch.device) -> Tensor:
    """``[C]`` int64, places within a tile of the last bytes of each component's first ``num_tokens``."""
    firsts = (last - nbits for last, nbits in zip(accumulate(widths), widths, strict=True))
    places = [first * ROW_BYTES + num_tokens * nbits // 8 - 1 for first, nbits in zip(firsts, widths, strict=True)]
    return torch.tensor(places, dtype=torch.int64, device=device)


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
