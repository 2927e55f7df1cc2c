"""Codes of different widths in bit planes, so that a component takes exactly its width in bits.

Tokens lie in tiles of 128. Within a tile, one component follows another; a component of width ``b`` takes ``b`` planes
of 16 bytes, the lowest bit first. So the data that attention reads at a time lies together, and new tiles are appended.

Components of keys are read four at a time, as quads: the first four of a head, the next four, and so on. The planes
that all four have lie together: for every 16 tokens, 8 bytes per plane, with the four bits of a token side by side. The
further planes of single components follow.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from unsloth_spectral.codec.config import GROUP_SIZE

TILE_TOKENS = GROUP_SIZE  # the tokens of a tile also share scales
PLANE_BYTES = TILE_TOKENS // 8
MAX_NBITS = 8
QUAD = 4
QUAD_TOKENS = 16  # tokens whose common planes of a quad lie together


def num_tiles(num_tokens: int) -> int:
    """The number of tiles for ``num_tokens`` tokens."""
    return -(-num_tokens // TILE_TOKENS)


def pack(codes: Tensor, widths: Sequence[int]) -> Tensor:
    """Pack ``codes [B, C, T]`` uint8 into planes ``[B, tiles, sum of widths, 16]`` uint8, without quads.

    ``widths [C]`` are 1 to 8; a code of width ``b`` is below ``2 ** b``. Tokens that fill up the last tile get code 0.
    """
    return _pack(codes, _Layout.of(tuple(widths), codes.device))


def unpack(planes: Tensor, widths: Sequence[int]) -> Tensor:
    """The inverse of ``pack``: ``[B, C, T]`` uint8, ``T`` a multiple of 128."""
    return _unpack(planes, _Layout.of(tuple(widths), planes.device))


def pack_quads(codes: Tensor, widths: Sequence[Sequence[int]]) -> Tensor:
    """``pack`` with quads; ``widths[head]`` are the falling widths of a head's components."""
    return _pack(codes, _Layout.of_quads(tuple(map(tuple, widths)), codes.device))


def unpack_quads(planes: Tensor, widths: Sequence[Sequence[int]]) -> Tensor:
    """The inverse of ``pack_quads``: ``[B, C, T]`` uint8, ``T`` a multiple of 128."""
    return _unpack(planes, _Layout.of_quads(tuple(map(tuple, widths)), planes.device))


class Place(NamedTuple):
    """The place of a component's planes; rows have 16 bytes and are counted over all components.

    Attributes:
        nbits: the component's planes.
        common: the number of planes that all components of its quad have.
        quad: the first row of these planes.
        lane: the component's place in the quad.
        single: the row of the first further plane.
    """

    nbits: int
    common: int
    quad: int
    lane: int
    single: int


def places_in_quads(widths: Sequence[Sequence[int]]) -> list[Place]:
    """The place of each component, head by head, in the order of ``pack_quads``."""
    return _places([head_widths[at : at + QUAD] for head_widths in widths for at in range(0, len(head_widths), QUAD)])


def _places(runs: Sequence[Sequence[int]]) -> list[Place]:
    places, row = [], 0
    for run in runs:
        common = min(run) if len(run) == QUAD else 0
        quad, row = row, row + QUAD * common
        for lane, nbits in enumerate(run):
            places.append(Place(nbits, common, quad, lane, row))
            row += nbits - common
    return places


