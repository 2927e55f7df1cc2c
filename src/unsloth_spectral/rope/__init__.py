"""Rotary position embeddings as complex numbers, one per token and pair of dimensions (Su et al., "RoFormer", 2021)."""

from unsloth_spectral.rope.anchors import SPAN, Spans, anchors_of, own_anchors, spans_of
from unsloth_spectral.rope.fit import Claim
from unsloth_spectral.rope.interned import interned
from unsloth_spectral.rope.joining import join_in_kind, join_rotations
from unsloth_spectral.rope.rotating import minus_rotated, rotate, unrotate, unrotated_sum
from unsloth_spectral.rope.rotation import Dims, Rotation

__all__ = [
    "SPAN",
    "Claim",
    "Dims",
    "Rotation",
    "Spans",
    "anchors_of",
    "interned",
    "join_in_kind",
    "join_rotations",
    "minus_rotated",
    "own_anchors",
    "rotate",
    "spans_of",
    "unrotate",
    "unrotated_sum",
]
