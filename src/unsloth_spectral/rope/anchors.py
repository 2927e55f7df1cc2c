"""Anchors: the tokens whose rotations un-rotate keys, each those of the tokens of its tile.

The span of a pair of dimensions is the number of consecutive tokens that share an anchor; the first of them is the
anchor. Keys un-rotated by their anchors are nearly un-rotated, yet a query needs to be rotated only once per anchor,
and not once per key, to be compared with them.
"""

from itertools import groupby
from typing import TypeAlias

import torch
from torch import Tensor

from unsloth_spectral.rope.rotation import Rotation

# For each pair, how many tokens share an anchor; 0 for a pair without anchors.
Spans: TypeAlias = tuple[int, ...]

# Measured on SmolLM2 (docs/decisions.md): shorter spans, and other angles, hardly gain anything.
SPAN = 128
LARGEST_ANGLE = 8.0


def spans_of(rotation: Rotation | None) -> Spans:
    """``SPAN`` for each pair that rotates by ``LARGEST_ANGLE`` radians at most in so many tokens.

    It is 0 for pairs that rotate faster, and for all pairs of a rotation whose steps are unknown.
    """
    if rotation is None:
        return ()
    if rotation.step is None:
        return (0,) * rotation.num_pairs
    return tuple(SPAN if SPAN * step <= LARGEST_ANGLE else 0 for step in rotation.step.abs().tolist())


def own_anchors(rotation: Rotation | None) -> Spans:
    """Spans under which every token is its own anchor."""
    return () if rotation is None else (1,) * rotation.num_pairs


def anchors_of(rotation: Rotation, spans: Spans, interval: int = 1) -> Tensor:
    """The rotations of the anchors of every ``interval``-th token, ``[B or 1, n, P]`` complex64.

    They are 1 for pairs without anchors; the spans of the others are multiples of ``interval``.
    Anchors only rotate, even if ``rotation`` scales too.
    """
    table = rotation.table()
    num_rows = -(-rotation.num_tokens // interval)
    place, parts = 0, []
    for span, group in groupby(spans):
        count, stride = len(list(group)), max(span, interval)
        part = table[:, ::stride, place : place + count]
        part = part / part.abs() if span else torch.ones_like(part)
        parts.append(part.repeat_interleave(stride // interval, 1)[:, :num_rows] if stride > interval else part)
        place += count
    return torch.cat(parts, -1)
