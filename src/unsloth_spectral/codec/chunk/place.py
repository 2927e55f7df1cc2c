"""Where in its text a chunk stands, found from the mean of its keys.

The mean of keys that are un-rotated by their places within the chunk is the mean of un-rotated keys, rotated by the
chunk's own place. Means of un-rotated keys are nearly the same in all texts, so the rotation between a chunk's mean and
the model's tells the place. Fast pairs tell it exactly, but are ambiguous; slow ones tell it roughly.
"""

from functools import lru_cache

import torch
from torch import Tensor

from unsloth_spectral.rope import Rotation

LONGEST_TEXT = 1 << 20  # tokens in which the place is looked for
# How far the place of least difference has to fit better than the text's beginning, as a cosine.
_CLEARLY = 0.1


def number_of_chunk(mean: Tensor, expected: Tensor, local: Rotation) -> tuple[int, bool]:
    """How many chunks of ``local.num_tokens`` come before this one, and whether it may be the first of its text.

    The phases of all pairs count alike: the place has the largest sum of cosines of what they differ by.

    Args:
        mean: ``[L, H, D]`` float32, of keys un-rotated by ``local``.
        expected: ``[L, H, D]`` float32, the model's mean of un-rotated keys.
        local: the rotation of the tokens of a text's first chunk.
    """
    assert local.step is not None
    of_pairs = (_phases(mean, local) * _phases(expected, local).conj()).flatten(0, -2).mean(0)
    cosines = (_rotations(local.step, local.num_tokens) * of_pairs).real.mean(-1)
    number = int(cosines.argmax())
    return number, float(cosines[number] - cosines[0]) < _CLEARLY


def _phases(x: Tensor, rotation: Rotation) -> Tensor:
    """``[..., P]`` complex64 of size 1, or 0."""
    pairs = torch.complex(x[..., rotation.first], x[..., rotation.second])
    return pairs.sgn()


@lru_cache(maxsize=8)
def _rotations(step: Tensor, num_tokens: int) -> Tensor:
    """``[places, P]`` complex64: what un-rotates the first token of each chunk."""
    places = torch.arange(0, LONGEST_TEXT, num_tokens, dtype=torch.float64, device="cpu")
    angles = places[:, None] * step
    return torch.polar(torch.ones_like(angles), -angles).to(torch.complex64)
