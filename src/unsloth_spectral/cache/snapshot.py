"""A cache in one safetensors file, with a record of its contents and checksums. Knows no models.

The file's metadata holds ``format``, ``version``, ``record`` and ``record_sha256``. The record is JSON: ``header``
(model, tokens and codec of the cache), ``fields`` (its contents, tensors by number) and ``tensors`` (dtype, shape and
SHA-256 of each). docs/snapshots.md describes it for users.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unsloth_spectral.codec.tensors import raw_bytes
from unsloth_spectral.errors import LoadError
from unsloth_spectral.fields import Field, Fields, flatten
from unsloth_spectral.files import check_target, replacing

FORMAT = "unsloth-spectral snapshot"
# Raise this whenever a reader of the old format would misread the new one. Codes mean what the tables of
# codec/spectral/trellis.json say: they are a part of the format.
VERSION = 9
SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Attributes:
    header: the header that ``write`` was given.
    fields: the field that ``write`` was given. Its tensors are mapped from the file: read on use, and private to this
        process.
    num_tensors, tensor_bytes: the number of tensors, and their bytes.
    """

    header: Fields
    fields: Fields
    num_tensors: int
    tensor_bytes: int


def check_path(path: str | os.PathLike[str]) -> Path:
    """``path``, checked as the path of a snapshot to write.

    Raises:
        InvalidArgumentError: it does not end in .safetensors, or cannot be written.
    """
    return check_target(path, (SUFFIX,))


def write(path: Path, header: Field, field: Field) -> None:
    """Write ``header``, which has no tensors, and ``field``; a failure leaves no partial file.

    Raises:
        OSError: it cannot be written.
    """
    tree, tensors = flatten(field)
    plain = _without_aliases([_storable(tensor) for tensor in tensors])
    described = [
        {**_kind(stored), "sha256": _digest(stored), "order": _order(tensor), "is_complex": tensor.is_complex()}
        for stored, tensor in zip(plain, tensors, strict=True)
    ]
    record = json.dumps({"header": header, "fields": tree, "tensors": described})
    metadata = {"format": FORMAT, "version": str(VERSION), "record": record, "record_sha256": _digest_of(record)}
    with replacing(path) as temporary:
        try:
            save_file({str(number): tensor for number, tensor in enumerate(plain)}, temporary, metadata)
        except SafetensorError as error:  # this is how it reports a full disk
            raise OSError(f"{path} cannot be written: {error}") from error


