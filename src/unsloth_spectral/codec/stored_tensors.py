"""Tensors of a stored block, each declared once: what is counted, mapped, cut, joined, stored and read follows.

A dataclass that derives from ``StoredTensors`` declares each of its tensors as
``name: Annotated[Tensor, Stored(dtype, shape)]``. A shape names its sizes; some names mean something:

- ``"batch"`` is the dimension along which rows are picked;
- ``"tiles"`` is a dimension of tiles of 128 tokens, ``"padded_tokens"`` one of tokens, filled up to whole tiles;
- ``...`` stands for any leading dimensions.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from functools import lru_cache
from math import prod
from types import EllipsisType
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast, get_type_hints

import torch
from torch import Tensor

from unsloth_spectral.codec.config import GROUP_SIZE
from unsloth_spectral.codec.tensors import TensorFunction, storage_bytes
from unsloth_spectral.fields import Field, Fields

Dim: TypeAlias = str | int | EllipsisType
# Sizes by name; None for any size. The leading dimensions are a tuple under "...".
Sizes: TypeAlias = Mapping[str, Any]


class Stored(NamedTuple):
    """Attributes:
    dtype, shape: of the tensor.
    is_statistic: whether it says something of the tokens that does not take part in rebuilding them.
    filling: what fills up ``"padded_tokens"``.
    """

    dtype: torch.dtype
    shape: tuple[Dim, ...]
    is_statistic: bool = False
    filling: int = 0

    def sizes(self, sizes: Sizes) -> tuple[Any, ...]:
        """The shape in numbers; None for any size."""
        numbers: list[Any] = []
        for dim in self.shape:
            numbers += sizes["..."] if dim is ... else [sizes[dim] if isinstance(dim, str) else dim]
        return tuple(numbers)


_Self = TypeVar("_Self", bound="StoredTensors")


class StoredTensors:
    """What follows from the declared tensors of a dataclass."""

    __slots__ = ()

    @classmethod
    def declarations(cls) -> Mapping[str, Stored]:
        """By name, in order."""
        return _declarations(cast(Any, cls))

    @classmethod
    def content(cls) -> Mapping[str, Stored]:
        """The declarations of the tensors that tokens are rebuilt from, in order."""
        return {name: declared for name, declared in cls.declarations().items() if not declared.is_statistic}

    @classmethod
    def bytes_of(cls, name: str, sizes: Sizes) -> int:
        """Bytes of one tensor."""
        declared = cls.declarations()[name]
        return int(declared.dtype.itemsize * prod(declared.sizes(sizes)))

    @classmethod
    def bytes_per(cls, dim: str, sizes: Sizes) -> int:
        """Bytes that one more along ``dim`` takes in all tensors that have it; the size of ``dim`` is not read."""
        one = {**sizes, dim: 1}
        return sum(cls.bytes_of(name, one) for name, declared in cls.declarations().items() if dim in declared.shape)

    @classmethod
    def bytes_without(cls, dims: Iterable[str], sizes: Sizes) -> int:
        """Bytes of the tensors that tokens are rebuilt from and that have none of ``dims``."""
        content = cls.content().items()
        return sum(cls.bytes_of(name, sizes) for name, declared in content if not {*dims} & {*declared.shape})

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name, in order."""
        return {name: getattr(self, name) for name in self.declarations()}

    @property
    def nbytes(self) -> int:
        """Bytes of every declared tensor, as torch reports their storages."""
        return storage_bytes(*self.tensors.values())

    def map_tensors(self: _Self, function: TensorFunction) -> _Self:
        """``function`` applied to each tensor: along the batch dimension, or to leading dimensions."""
        return self._with({name: function(tensor) for name, tensor in self.tensors.items()})

    def slice_tensors(self: _Self, start: int, stop: int) -> _Self:
        """Tokens ``start``, a multiple of 128, to ``stop``, as views."""
        last = -(-stop // GROUP_SIZE)
        spans = {"tiles": (start // GROUP_SIZE, last), "padded_tokens": (start, last * GROUP_SIZE)}
        sliced = {}
        for name, dim, along in self._along(spans):
            first, end = spans[dim]
            sliced[name] = getattr(self, name).narrow(along, first, end - first)
        return self._with(sliced)

    def append_tensors(self: _Self, other: _Self) -> _Self:
        """These tokens, whole tiles, followed by ``other``'s; what has no dimension of tokens stays as it is."""
        dims = ("tiles", "padded_tokens")
        return self._with(
            {name: torch.cat([getattr(self, name), getattr(other, name)], dim) for name, _, dim in self._along(dims)}
        )

    def tensors_to_fields(self) -> dict[str, Field]:
        return dict(self.tensors)

    @classmethod
    def tensors_from_fields(cls, fields: Fields, sizes: Sizes) -> dict[str, Any]:
        """The declared tensors, by name.

        Raises:
            LoadError: one is missing, or of another dtype or shape.
        """
        return {
            name: fields.tensor(name, declared.dtype, declared.sizes(sizes))
            for name, declared in cls.declarations().items()
        }

    def _along(self, dims: Iterable[str]) -> list[tuple[str, str, int]]:
        """Tensors that have one of ``dims``: the tensor's name, that dimension's, and its place."""
        return [
            (name, dim, declared.shape.index(dim))
            for name, declared in self.declarations().items()
            for dim in dims
            if dim in declared.shape
        ]

    def _with(self: _Self, tensors: dict[str, Tensor]) -> _Self:
        changed: _Self = dataclasses.replace(cast(Any, self), **tensors)
        return changed


@lru_cache
def _declarations(cls: Any) -> Mapping[str, Stored]:
    hints = get_type_hints(cls, include_extras=True)
    notes = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: note[0] for name, note in notes.items() if note and isinstance(note[0], Stored)}
