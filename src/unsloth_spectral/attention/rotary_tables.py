"""Cosines and sines of the rotary angles within a tile, and the few waves that represent them.

They depend only on the angle from token to token, so all layers and blocks of a model share them.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from unsloth_spectral.codec.spectral.packing import TILE_TOKENS
from unsloth_spectral.native.abi import FULL_WAVE, MAX_SMOOTH

# Pairs that rotate by fewer radians than this within a tile are slow: a few smooth functions, at most as many as the
# compiled kernel has room for, represent their cosines and sines to a millionth.
_SLOW_ANGLE = 4.0
_NEGLIGIBLE = 1e-6


class WaveTables(NamedTuple):
    """The angles within a tile as the compiled kernel reads them.

    Attributes:
        order: ``[P]`` int64, the pairs, the fastest first; all other tables are in this order.
        step: ``[P]`` float64, angle from a token to the next.
        tile_step: ``[2, P]`` float64, cosine and sine of the angle from a tile to the next.
        num_fast: pairs that rotate far in a tile.
        num_waves: one wave for each fast pair, and one for every two smooth functions.
        waves: ``[num_waves, 128, 2]`` int16, 32767 for 1: cosine and sine of the fast pairs, then the smooth functions.
        mixing: ``[2, P - num_fast, 16]`` float32, weights of the smooth functions in the slow pairs' cosines and sines.
        reach: ``[P - num_fast, 16]`` float32, the largest weight of each smooth function in a pair of length 1.
    """

    order: Tensor
    step: Tensor
    tile_step: Tensor
    num_fast: int
    num_waves: int
    waves: Tensor
    mixing: Tensor
    reach: Tensor


def wave_tables(step: Tensor) -> WaveTables:
    """The compiled kernel's tables for pairs whose angles grow by ``step [P]`` from a token to the next."""
    return _wave_tables(_as_bytes(step))


def cosines_and_sines(step: Tensor) -> tuple[Tensor, Tensor]:
    """``[P, 128]`` float32 each, of the angles within a tile; on the device and in the order of ``step [P]``."""
    return _cosines_and_sines(_as_bytes(step), step.device)


def _as_bytes(step: Tensor) -> bytes:
    return step.double().contiguous().cpu().numpy().tobytes()


def _from_bytes(steps: bytes) -> Tensor:
    return torch.frombuffer(bytearray(steps), dtype=torch.float64)


@lru_cache(maxsize=8)
def _cosines_and_sines(steps: bytes, device: torch.device) -> tuple[Tensor, Tensor]:
    within, _ = _within_tile(_from_bytes(steps))
    cosines, sines = (table.float().to(device) for table in within)
    return cosines, sines


@lru_cache(maxsize=8)
def _wave_tables(steps: bytes) -> WaveTables:
    step = _from_bytes(steps)
    order = step.abs().argsort(descending=True, stable=True)
    step = step[order].contiguous()
    within, tile_step = _within_tile(step)
    num_fast = int((step.abs() * TILE_TOKENS > _SLOW_ANGLE).sum())
    smooth, mixing = _smooth_functions(within[:, num_fast:])
    fast = within[:, :num_fast].transpose(0, 1)
    by_twos = torch.nn.functional.pad(smooth, (0, 0, 0, len(smooth) % 2)).unflatten(0, (-1, 2))
    waves = (torch.cat([fast, by_twos]).mT * FULL_WAVE).round().to(torch.int16).contiguous()
    reach = mixing.norm(dim=0)
    return WaveTables(order, step, tile_step, num_fast, len(waves), waves, mixing, reach)


def _within_tile(step: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, both float64: of the angles within a tile, ``[2, P, 128]``, and of the angle
    from a tile to the next, ``[2, P]``."""
    angles = step[:, None] * torch.arange(TILE_TOKENS + 1, dtype=torch.float64, device="cpu")
    within, tile_step = angles[:, :-1], angles[:, -1]
    return torch.stack([within.cos(), within.sin()]), torch.stack([tile_step.cos(), tile_step.sin()])


def _smooth_functions(slow: Tensor) -> tuple[Tensor, Tensor]:
    """The principal rows of ``slow [2, S, 128]``, each scaled to a peak of 1, and ``[2, S, 16]`` float32, the
    weight of each in the rows of ``slow``."""
    left, values, right = torch.linalg.svd(slow.flatten(0, 1), full_matrices=False)
    count = min(MAX_SMOOTH, int((values > _NEGLIGIBLE * TILE_TOKENS**0.5).sum()))
    peaks = right[:count].abs().amax(-1)
    mixing = torch.zeros(*slow.shape[:2], MAX_SMOOTH, dtype=torch.float32, device="cpu")
    mixing[..., :count] = (left * values)[:, :count].mul(peaks).unflatten(0, slow.shape[:2])
    return right[:count] / peaks[:, None], mixing
