"""A basis for a model's keys: what their principal components have in common over texts of many kinds."""

import hashlib
import threading
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from unsloth_spectral.codec.tensors import raw_bytes, rounded_rows, storage_bytes
from unsloth_spectral.errors import LoadError
from unsloth_spectral.fields import Field, Fields

# For each head, rows of its basis.
Places = tuple[tuple[int, ...], ...]

_DIGITS = 16
_lock = threading.Lock()
_known: "WeakValueDictionary[str, ModelBasis]" = WeakValueDictionary()


@dataclass(frozen=True, eq=False)  # with slots it could not be referred to weakly
class ModelBasis:
    """The basis of one layer. All caches that use it share its tensors; make it by ``of``.

    Attributes:
        vectors: ``[H, D, D]`` int8 on the CPU, for each head rows in order of falling variance.
        row_scales: ``[H, D, 1]`` float32 on the CPU, of the rows.
        variances: ``[H, D]`` float32 on the CPU, the part of the scores' variance along each row.
        digest: the sizes, and hexadecimal digits, a hash of the tensors.
    """

    vectors: Tensor
    row_scales: Tensor
    variances: Tensor
    digest: str
    _copies: dict[torch.device, "_OnDevice"] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, vectors: Tensor, row_scales: Tensor, variances: Tensor) -> "ModelBasis":
        """The basis with these tensors, one object for equal ones.

        Raises:
            LoadError: they are of other dtypes or shapes, or not finite.
        """
        heads, rows, key_dim = vectors.shape if vectors.ndim == 3 else (0, 0, -1)
        good = vectors.dtype == torch.int8 and rows == key_dim
        for numbers, shape in ((row_scales, (heads, rows, 1)), (variances, (heads, rows))):
            good = good and numbers.dtype == torch.float32 and numbers.shape == shape
            good = good and bool((torch.isfinite(numbers) & (numbers >= 0)).all())
        good = good and bool((row_scales > 0).all())
        if not good:
            raise LoadError(
                "a model's basis must be square matrices of bytes, with a scale and a variance for each row"
            )
        vectors, row_scales, variances = (tensor.cpu().contiguous() for tensor in (vectors, row_scales, variances))
        digest = hashlib.sha256()
        for tensor in (vectors, row_scales, variances):
            digest.update(raw_bytes(tensor))
        name = f"{heads}x{rows}-{digest.hexdigest()[:_DIGITS]}"
        with _lock:
            known = _known.get(name)
            if known is None:
                # Cloned: the caller's may be changed later, or be mapped from a file.
                known = _known[name] = cls(vectors.clone(), row_scales.clone(), variances.clone(), name)
        return known

    @classmethod
    def named(cls, digest: str) -> "ModelBasis | None":
        """The basis of that digest, if a cache or profile in this process has it."""
        return _known.get(digest)

    @classmethod
    def rounded(cls, vectors: Tensor, variances: Tensor) -> "ModelBasis":
        """The basis of ``vectors [H, D, D]`` float32, rounded to int8, with their ``variances [H, D]`` float32."""
        return cls.of(*rounded_rows(vectors), variances)

    @property
    def shape(self) -> tuple[int, int]:
        """The number of heads, and the dimensions of each."""
        return self.vectors.shape[0], self.vectors.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, on all devices."""
        copies = [tensor for copy in self._copies.values() for tensor in copy]
        return storage_bytes(self.vectors, self.row_scales, self.variances, *copies)

    def on(self, device: torch.device) -> "_OnDevice":
        """The basis on ``device``, the same object every time."""
        copy = self._copies.get(device)
        if copy is None:
            rows = self.vectors.float() * self.row_scales
            inverse = torch.linalg.pinv(rows)
            tensors = (self.vectors, self.row_scales, self.variances, inverse, (inverse @ inverse.mT)[None])
            # Of two threads the first one's copy stays.
            copy = self._copies.setdefault(device, _OnDevice(*(tensor.to(device) for tensor in tensors)))
        return copy

    def to_fields(self) -> dict[str, Field]:
        return {"vectors": self.vectors, "row_scales": self.row_scales, "variances": self.variances}

    @classmethod
    def from_fields(cls, fields: Fields) -> "ModelBasis":
        """The basis that ``to_fields`` stored.

        Raises:
            LoadError: a tensor is missing, or does not fit the other.
        """
        vectors = fields.tensor("vectors", torch.int8, (None, None, None), on_host=True)
        row_scales = fields.tensor("row_scales", torch.float32, (None, None, 1), on_host=True)
        return cls.of(vectors, row_scales, fields.tensor("variances", torch.float32, (None, None), on_host=True))

    def __deepcopy__(self, memo: object) -> "ModelBasis":
        return self


class _OnDevice(NamedTuple):
    """A basis on a device.

    Attributes:
        vectors, row_scales, variances: as in ``ModelBasis``.
        inverse: ``[H, D, D]`` float32, by which keys become coefficients.
        metric: ``[1, H, D, D]`` float32, under which the rows are orthonormal.
    """

    vectors: Tensor
    row_scales: Tensor
    variances: Tensor
    inverse: Tensor
    metric: Tensor

    @property
    def rows(self) -> Tensor:
        """``[H, D, D]`` float32."""
        return self.vectors.float() * self.row_scales


@dataclass(frozen=True, slots=True)
class BasisRows:
    """Rows of a model's basis, those of one head after those of another, ``C`` in all.

    Attributes:
        basis: of the layer.
        places: of each head's rows within the head's basis.
    """

    basis: ModelBasis
    places: Places

    def numbers(self, device: torch.device) -> Tensor:
        """``[C]`` int32, the rows counted over all heads."""
        return row_numbers(self.places, self.basis.shape[1], device)

    def vectors(self, device: torch.device) -> Tensor:
        """``[1, C, D]`` int8."""
        return self.basis.on(device).vectors.flatten(0, 1)[self.numbers(device).long()][None]

    def row_scales(self, device: torch.device) -> Tensor:
        """``[1, C, 1]`` float32."""
        return self.basis.on(device).row_scales.flatten(0, 1)[self.numbers(device).long()][None]

    def spread(self, numbers: Places, device: torch.device) -> Tensor:
        """``numbers``, one for each of these rows, as ``[H, D]`` int64 with zeros for the other rows."""
        table = torch.zeros(self.basis.shape, dtype=torch.int64, device="cpu")
        for head, (places, row) in enumerate(zip(self.places, numbers, strict=True)):
            table[head, list(places)] = torch.tensor(row, dtype=torch.int64, device="cpu")
        return table.to(device)

    def inverse(self, device: torch.device) -> Tensor:
        """``[1, D, C]`` float32: what gives the rows' coefficients under the basis' own metric."""
        columns = self.basis.on(device).inverse.mT.flatten(0, 1)
        return columns[self.numbers(device).long()].mT[None]

    def to_fields(self) -> dict[str, Field]:
        """The basis by its digest alone: the profile carries it."""
        return {"basis": self.basis.digest, "places": self.places}

    @classmethod
    def from_fields(cls, fields: Fields, heads: int, key_dim: int, counts: tuple[int, ...]) -> "BasisRows":
        """The rows that ``to_fields`` stored, ``counts`` of each head.

        Raises:
            LoadError: the basis was not read before, or the rows are not of this shape.
        """
        basis, places = ModelBasis.named(fields.text("basis")), fields.integer_lists("places", 0, key_dim - 1)
        fields.require(basis is not None and basis.shape == (heads, key_dim), f"a basis of {heads} heads of {key_dim}")
        assert basis is not None
        fields.require(tuple(map(len, places)) == counts, "a row of the basis for each component")
        return cls(basis, places)


@lru_cache(maxsize=1024)
def row_numbers(places: Places, rows: int, device: torch.device) -> Tensor:
    """``[C]`` int32: the rows at ``places``, counted over all heads of ``rows`` each."""
    flat = [head * rows + place for head, row in enumerate(places) for place in row]
    return torch.tensor(flat, dtype=torch.int32, device=device)
