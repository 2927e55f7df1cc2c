"""Checked serialization of nested values: numbers, texts and tensors by name.

A type that can be stored has ``to_fields``, which names its contents, and ``from_fields``, which reads them by name,
dtype and shape. Stored data may come from anywhere, so every value is checked.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from unsloth_spectral.errors import LoadError

Field: TypeAlias = bool | int | float | str | Tensor | Sequence["Field"] | Mapping[str, "Field"] | None
# Returns a stored tensor by its number, on a device; the same object for the same number and device.
TensorSource: TypeAlias = Callable[[int, torch.device], Tensor]
# None stands for any size.
Shape: TypeAlias = Sequence[int | None]

_HOST = torch.device("cpu")
_REFERENCE = "$tensor"


def flatten(field: Field) -> tuple[Any, list[Tensor]]:
    """``field`` ready for JSON, and the tensors it refers to, each once."""
    tensors: list[Tensor] = []
    return _plain(field, tensors, {}), tensors


def _plain(field: Field, tensors: list[Tensor], numbers: dict[int, int]) -> Any:
    """``field`` with references in place of its tensors, which join ``tensors``; ``numbers`` has their places by id."""
    # Not a closure in `flatten`: a recursive closure keeps the tensors alive until the cyclic collector runs.
    if isinstance(field, Tensor):
        if id(field) not in numbers:
            numbers[id(field)] = len(tensors)
            tensors.append(field)
        return {_REFERENCE: numbers[id(field)]}
    if isinstance(field, Mapping):
        return {name: _plain(value, tensors, numbers) for name, value in field.items()}
    if isinstance(field, Sequence) and not isinstance(field, str):
        return [_plain(value, tensors, numbers) for value in field]
    return field


class Fields:
    """Named fields in the form that ``flatten`` makes.

    Every method raises LoadError if a field is missing or not of the requested kind, and names the field.
    """

    def __init__(
        self, values: Any, source: TensorSource, device: torch.device = _HOST, title: str = "the snapshot"
    ) -> None:
        self._values, self._source, self._device, self._title = values, source, device, title
        self.require(isinstance(values, dict), "fields")

    def on(self, device: torch.device) -> "Fields":
        """The same fields, with tensors on ``device``."""
        return Fields(self._values, self._source, device, self._title)

    def has(self, name: str) -> bool:
        """True if the field exists and is not None."""
        return self._values.get(name) is not None

    def names(self) -> list[str]:
        return list(self._values)

    def is_tensor(self, name: str) -> bool:
        return _is_reference(self._get(name))

    def is_group(self, name: str) -> bool:
        """True if the field holds named fields."""
        return isinstance(self._get(name), dict) and not self.is_tensor(name)

    def scalar(self, name: str) -> bool | int | float | str | None:
        """A single value of any kind."""
        value = self._get(name)
        self.require(value is None or isinstance(value, bool | int | float | str), f"a single value as {name!r}")
        return value

    def data(self, name: str) -> dict[str, Any]:
        """Unchecked contents of a field, for code that compares or checks them itself."""
        return self.sub(name)._values

    def integer(self, name: str, least: int = 0) -> int:
        value = self._get(name)
        good = type(value) is int and value >= least
        self.require(good, f"an integer of at least {least} as {name!r}")
        return int(value)

    def number(self, name: str) -> float:
        value = self._get(name)
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        self.require(good, f"a number as {name!r}")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self._get(name)
        self.require(isinstance(value, bool), f"true or false as {name!r}")
        return bool(value)

    def text(self, name: str) -> str:
        value = self._get(name)
        self.require(isinstance(value, str), f"a text as {name!r}")
        return str(value)

    def dtype(self, name: str) -> torch.dtype:
        """A floating point type by its name."""
        dtype = getattr(torch, self.text(name), None)
        good = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        self.require(good, f"a floating point dtype as {name!r}")
        assert isinstance(dtype, torch.dtype)
        return dtype

    def integer_lists(self, name: str, least: int, most: int) -> tuple[tuple[int, ...], ...]:
        rows = self._list(name)
        good = all(
            isinstance(row, list) and all(type(item) is int and least <= item <= most for item in row) for row in rows
        )
        self.require(good, f"lists of integers from {least} to {most} as {name!r}")
        return tuple(map(tuple, rows))

    def integers(self, name: str, least: int = 0) -> tuple[int, ...]:
        items = self._list(name)
        good = all(type(item) is int and item >= least for item in items)
        self.require(good, f"integers of at least {least} as {name!r}")
        return tuple(items)

    def sub(self, name: str) -> "Fields":
        """The named fields in a field."""
        return Fields(self._get(name), self._source, self._device, f"{self._title}, {name}")

    def subs(self, name: str) -> list["Fields"]:
        """A list of named fields."""
        titles = f"{self._title}, {name}"
        return [
            Fields(item, self._source, self._device, f"{titles} {place}") for place, item in enumerate(self._list(name))
        ]

    def tensor(self, name: str, dtype: torch.dtype | None, shape: Shape | None, *, on_host: bool = False) -> Tensor:
        """A tensor of ``dtype`` and ``shape`` (None: any), on this object's device or ``on_host``."""
        return self._tensor(self._get(name), name, dtype, shape, on_host)

    def tensors(
        self, name: str, dtype: torch.dtype | None, shape: Shape | None, *, on_host: bool = False
    ) -> list[Tensor]:
        """A list of tensors, as ``tensor``."""
        return [self._tensor(item, name, dtype, shape, on_host) for item in self._list(name)]

    def require(self, condition: bool, wanted: str) -> None:
        """Raise LoadError unless ``condition`` holds; the message says that these fields must have ``wanted``."""
        if not condition:
            raise LoadError(f"{self._title} must have {wanted}")

    def _get(self, name: str) -> Any:
        self.require(name in self._values, f"a field {name!r}")
        return self._values[name]

    def _tensor(
        self, reference: Any, name: str, dtype: torch.dtype | None, shape: Shape | None, on_host: bool
    ) -> Tensor:
        self.require(_is_reference(reference), f"a tensor as {name!r}")
        tensor = self._source(reference[_REFERENCE], _HOST if on_host else self._device)
        self.require(dtype is None or tensor.dtype == dtype, f"{dtype} as {name!r}, not {tensor.dtype}")
        if shape is not None:
            fits = [expected in (None, size) for size, expected in zip(tensor.shape, shape, strict=False)]
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            is_same = tensor.ndim == len(shape) and all(fits)
            self.require(is_same, f"a tensor [{wanted}] as {name!r}, not {list(tensor.shape)}")
        return tensor

    def _list(self, name: str) -> list[Any]:
        items = self._get(name)
        self.require(isinstance(items, list), f"a list as {name!r}")
        return list(items)


def _is_reference(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {_REFERENCE} and type(value[_REFERENCE]) is int