class _Layout(NamedTuple):
    """The places of all planes; components and planes are counted over all heads.

    Attributes:
        num_components: the number of components.
        num_planes: the number of planes.
        shared: by number of common planes, the components of the quads that have so many, ``[n, 4]``, and the rows of
            these planes, ``[n * 4 * number]``.
        single: by bit, 0 the lowest, the components that have it in a further plane, ``[n]``, and the rows, ``[n]``.
    """

    num_components: int
    num_planes: int
    shared: dict[int, tuple[Tensor, Tensor]]
    single: dict[int, tuple[Tensor, Tensor]]

    @staticmethod
    @lru_cache(maxsize=256)
    def of(widths: tuple[int, ...], device: torch.device) -> "_Layout":
        return _Layout._from_places(_places([[nbits] for nbits in widths]), device)

    @staticmethod
    @lru_cache(maxsize=256)
    def of_quads(widths: tuple[tuple[int, ...], ...], device: torch.device) -> "_Layout":
        return _Layout._from_places(places_in_quads(widths), device)

    @staticmethod
    def _from_places(places: Sequence[Place], device: torch.device) -> "_Layout":
        shared: dict[int, tuple[list[int], list[int]]] = {}
        single: dict[int, tuple[list[int], list[int]]] = {}
        for component, place in enumerate(places):
            if place.common and not place.lane:
                components, rows = shared.setdefault(place.common, ([], []))
                components.append(component)
                rows.extend(range(place.quad, place.quad + QUAD * place.common))
            for plane in range(place.common, place.nbits):
                components, rows = single.setdefault(plane, ([], []))
                components.append(component)
                rows.append(place.single + plane - place.common)
        tensors = [
            {key: (_integers(first, device), _integers(rows, device)) for key, (first, rows) in places_by_key.items()}
            for places_by_key in (shared, single)
        ]
        quads = {
            key: (first[:, None] + torch.arange(QUAD, dtype=torch.int64, device=device), rows)
            for key, (first, rows) in tensors[0].items()
        }
        return _Layout(len(places), sum(place.nbits for place in places), quads, tensors[1])


def _pack(codes: Tensor, layout: _Layout) -> Tensor:
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % TILE_TOKENS)).unflatten(-1, (-1, TILE_TOKENS))
    batch, tiles = codes.shape[0], codes.shape[2]
    planes = codes.new_empty(batch, tiles, layout.num_planes, PLANE_BYTES)
    for count, (components, rows) in layout.shared.items():
        # [B, quad, tile, 16 tokens, plane, token and component]
        runs = codes[:, components].movedim(2, -1).unflatten(3, (-1, QUAD_TOKENS)).flatten(-2)
        shifts = torch.arange(count, dtype=torch.uint8, device=codes.device)[:, None]
        packed = _bytes(runs[..., None, :] >> shifts & 1)
        planes[:, :, rows] = packed.transpose(1, 2).reshape(batch, tiles, len(rows), PLANE_BYTES)
    for plane, (components, rows) in layout.single.items():
        planes[:, :, rows] = _bytes(codes[:, components] >> plane & 1).transpose(1, 2)
    return planes


def _unpack(planes: Tensor, layout: _Layout) -> Tensor:
    spread = _spread(planes.device)
    batch, tiles = planes.shape[:2]
    # Eight bits become one int64 with a byte each, so that one shift or sum handles all eight.
    lanes = torch.zeros(batch, layout.num_components, tiles, PLANE_BYTES, dtype=torch.int64, device=planes.device)
    for count, (components, rows) in layout.shared.items():
        shared_planes = planes[:, :, rows].reshape(batch, tiles, len(components), -1, count, PLANE_BYTES // 2)
        spread_planes = spread[shared_planes.int()]
        joined = spread_planes[..., 0, :]
        for plane in range(1, count):
            joined = joined | (spread_planes[..., plane, :] << plane)
        apart = joined.flatten(3).view(torch.uint8).unflatten(-1, (-1, QUAD)).movedim(-1, 3).contiguous()
        lanes[:, components] = apart.view(torch.int64).permute(0, 2, 3, 1, 4)
    for plane, (components, rows) in layout.single.items():
        lanes[:, components] |= spread[planes[:, :, rows].transpose(1, 2).int()] << plane
    return lanes.flatten(2).view(torch.uint8)


def _bytes(bits: Tensor) -> Tensor:
    """Pack ``bits`` (uint8, 0 or 1) into bytes along the last dimension, the lowest bit first."""
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def _integers(numbers: list[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=device)


@lru_cache
def _spread(device: torch.device) -> Tensor:
    """For each byte the int64 whose bytes are its bits."""
    numbers = torch.arange(256, dtype=torch.uint8, device=device)
    bits = (numbers[:, None] >> torch.arange(8, dtype=torch.uint8, device=device)) & 1
    return bits.view(torch.int64).flatten()
