"""Compact forms of a table of rotations: even steps, or known frequencies at integer places."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from unsloth_spectral.rope.places import LARGEST, Places

# Models round their tables, to bfloat16 (.004 of a pair's length) in the worst case. That does no harm: keys are read
# with the same rotation they were written with.
_ROUNDING = 5e-3
# Rounding the frequency and the product makes a float32 angle wrong by up to 2^-23 of its size.
_ANGLE_ROUNDING = 2.0**-23
# Tolerance for angles at unknown places, as a share of the step from token to token. Rounding reaches .125 at two
# million tokens, and a missing or repeated token gives .25 or more.
_STEP_ROUNDING = 0.15
_DRIFT = 1e-7  # error of a sum of steps, per token
_TOKENS_AT_ONCE = 8192


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """A hypothesis about a table of rotations: that it is ``unit * exp(i * step * numbers)``.

    Attributes:
        numbers: ``[B or 1, A, n]`` int64 on the CPU, the places of the tokens along each axis.
        unit: ``[1, 1, P]`` complex64, the rotation of place 0.
        step: ``[P]`` float64, the frequencies.
    """

    numbers: Tensor
    unit: Tensor
    step: Tensor


def at_places(table: Tensor, claim: Claim, padding: Tensor | None) -> tuple[Places, tuple[int, ...]] | None:
    """The places of ``table [B or 1, n, P]`` and the axis of each pair, if ``claim`` reproduces it; else None.

    The first ``padding [B]`` tokens of each row may have any place: they get the places before the others.
    """
    num_tokens = table.shape[1]
    if claim.numbers.shape[-1] != num_tokens or claim.step.shape != table.shape[2:]:
        return None
    numbers = claim.numbers if padding is None else _before_the_text(claim.numbers, padding)
    reach = int(numbers.abs().max())
    if reach > LARGEST:
        return None
    if bool((numbers == numbers[:, :1]).all()):
        numbers = numbers[:, :1]
    errors = torch.zeros(numbers.shape[1], table.shape[2], dtype=torch.float32, device=table.device)
    for start in range(0, num_tokens, _TOKENS_AT_ONCE):
        stop = min(start + _TOKENS_AT_ONCE, num_tokens)
        real = _real(padding, start, stop, table.device)
        for axis in range(numbers.shape[1]):
            angle = numbers[:, axis, start:stop, None].to(table.device, torch.float64) * claim.step
            rotations = claim.unit * torch.polar(torch.ones_like(angle), angle).to(claim.unit.dtype)
            error = (rotations - table[:, start:stop]).abs()
            error = error if real is None else error.masked_fill(~real, 0.0)
            errors[axis] = torch.maximum(errors[axis], error.amax((0, 1)))
    error, axes = errors.min(0)
    tolerance = (_ROUNDING + _ANGLE_ROUNDING * reach * claim.step.abs()) * claim.unit.abs().max()
    if not bool((error <= tolerance).all()):
        return None
    return Places.of(numbers), tuple(axes.tolist())


def evenly(table: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """``start [B or 1, 1, P]`` complex64 and ``step [P]`` float64, if ``table [B or 1, n, P]`` rotates by one step
    from token to token; else None.

    The first ``padding [B]`` tokens of each row may have any rotation.
    """
    num_tokens = table.shape[1]
    if padding is not None and len(table) == 1:
        padding = padding.min(0, keepdim=True).values
    row, free = (0, 0) if padding is None else (int(padding.argmin()), int(padding.min()))
    if num_tokens - free < 3:
        return None
    step = _angle_step(table[row : row + 1, free:])
    angle = torch.arange(num_tokens, dtype=torch.float64, device=table.device)[:, None] * step
    relative = torch.polar(torch.ones_like(angle), angle).to(table.dtype)
    real = _real(padding, 0, num_tokens, table.device)
    # The mean over all tokens averages their rounding errors.
    starts = table * relative.conj()
    if real is None:
        start = starts.mean(1, keepdim=True)
    else:
        counts = real.sum(1, keepdim=True)
        start = (starts * real).sum(1, keepdim=True) / counts.clamp_min(1)
        start = torch.where(counts > 0, start, start[row : row + 1])
    error = (start * relative - table).abs()
    error = (error if real is None else error.masked_fill(~real, 0.0)).amax((0, 1))
    tolerance = (_ROUNDING + _DRIFT * num_tokens + _STEP_ROUNDING * step.abs()) * table.abs().max()
    return (start, step) if bool((error <= tolerance).all()) else None


def _before_the_text(numbers: Tensor, padding: Tensor) -> Tensor:
    """``numbers`` with padding numbered backwards from the first token of the text."""
    rows, num_tokens = len(padding), numbers.shape[-1]
    padding = padding.clamp_max(num_tokens - 1)[:, None, None]
    numbers = numbers.expand(rows, -1, -1)
    first = numbers.gather(-1, padding.expand(-1, numbers.shape[1], 1))
    tokens = torch.arange(num_tokens, dtype=torch.int64, device="cpu")
    return torch.where(tokens < padding, first + tokens - padding, numbers)


def _real(padding: Tensor | None, start: int, stop: int, device: torch.device) -> Tensor | None:
    """``[B, stop - start, 1]`` bool: False for padding."""
    if padding is None:
        return None
    return (torch.arange(start, stop, dtype=torch.int64, device="cpu") >= padding[:, None])[..., None].to(device)


def _angle_step(table: Tensor) -> Tensor:
    """The angle between neighbours, ``[P]`` float64, estimated over spans of doubling length, each unwrapped by the
    last."""
    wide = table[0].to(torch.complex128)
    span, step = 1, torch.zeros(wide.shape[-1], dtype=torch.float64, device=wide.device)
    while span < len(wide):
        angle = (wide[span:] * wide[:-span].conj()).sum(0).angle()
        revolutions = ((span * step - angle) / (2 * math.pi)).round()
        step = (angle + 2 * math.pi * revolutions) / span
        span *= 2
    return step
