"""Joining the rotations of tokens from several passes."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeAlias
from weakref import ref

import torch
from torch import Tensor

from unsloth_spectral.rope.places import Places
from unsloth_spectral.rope.rotation import MOST_KEPT_BYTES, Rotation, all_rows, by_pair

# A layer joins pieces when its residual grows, when a block is made of it, and when that block joins another.
_MOST_REMEMBERED = 8

_Remembered: TypeAlias = tuple["_Described", Callable[[], Rotation | None]]


class _Last(threading.local):
    """The most recent joins, because all layers of a model join the same pieces."""

    joined: tuple[_Remembered, ...] = ()


_last = _Last()


def join_rotations(pieces: Sequence[Rotation]) -> Rotation:
    """The rotations of all ``pieces``, one after another.

    A call with the pieces of a recent call returns the same object, so that all layers share it.
    """
    described = _Described(pieces)
    for earlier, remembered in _last.joined:
        rotation = remembered()
        if rotation is not None and described.is_same(earlier):
            return rotation
    joined = _by_places(pieces)
    if joined is None:
        rows = max(1 if piece.rows is None else len(piece.rows) for piece in pieces)
        tables = [piece.table().expand(rows, -1, -1) for piece in pieces]
        joined = Rotation.of(torch.cat(tables, dim=1), pieces[0].first, pieces[0].second)
    # A small one is kept alive: it may be freed before the next layer asks, if it is a piece of a further join.
    is_small = sum(tensor.nbytes for tensor in joined.tensors) <= MOST_KEPT_BYTES
    reference = partial(_itself, joined) if is_small else ref(joined)
    _last.joined = (*_last.joined[1 - _MOST_REMEMBERED :], (described, reference))
    return joined


def join_in_kind(last: Rotation, new: Rotation) -> Rotation | None:
    """``last`` followed by ``new``, if the result is even or both are tables; else None.

    Blocks join only if their rotations do. So even blocks stay readable for the kernels, and integer places stay those
    of one pass, which other layers share.
    """
    joined = join_rotations([last, new])
    return joined if joined.is_even or (last.step is None and new.step is None) else None


class _Described:
    """A description of joined pieces, which does not keep them alive."""

    def __init__(self, pieces: Sequence[Rotation]) -> None:
        self._numbers = [
            (p.num_tokens, p.offset, p.places.first, p.axes, len(p.tensors), *map(_slice_of, (p.first, p.second)))
            for p in pieces
        ]
        tensors = [tensor for p in pieces for tensor in (*p.tensors, p.first, p.second) if isinstance(tensor, Tensor)]
        self._tensors = [ref(tensor) for tensor in tensors]

    def is_same(self, other: "_Described") -> bool:
        if self._numbers != other._numbers:
            return False
        pairs = zip(self._tensors, other._tensors, strict=True)
        return all(mine() is theirs() is not None for mine, theirs in pairs)


def _by_places(pieces: Sequence[Rotation]) -> Rotation | None:
    """The rotations of all ``pieces`` by their places; None if they differ in kind."""
    leader = pieces[0]
    for piece in pieces:
        if piece.step is None or leader.step is None:
            return None
        if not _equal(piece.step, leader.step) or not _equal(piece.unit, leader.unit):
            return None
    has_units_by_row = len(leader.unit) > 1
    if has_units_by_row and any(piece.rows is not leader.rows for piece in pieces):
        return None
    numbers = []
    for piece in pieces:
        places = piece.places.numbers(piece.offset, piece.offset + piece.num_tokens)
        numbers.append(places if piece.rows is None or has_units_by_row else places[piece.rows.cpu()])
    axes = _common_axes(pieces, numbers)
    if axes is None and any(piece.axes is not None for piece in pieces):
        return None
    most = [max(sizes) for sizes in zip(*(places.shape[:2] for places in numbers), strict=True)]
    joined = Places.of(torch.cat([places.expand(*most, -1) for places in numbers], -1))
    rows = leader.rows if has_units_by_row else all_rows(joined.num_rows, leader.unit.device)
    num_tokens = sum(piece.num_tokens for piece in pieces)
    return replace(leader, num_tokens=num_tokens, places=joined, axes=axes, rows=rows, offset=0)


def _common_axes(pieces: Sequence[Rotation], numbers: Sequence[Tensor]) -> tuple[int, ...] | None:
    """The axes of one piece that give every other piece the same rotations as its own axes; None if there are none.

    If the places along two axes are equal, a piece may have either.
    """
    for candidate in pieces:
        if all(_is_alike(places, piece.axes, candidate.axes) for places, piece in zip(numbers, pieces, strict=True)):
            return candidate.axes
    return None


def _is_alike(numbers: Tensor, axes: tuple[int, ...] | None, others: tuple[int, ...] | None) -> bool:
    return axes == others or bool((by_pair(numbers, axes) == by_pair(numbers, others)).all())


def _equal(first: Tensor, second: Tensor) -> bool:
    return first is second or (first.device == second.device and torch.equal(first, second))


def _slice_of(dims: slice | Tensor) -> slice | None:
    return dims if isinstance(dims, slice) else None


def _itself(rotation: Rotation) -> Rotation:
    return rotation
