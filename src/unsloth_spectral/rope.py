"""Rotary position embeddings as what they are, a complex number per token and pair of dimensions.

Su et al., "RoFormer", 2021. A rotation is kept as the angle step of its pairs where positions run on evenly, which
takes a few numbers whatever the length, and as a table where they do not.
"""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from unsloth_spectral.fields import Field, Fields

Dims: TypeAlias = slice | Tensor

# A model's own table has the rounding of bfloat16 (.004 of a pair's length) in the worst case, and that of float32
# angles, which grows with the position. What is off by so little does no harm: keys are read with the rotation they
# were written with.
_TOLERANCE, _ROUNDING = 5e-3, 1e-7
# A table that outlives its use is not to grow with the context: 8,192 tokens of 64 pairs.
_MOST_KEPT_BYTES = 4 << 20


class _Last(threading.local):
    step: Tensor | None = None
    table: Tensor | None = None


_last = _Last()


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """The rotations of consecutive tokens: pair ``j`` of a token is multiplied by ``table()[token, j]``.

    Attributes:
        first, second: the ``P`` dimensions that make the real and the imaginary parts, as slices where they run on
            evenly (many times faster), else ``[P]`` int64; others are not rotated.
        start: ``[B or 1, 1 or num_tokens, P]`` complex64, the first token's rotation, or all tokens' where ``step`` is
            None.
        step: ``[P]`` float64, the angle from one token to the next; None where positions do not run on evenly.
        num_tokens: how many tokens it is for.
    """

    first: Dims
    second: Dims
    start: Tensor
    step: Tensor | None
    num_tokens: int

    @classmethod
    def of(cls, table: Tensor, first: Dims, second: Dims, padding: Tensor | None = None) -> "Rotation":
        """From ``table [B or 1, num_tokens, P]`` complex64, compact where its angles grow evenly.

        The first ``padding [B]`` tokens of each row may stand anywhere.
        """
        if len(table) > 1 and bool((table == table[:1]).all()):
            table = table[:1]
        num_tokens = table.shape[1]
        free = 0 if padding is None else int(padding.max())
        if num_tokens - free > 2:
            even = cls(first, second, table[:, :1], _angle_step(table[:, free:]), num_tokens)
            relative = even.relative()
            assert relative is not None
            # Of all tokens, as each has a rounding of its own.
            start = (table[:, free:] * relative[free:].conj()).mean(1, keepdim=True)
            error = (start * relative - table).abs().amax(-1)
            if padding is not None:
                places = torch.arange(num_tokens, dtype=torch.int64, device=table.device)
                error = error.masked_fill(places < padding.to(table.device)[:, None], 0.0)
            if float(error.max()) <= (_TOLERANCE + _ROUNDING * num_tokens) * float(table.abs().max()):
                return replace(even, start=start)
        return cls(first, second, table.clone(), None, num_tokens)

    @property
    def nbytes(self) -> int:
        tensors = (self.start,) if self.step is None else (self.start, self.step)
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def indices(self, head_dim: int) -> tuple[Tensor, Tensor]:
        """``first`` and ``second`` as ``[P]`` int32 each, of ``head_dim`` dimensions."""
        every = torch.arange(head_dim, dtype=torch.int32, device=self.start.device)
        return every[self.first].contiguous(), every[self.second].contiguous()

    def table(self) -> Tensor:
        """``[B or 1, num_tokens, P]`` complex64."""
        relative = self.relative()
        return self.start if relative is None else self.start * relative

    def relative(self) -> Tensor | None:
        """``[num_tokens, P]`` complex64: ``table() == start * relative()``; None where there is no step.

        The last one is kept, as all layers of a model ask for the same, unless it is long.
        """
        if self.step is None:
            return None
        if _last.step is not self.step or _last.table is None or len(_last.table) < self.num_tokens:
            # In float64: the angle of the ten-thousandth token keeps its fraction.
            tokens = torch.arange(self.num_tokens, dtype=torch.float64, device=self.step.device)
            angle = tokens[:, None] * self.step
            table = torch.polar(torch.ones_like(angle), angle).to(self.start.dtype)
            if table.nbytes > _MOST_KEPT_BYTES:
                return table
            _last.step, _last.table = self.step, table
        return _last.table[: self.num_tokens]

    def slice(self, start: int, stop: int) -> "Rotation":
        """The rotations of tokens ``start`` to ``stop``."""
        if self.step is None:
            return Rotation(self.first, self.second, self.start[:, start:stop].clone(), None, stop - start)
        turn = torch.polar(torch.ones_like(self.step), self.step * start).to(self.start.dtype)
        return Rotation(self.first, self.second, self.start * turn, self.step, stop - start)

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> "Rotation":
        """``function`` applied along the batch dimension, where the rows differ."""
        if len(self.start) == 1:
            return self
        return Rotation(self.first, self.second, function(self.start), self.step, self.num_tokens)

    @classmethod
    def join(cls, pieces: Sequence["Rotation"]) -> "Rotation":
        """The tokens of all ``pieces``, one after another."""
        rows = max(len(piece.start) for piece in pieces)
        tables = [piece.table().expand(rows, -1, -1) for piece in pieces]
        return cls.of(torch.cat(tables, dim=1), pieces[0].first, pieces[0].second)

    def to_fields(self) -> dict[str, Field]:
        return {
            "first": _dims_field(self.first),
            "second": _dims_field(self.second),
            "start": self.start,
            "step": self.step,
            "num_tokens": self.num_tokens,
        }

    @classmethod
    def from_fields(cls, fields: Fields, head_dim: int) -> "Rotation":
        """Of pairs among ``head_dim`` dimensions.

        Raises:
            LoadError: the fields do not fit each other.
        """
        num_tokens, step = fields.integer("num_tokens", 1), None
        start = fields.tensor("start", torch.complex64, (None, None, None))
        pairs = start.shape[-1]
        if fields.has("step"):
            step = fields.tensor("step", torch.float64, (pairs,))
        fields.require(start.shape[1] == (num_tokens if step is None else 1), f"a start for {num_tokens} tokens")
        first, second = (_dims_of(fields, name, pairs, head_dim) for name in ("first", "second"))
        return cls(first, second, start, step, num_tokens)


