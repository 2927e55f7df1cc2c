"""The rotations of consecutive tokens, stored as integer places and one angle per pair if a model's tables allow it."""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from unsloth_spectral.fields import Field, Fields
from unsloth_spectral.rope.fit import Claim, at_places, evenly
from unsloth_spectral.rope.interned import interned
from unsloth_spectral.rope.places import Places

Dims: TypeAlias = slice | Tensor

# A cached table must not grow with the context: this is 8,192 tokens of 64 pairs.
MOST_KEPT_BYTES = 4 << 20
_FROM_ZERO = Places()


class _Last(threading.local):
    """The last table computed, because the layers of a model ask for the same one."""

    step: Tensor | None = None
    places: Tensor | None = None
    axes: tuple[int, ...] | None = None
    span: tuple[int, int] = (0, 0)
    table: Tensor | None = None


_last = _Last()


@dataclass(frozen=True, eq=False)
class Rotation:
    """The rotations of consecutive tokens: pair ``j`` of a token is multiplied by ``table()[token, j]``.

    With a ``step``, that is ``unit * exp(i * step * place)``, and the table is computed on demand. Slices, rows
    selected from a batch and all layers of a model share the tensors.

    Attributes:
        first, second: the ``P`` dimensions of the real and of the imaginary parts, as slices if they are evenly spaced
            (many times faster), else ``[P]`` int64; other dimensions are not rotated.
        unit: with a step ``[R or 1, 1, P]`` complex64, the rotation of place 0; without one ``[R or 1, n, P]``, the
            rotations of all tokens.
        step: ``[P]`` float64, the angle from one place to the next; None if the places are unknown.
        num_tokens: the number of tokens.
        places: the tokens' places.
        axes: for each pair, the axis of ``places`` that it rotates along; None if there is one axis.
        rows: ``[B]`` int64, which of the ``R`` rows each row of the batch has; None if ``R`` is 1.
        offset: the index of the first token in ``places`` or ``unit``.
    """

    first: Dims
    second: Dims
    unit: Tensor
    step: Tensor | None
    num_tokens: int
    places: Places = _FROM_ZERO
    axes: tuple[int, ...] | None = None
    rows: Tensor | None = None
    offset: int = 0

    @classmethod
    def of(
        cls, table: Tensor, first: Dims, second: Dims, padding: Tensor | None = None, claims: Iterable[Claim] = ()
    ) -> "Rotation":
        """The rotation with ``table [B or 1, num_tokens, P]`` complex64.

        It takes integer places if one of ``claims`` reproduces the table, a few numbers if the angles grow evenly, and
        else the table itself. The first ``padding [B]`` tokens of each row (on the CPU) may have any rotation.
        """
        num_tokens = table.shape[1]
        if len(table) > 1 and bool((table == table[:1]).all()):
            table = table[:1]
        for claim in claims:
            placed = at_places(table, claim, padding)
            if placed is not None:
                places, axes = placed
                rows = all_rows(places.num_rows, table.device)
                return cls(first, second, claim.unit, claim.step, num_tokens, places, axes, rows)
        even = evenly(table, padding)
        unit, step = (table.clone(), None) if even is None else even
        return cls(first, second, unit, step, num_tokens, rows=all_rows(len(unit), table.device))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of the rotation; other rotations may share them."""
        return tuple(tensor for tensor in (self.unit, self.step, self.places.table, self.rows) if tensor is not None)

    @property
    def num_pairs(self) -> int:
        return self.unit.shape[-1]

    @property
    def is_even(self) -> bool:
        """True if the rotation grows by the same ``step`` from every token to the next."""
        return self.step is not None and self.places.table is None

    @property
    def start(self) -> Tensor:
        """``[B or 1, 1, P]`` complex64, the first token's rotation."""
        if self.step is None:
            return self._by_batch(self.unit[:, self.offset : self.offset + 1])
        numbers = self.places.numbers(self.offset, self.offset + 1)
        return self._by_batch(self.unit * self._powers(numbers))

    def indices(self, head_dim: int) -> tuple[Tensor, Tensor]:
        """``first`` and ``second`` as ``[P]`` int32 each, of ``head_dim`` dimensions."""
        every = torch.arange(head_dim, dtype=torch.int32, device=self.unit.device)
        return every[self.first].contiguous(), every[self.second].contiguous()

    def table(self) -> Tensor:
        """``[B or 1, num_tokens, P]`` complex64."""
        if self.step is None:
            return self._by_batch(self.unit[:, self.offset : self.offset + self.num_tokens])
        if self.is_even:
            return self.start * self._cached_powers(0, self.num_tokens)
        return self._by_batch(self.unit * self._cached_powers(self.offset, self.offset + self.num_tokens))

    def slice(self, start: int, stop: int) -> "Rotation":
        """The rotations of tokens ``start`` to ``stop``, in even form if these are even."""
        sliced = replace(self, offset=self.offset + start, num_tokens=stop - start)
        if sliced.places.table is None:
            return sliced
        numbers = sliced.places.numbers(sliced.offset, sliced.offset + sliced.num_tokens)
        if bool((numbers.diff() != 1).any()):
            return sliced
        return self._at(Places.of(numbers), stop - start)

    def continued(self, num_tokens: int) -> "Rotation | None":
        """The rotations of the next ``num_tokens`` tokens, each one place behind the one before; None if the places are
        unknown."""
        if self.step is None:
            return None
        last = self.offset + self.num_tokens - 1
        numbers = self.places.numbers(last, last + 1) + torch.arange(1, num_tokens + 1, dtype=torch.int64, device="cpu")
        return self._at(Places.of(numbers), num_tokens)

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> "Rotation":
        """``function`` applied along the batch dimension, if the rows differ."""
        return self if self.rows is None else replace(self, rows=function(self.rows))

    def to_fields(self) -> dict[str, Field]:
        return {
            "first": _dims_field(self.first),
            "second": _dims_field(self.second),
            "unit": self.unit,
            "step": self.step,
            "num_tokens": self.num_tokens,
            "places": self.places.to_fields(),
            "axes": self.axes,
            "rows": self.rows,
            "offset": self.offset,
        }

    @classmethod
    def from_fields(cls, fields: Fields, head_dim: int, batch: int, num_tokens: int) -> "Rotation":
        """The rotation that ``to_fields`` stored, of ``num_tokens`` in ``batch`` rows and of ``head_dim`` dimensions.

        Raises:
            LoadError: the fields do not fit each other or these sizes.
        """
        unit = fields.tensor("unit", torch.complex64, (None, None, None))
        pairs, step, places, axes = unit.shape[-1], None, Places.from_fields(fields.sub("places")), None
        fields.require(fields.integer("num_tokens", 1) == num_tokens, f"positions of {num_tokens} tokens")
        offset = fields.integer("offset")
        if fields.has("step"):
            step = fields.tensor("step", torch.float64, (pairs,))
            step, unit = interned(step, step.device), interned(unit, unit.device) if len(unit) == 1 else unit
        if fields.has("axes"):
            axes = fields.integers("axes")
            fields.require(len(axes) == pairs, f"an axis for each of {pairs} pairs")
        is_axis = places.num_axes == 1 or (axes is not None and max(axes) < places.num_axes)
        fields.require(is_axis, f"axes below {places.num_axes}")
        fields.require(step is None or unit.shape[1] == 1, "one unit")
        num_stored = unit.shape[1] if step is None else places.num_tokens
        fields.require(num_stored is None or offset + num_tokens <= num_stored, f"positions of {num_tokens} tokens")
        counts = {len(unit), places.num_rows if step is not None else 1}
        most, rows = max(counts), None
        fields.require(counts <= {1, most}, f"places of {most} rows")
        if fields.has("rows"):
            rows = fields.tensor("rows", torch.int64, (batch,))
            fields.require(bool(((rows >= 0) & (rows < most)).all()), f"rows below {most}")
        fields.require(rows is not None or most == 1, f"a row among {most} for each of {batch}")
        first, second = (_dims_of(fields, name, pairs, head_dim) for name in ("first", "second"))
        if step is not None:
            step, unit = interned(step, step.device), interned(unit, unit.device)
        return cls(first, second, unit, step, num_tokens, places, axes, rows, offset)

    def _at(self, places: Places, num_tokens: int) -> "Rotation":
        """The rotation of tokens at ``places``, of the same rows."""
        rows = self.rows if max(len(self.unit), places.num_rows) > 1 else None
        return replace(self, places=places, rows=rows, offset=0, num_tokens=num_tokens)

    def _by_batch(self, tensor: Tensor) -> Tensor:
        return tensor if self.rows is None or len(tensor) == 1 else tensor[self.rows]

    def _powers(self, numbers: Tensor) -> Tensor:
        """``[R, n, P]`` complex64: ``exp(i * step * numbers)``, of ``numbers [R, A, n]`` on the CPU."""
        assert self.step is not None
        # In float64: the angle of the ten-thousandth token keeps its fraction.
        angle = by_pair(numbers, self.axes).to(self.step.device, torch.float64) * self.step
        return torch.polar(torch.ones_like(angle), angle).to(self.unit.dtype)

    def _cached_powers(self, start: int, stop: int) -> Tensor:
        """``_powers`` of tokens ``start`` to ``stop`` of ``places`` or, for even rotations, of places ``start`` to
        ``stop``.

        The last result is cached, unless it is large: all layers of a model ask for the same one.
        """
        places, span = self.places.table, _last.span
        is_cached = _last.step is self.step and _last.places is places and _last.axes == self.axes
        if not is_cached or _last.table is None or span[0] != start or span[1] < stop:
            if places is None:
                numbers = torch.arange(start, stop, dtype=torch.int64, device="cpu")[None, None]
            else:
                numbers = self.places.numbers(start, stop)
            table = self._powers(numbers)
            if table.nbytes > MOST_KEPT_BYTES:
                return table
            _last.step, _last.places, _last.axes = self.step, places, self.axes
            _last.span, _last.table = (start, stop), table
        return _last.table[:, : stop - start]


def by_pair(numbers: Tensor, axes: tuple[int, ...] | None) -> Tensor:
    """``numbers [R, A, n]`` along the axis of each pair, ``[R, n, P or 1]``."""
    return numbers.mT if axes is None or numbers.shape[1] == 1 else numbers[:, list(axes)].mT


def all_rows(count: int, device: torch.device) -> Tensor | None:
    """``Rotation.rows`` of a batch with ``count`` different rows."""
    return None if count == 1 else torch.arange(count, dtype=torch.int64, device=device)


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
