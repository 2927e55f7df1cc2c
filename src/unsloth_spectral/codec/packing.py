"""Codes of different widths in bit planes, so that a width is exactly what it costs.

Tokens come in tiles of 128; within a tile component follows component, a component of width ``b`` as ``b`` planes of
16 bytes, the lowest bit first. So what attention reads at a time lies together, and grows at its end.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from unsloth_spectral.codec.config import GROUP_SIZE

TILE_TOKENS = GROUP_SIZE  # a tile's tokens share scales too
PLANE_BYTES = TILE_TOKENS // 8
MAX_NBITS = 8


class _Group(NamedTuple):
    """Components of one width.

    Attributes:
        nbits: the width.
        components: ``[n]`` int64, their places.
        rows: ``[n * nbits]`` int64, the places of their planes.
    """

    nbits: int
    components: Tensor
    rows: Tensor


def num_tiles(num_tokens: int) -> int:
    """Tiles that hold ``num_tokens``."""
    return -(-num_tokens // TILE_TOKENS)


def pack(codes: Tensor, widths: Sequence[int]) -> Tensor:
    """Pack ``codes [B, C, T]`` uint8 into planes ``[B, tiles, sum of widths, 16]`` uint8.

    ``widths [C]`` are 1 to 8; a code of width ``b`` is below ``2 ** b``. Tokens that fill up the last tile get code 0.
    """
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % TILE_TOKENS)).unflatten(-1, (-1, PLANE_BYTES, 8))
    weights = (1 << torch.arange(8, device=codes.device)).to(torch.uint8)
    planes = codes.new_empty(codes.shape[0], codes.shape[2], sum(widths), PLANE_BYTES)
    for nbits, components, rows in _groups(tuple(widths), codes.device):
        shifts = torch.arange(nbits, dtype=torch.uint8, device=codes.device).view(-1, 1, 1, 1)
        packed = ((codes[:, components, None] >> shifts & 1) * weights).sum(-1, dtype=torch.uint8)
        planes[:, :, rows] = packed.flatten(1, 2).transpose(1, 2)
    return planes


def unpack(planes: Tensor, widths: Sequence[int]) -> Tensor:
    """The inverse of ``pack``: ``[B, C, T]`` uint8, ``T`` a multiple of 128."""
    spread = _spread(planes.device)
    batch, tiles = planes.shape[:2]
    lanes = torch.empty(batch, len(widths), tiles, PLANE_BYTES, dtype=torch.int64, device=planes.device)
    for nbits, components, rows in _groups(tuple(widths), planes.device):
        # Eight tokens lie in one int64, a byte each, so that one shift or sum serves all eight.
        part = spread[planes[:, :, rows].transpose(1, 2).unflatten(1, (-1, nbits)).int()]
        found = part[:, :, 0]
        for plane in range(1, nbits):
            found = found | (part[:, :, plane] << plane)
        lanes[:, components] = found
    return lanes.flatten(2).view(torch.uint8)


@lru_cache(maxsize=256)
def _groups(widths: tuple[int, ...], device: torch.device) -> list[_Group]:
    """The components by width, falling."""
    nbits = torch.tensor(widths, dtype=torch.int64)
    starts = nbits.cumsum(0) - nbits
    groups = []
    for width in sorted(set(widths), reverse=True):
        components = (nbits == width).nonzero()[:, 0]
        rows = (starts[components, None] + torch.arange(width)).flatten()
        groups.append(_Group(width, components.to(device), rows.to(device)))
    return groups


@lru_cache
def _spread(device: torch.device) -> Tensor:
    """For each byte the int64 whose bytes are its bits."""
    bits = (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1
    return bits.to(torch.uint8).view(torch.int64).flatten()
