"""Anchors: which tokens share them, and how keys are rotated by them."""

import pytest
import torch

from unsloth_spectral.rope import SPAN, Rotation, anchors_of, own_anchors, spans_of
from unsloth_spectral.rope.anchors import LARGEST_ANGLE

STEPS = torch.tensor([1.0, 0.2, 0.1, 0.05, 0.02, -0.015, 1e-4, 0.0], dtype=torch.float64)
PAIRS = len(STEPS)


def rotation_of(num_tokens: int, start: int = 7, scale: float = 1.0, steps: torch.Tensor = STEPS) -> Rotation:
    angles = (start + torch.arange(num_tokens, dtype=torch.float64))[:, None] * steps
    table = torch.polar(torch.full_like(angles, scale), angles).to(torch.complex64)[None]
    return Rotation.of(table, slice(0, len(steps)), slice(len(steps), 2 * len(steps)))


def test_pairs_that_stay_within_the_angle_for_a_tile_have_anchors() -> None:
    spans = spans_of(rotation_of(400))
    assert spans == (0, 0, 0, 128, 128, 128, 128, 128)
    assert spans == tuple(SPAN if SPAN * step <= LARGEST_ANGLE else 0 for step in STEPS.abs().tolist())


def test_without_known_steps_no_pair_has_anchors() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.polar(torch.ones(1, 40, 3), torch.rand(1, 40, 3, generator=generator))
    assert spans_of(Rotation.of(table, slice(0, 3), slice(3, 6))) == (0, 0, 0)
    assert spans_of(None) == own_anchors(None) == ()


@pytest.mark.parametrize("num_tokens", [1, 31, 32, 129, 300])
@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_tokens_have_the_rotation_of_the_first_in_their_span(num_tokens: int, scale: float) -> None:
    rotation = rotation_of(300, scale=scale).slice(0, num_tokens)
    spans = (0, 1, 32, 32, 64, 128, 64, 0)  # in any order
    anchors, table = anchors_of(rotation, spans), rotation.table() / scale
    assert anchors.shape == (1, num_tokens, PAIRS)
    for token in range(num_tokens):
        for pair, span in enumerate(spans):
            expected = table[0, token // span * span, pair] if span else torch.tensor(1 + 0j)
            assert abs(anchors[0, token, pair] - expected) < 1e-5


def test_a_slice_at_a_tile_has_the_anchors_it_had() -> None:
    rotation = rotation_of(500)
    spans = spans_of(rotation)
    whole = anchors_of(rotation, spans)
    for start, stop in ((128, 500), (256, 300), (384, 400)):
        part = anchors_of(rotation.slice(start, stop), spans)
        assert (part - whole[:, start:stop]).abs().max() < 1e-5


def test_every_token_can_be_its_own_anchor() -> None:
    rotation = rotation_of(100)
    assert (anchors_of(rotation, own_anchors(rotation)) - rotation.table()).abs().max() < 1e-6