def read(path: str | os.PathLike[str], *, check_tensors: bool = True) -> Snapshot:
    """Open the snapshot at ``path``.

    Args:
        path: the file.
        check_tensors: whether to check all tensors, which reads the whole file; the record is always checked.

    Raises:
        LoadError: there is no such file, or it is no snapshot of this version, truncated or altered; the message says
            which.
    """
    title = os.fspath(path)
    place = os.path.expanduser(title)
    if os.path.exists(place) and not os.path.isfile(place):  # opening a pipe would wait for its other end
        raise LoadError(f"{title!r} is a folder, pipe or device: give a file that cache.save(path) wrote")
    try:
        file = safe_open(place, framework="pt")
    except FileNotFoundError:
        raise LoadError(f"no snapshot at {title!r}: check the path") from None
    except OSError as error:
        raise LoadError(f"the snapshot {title!r} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise LoadError(f"{title!r} is truncated, or no safetensors file ({error}): make it anew") from None
    except RuntimeError as error:  # safetensors opens it, then torch does
        if not os.path.exists(place):
            raise LoadError(f"no snapshot at {title!r}: check the path") from None
        raise LoadError(f"the snapshot {title!r} cannot be mapped ({error}): check the memory and the disk") from error
    with file:
        record = _record_of(title, file.metadata())
        tensors = _Tensors(title, file, record["tensors"])
        for number in range(len(record["tensors"])) if check_tensors else ():
            tensors.check(number)
    name = f"the snapshot {title!r}"
    header, fields = (Fields(record[section], tensors, title=name) for section in ("header", "fields"))
    return Snapshot(header, fields, len(record["tensors"]), tensors.nbytes)


class _Tensors:
    """The tensors of an open file by number and device, each with its own storage within the mapping."""

    def __init__(self, title: str, file: Any, described: list[dict[str, Any]]) -> None:
        self._title, self._described = title, described
        if set(file.keys()) != {str(number) for number in range(len(described))}:
            raise LoadError(f"{title!r} was altered: it holds other tensors than its record says; make it anew")
        self._mapped = [_own_storage(file.get_tensor(str(number))) for number in range(len(described))]
        for number, mapped in enumerate(self._mapped):
            is_same = all(described[number][name] == value for name, value in _kind(mapped).items())
            is_complex, order = described[number]["is_complex"], described[number]["order"]
            is_pair = mapped.dtype == torch.float32 and mapped.shape[-1:] == (2,)
            is_same = is_same and sorted(order) == list(range(mapped.ndim - bool(is_complex)))
            if not is_same or (is_complex and not is_pair):
                raise LoadError(f"{title!r} was altered: tensor {number} is not what its record says; make it anew")
        self._tensors_by_device: dict[tuple[int, torch.device], Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._mapped)

    def check(self, number: int) -> None:
        if _digest(self._mapped[number]) != self._described[number]["sha256"]:
            raise LoadError(f"{self._title!r} was altered: the checksum of tensor {number} differs; make it anew")

    def __call__(self, number: int, device: torch.device) -> Tensor:
        if not 0 <= number < len(self._mapped):
            raise LoadError(f"{self._title!r} refers to a tensor {number}, which it does not hold: make it anew")
        key = (number, device)
        if key not in self._tensors_by_device:
            tensor = self._mapped[number]
            if self._described[number]["is_complex"]:
                tensor = torch.view_as_complex(tensor)
            elif tensor.is_floating_point():
                # Exact tokens and scales get torch's own alignment, so that products are summed in the same order.
                tensor = tensor.clone()
            order = self._described[number]["order"]
            self._tensors_by_device[key] = tensor.permute([order.index(dim) for dim in range(len(order))]).to(device)
        return self._tensors_by_device[key]


def _record_of(title: str, metadata: dict[str, str] | None) -> dict[str, Any]:
    metadata = metadata or {}
    if metadata.get("format") != FORMAT:
        raise LoadError(f"{title!r} is no snapshot of a spectral cache: give a file that cache.save(path) wrote")
    if metadata.get("version") != str(VERSION):
        raise LoadError(
            f"{title!r} is a snapshot of format {metadata.get('version')}, which this version cannot convert to its "
            f"own, {VERSION}: make it again from the text, or use the version that wrote it"
        )
    record = metadata.get("record", "")
    if _digest_of(record) != metadata.get("record_sha256"):
        raise LoadError(f"{title!r} was altered: the checksum of its record differs; make it anew")
    try:
        parsed: dict[str, Any] = json.loads(record)
        names = {"dtype", "shape", "sha256", "order", "is_complex"}
        good = all(set(entry) == names for entry in parsed["tensors"])
        good = good and {"header", "fields"} <= set(parsed)
    except (ValueError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise LoadError(f"{title!r} holds no record that can be read: make it anew")
    return parsed


def _storable(tensor: Tensor) -> Tensor:
    """``tensor`` on the host, contiguous and real: older safetensors have no complex numbers."""
    tensor = tensor.detach().permute(_order(tensor))
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.cpu().contiguous()


def _order(tensor: Tensor) -> list[int]:
    """The dimensions of ``tensor``, widest stride first: in another layout, products would round differently."""
    # The stride of a dimension of size 1 means nothing: it stays where it is.
    wide = sorted((dim for dim, size in enumerate(tensor.shape) if size > 1), key=tensor.stride, reverse=True)
    return [wide.pop(0) if size > 1 else dim for dim, size in enumerate(tensor.shape)]


def _without_aliases(tensors: list[Tensor]) -> list[Tensor]:
    """``tensors`` with copies in place of those that share a storage, which safetensors refuses."""
    storages: set[int] = set()
    distinct = []
    for tensor in tensors:
        place = tensor.untyped_storage().data_ptr()
        distinct.append(tensor.clone() if place in storages else tensor)
        storages.add(place)
    return distinct


def _own_storage(tensor: Tensor) -> Tensor:
    """``tensor`` with its own storage: the storage of the mapped file would be counted whole for each tensor."""
    if not tensor.numel():
        return torch.empty_like(tensor)
    return torch.from_numpy(raw_bytes(tensor)).view(tensor.dtype).reshape(tensor.shape)


def _kind(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()


def _digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
