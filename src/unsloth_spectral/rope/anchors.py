"""Anchors: tokens by whose rotation they and the tokens behind them are un-rotated.

Each pair of dimensions has a span. So many consecutive tokens, counted from the first one, share the rotation of the
first among them, their anchor. Keys un-rotated by their anchors are nearly un-rotated, yet a query needs to be rotated
only once per anchor, and not once per key, to be compared with them.
"""

from itertools import groupby
from typing import TypeAlias

import torch
from torch import Tensor

from unsloth_spectral.rope.rotation import Rotation

# For each pair, how many tokens share an anchor; 0 for a pair without anchors.
Spans: TypeAlias = tuple[int, ...]

# Measured on SmolLM2 (docs/decisions.md): shorter spans, and smaller angles, hardly gain anything.
SPANS = (128, 64, 32)
LARGEST_ANGLE = 4.0


def spans_of(rotation: Rotation | None) -> Spans:
    """For each pair, the longest of ``SPANS`` in which it rotates by ``LARGEST_ANGLE`` radians at most.

    It is 0 for pairs that rotate faster, and for all pairs of a rotation whose steps are unknown.
    """
    if rotation is None:
        return ()
    if rotation.step is None:
        return (0,) * rotation.num_pairs
    steps = rotation.step.abs().tolist()
    return tuple(next((span for span in SPANS if span * step <= LARGEST_ANGLE), 0) for step in steps)


def own_anchors(rotation: Rotation | None) -> Spans:
    """Spans under which every token is its own anchor."""
    return () if rotation is None else (1,) * rotation.num_pairs


def anchors_of(rotation: Rotation, spans: Spans) -> Tensor:
    """The rotations of the tokens' anchors, ``[B or 1, num_tokens, P]`` complex64; 1 for pairs without anchors.

    They only rotate, even if ``rotation`` scales too.
    """
    table = rotation.table()
    place, parts = 0, []
    for span, group in groupby(spans):
        count = len(list(group))
        part = table[:, :: max(1, span), place : place + count]
        part = part / part.abs() if span else torch.ones_like(part)
        parts.append(part.repeat_interleave(span, 1)[:, : table.shape[1]] if span > 1 else part)
        place += count
    return torch.cat(parts, -1)
