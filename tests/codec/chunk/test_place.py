"""Where a chunk stands in its text."""

import pytest
import torch

from unsloth_spectral.codec.chunk.place import LONGEST_TEXT, number_of_chunk
from unsloth_spectral.codec.chunk.rotations import rotation_at, steps_of
from unsloth_spectral.rope import rotate

LAYERS, HEADS, DIM = 2, 3, 64
MEANS = torch.randn(LAYERS, HEADS, DIM, generator=torch.Generator().manual_seed(0))


def seen(number: int, tokens: int, noise: float = 0.0) -> torch.Tensor:
    """The mean of a chunk's keys, un-rotated by their places within it."""
    rotation = rotation_at(steps_of(DIM, 10_000.0), tokens, number * tokens)
    mean = rotate(MEANS[:, :, None], rotation.start, rotation)[:, :, 0]
    return mean + noise * torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tokens", [256, 257, 1024])
def test_every_place_is_found(tokens: int) -> None:
    local = rotation_at(steps_of(DIM, 10_000.0), tokens)
    for number in (0, 1, 2, 63, 511, LONGEST_TEXT // tokens - 1):
        for noise in (0.0, 0.5):
            found, may_be_first = number_of_chunk(seen(number, tokens, noise), MEANS, local)
            assert found == number
            assert may_be_first == (number == 0)


def test_a_chunk_that_fits_nowhere_may_be_the_first() -> None:
    local = rotation_at(steps_of(DIM, 10_000.0), 256)
    assert number_of_chunk(torch.zeros_like(MEANS), MEANS, local) == (0, True)
