"""Codes of different widths in bit planes: eight tokens a byte, so that a width is exactly what it costs.

Components come first and tokens last, sorted by falling width; a component of width ``b`` has ``b`` planes, the lowest
bit first.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

TOKENS_PER_BYTE = 8
MAX_NBITS = 8


def pack(codes: Tensor, counts: Sequence[int]) -> Tensor:
    """Pack ``codes [B, C, T]`` uint8 into planes ``[B, sum of widths, T / 8]`` uint8.

    ``counts[b]`` components have width ``b``, 0 to 8, and come in falling order of width; ``T`` is a multiple of 8 and
    a code of width ``b`` is below ``2 ** b``.
    """
    weights = (1 << torch.arange(TOKENS_PER_BYTE, device=codes.device)).to(torch.uint8)
    planes, start = [], 0
    for nbits in range(MAX_NBITS, 0, -1):
        stop = start + counts[nbits]
        if stop == start:
            continue
        part = codes[:, start:stop, None] >> torch.arange(nbits, dtype=torch.uint8, device=codes.device)[:, None]
        bits = (part & 1).unflatten(-1, (-1, TOKENS_PER_BYTE))
        planes.append((bits * weights).sum(-1, dtype=torch.uint8).flatten(1, 2))
        start = stop
    if not planes:
        return codes.new_empty(codes.shape[0], 0, codes.shape[-1] // TOKENS_PER_BYTE)
    return torch.cat(planes, dim=1)


def unpack(planes: Tensor, counts: Sequence[int]) -> Tensor:
    """The inverse of ``pack``: ``[B, C, T]`` uint8, where ``C`` leaves out components of width 0."""
    spread = _spread(planes.device)
    parts, start = [], 0
    for nbits in range(MAX_NBITS, 0, -1):
        if not counts[nbits]:
            continue
        stop = start + counts[nbits] * nbits
        # Eight tokens lie in one int64, a byte each, so that one shift or sum serves all eight.
        lanes = spread[planes[:, start:stop].unflatten(1, (-1, nbits)).int()]
        codes = lanes[:, :, 0]
        for plane in range(1, nbits):
            codes = codes | (lanes[:, :, plane] << plane)
        parts.append(codes)
        start = stop
    if not parts:
        return planes.new_empty(planes.shape[0], 0, planes.shape[-1] * TOKENS_PER_BYTE)
    return torch.cat(parts, dim=1).view(torch.uint8)


@lru_cache
def _spread(device: torch.device) -> Tensor:
    """For each byte the int64 whose bytes are its bits."""
    bits = (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1
    return bits.to(torch.uint8).view(torch.int64).flatten()