def _dims_field(dims: Dims) -> Field:
    return dims if isinstance(dims, Tensor) else [dims.start, dims.stop, dims.step]


def _dims_of(fields: Fields, name: str, pairs: int, head_dim: int) -> Dims:
    if fields.is_tensor(name):
        dims = fields.tensor(name, torch.int64, (pairs,))
        fields.require(bool(((dims >= 0) & (dims < head_dim)).all()), f"dimensions below {head_dim} as {name!r}")
        return dims
    evenly = fields.integers(name)
    fields.require(len(evenly) == 3 and evenly[2] > 0, f"start, stop and step as {name!r}")
    places = range(*evenly)
    fields.require(len(places) == pairs and places[-1] < head_dim, f"{pairs} dimensions below {head_dim} as {name!r}")
    return slice(*evenly)


def rotate(x: Tensor, table: Tensor, rotation: Rotation) -> Tensor:
    """``x [..., tokens, head_dim]`` with every pair turned by the complex ``table``, like ``[..., tokens, P]``."""
    real, imaginary = x[..., rotation.first], x[..., rotation.second]
    cos, sin = table.real, table.imag
    out = x.clone()
    out[..., rotation.first] = real * cos - imaginary * sin
    out[..., rotation.second] = real * sin + imaginary * cos
    return out


def unrotate(x: Tensor, table: Tensor, rotation: Rotation) -> Tensor:
    """The inverse of ``rotate``, whatever the size of the table's entries."""
    return rotate(x, table.conj() / table.abs().square(), rotation)


def unrotated_sum(x: Tensor, table: Tensor, rotation: Rotation) -> Tensor:
    """``unrotate(x, table, rotation).sum(-2)``, with nothing but sums as long as the tokens."""
    inverse = table.conj() / table.abs().square()
    cos, sin = inverse.real.contiguous(), inverse.imag.contiguous()
    real, imaginary = x[..., rotation.first], x[..., rotation.second]
    out = x.sum(-2)
    out[..., rotation.first] = torch.addcmul(real * cos, imaginary, sin, value=-1).sum(-2)
    out[..., rotation.second] = torch.addcmul(real * sin, imaginary, cos).sum(-2)
    return out


def minus_rotated(x: Tensor, fixed: Tensor, table: Tensor, rotation: Rotation) -> Tensor:
    """``x - rotate(fixed, table, rotation)``, where ``fixed [..., 1, head_dim]`` is the same for all tokens."""
    cos, sin = table.real.contiguous(), table.imag.contiguous()
    real, imaginary = fixed[..., rotation.first], fixed[..., rotation.second]
    out = x - fixed
    out[..., rotation.first] = torch.addcmul(torch.addcmul(x[..., rotation.first], cos, -real), sin, imaginary)
    out[..., rotation.second] = torch.addcmul(torch.addcmul(x[..., rotation.second], sin, -real), cos, -imaginary)
    return out


def _angle_step(table: Tensor) -> Tensor:
    """The angle between neighbours, ``[P]`` float64, from ever longer spans, each unwrapped by the last one."""
    wide = table[0].to(torch.complex128)
    span, step = 1, torch.zeros(wide.shape[-1], dtype=torch.float64, device=wide.device)
    while span < len(wide):
        turn = (wide[span:] * wide[:-span].conj()).sum(0).angle()
        turns = ((span * step - turn) / (2 * math.pi)).round()
        step = (turn + 2 * math.pi * turns) / span
        span *= 2
    return step
