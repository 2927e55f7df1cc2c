"""Spectral records in LMCache (0.5.6 or newer): what engines offload and share is stored several times smaller.

It is loaded by configuration alone: an L2 adapter of type ``plugin`` that names this module, any adapter of LMCache's
own inside, and a serde of type ``spectral`` (docs/engines.md has whole commands):

    {"type": "plugin", "module_path": "unsloth_spectral.integrations.lmcache", "class_name": "SpectralL2Adapter",
     "adapter_params": {"type": "fs", "base_path": "/var/cache/kv"},
     "serde": {"type": "spectral", "bits_per_element": 2.5, "head_dim": 128, "rope_theta": 500000}}

Importing it registers the serde, which is how LMCache finds one; no other module of this package imports it.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.distributed.l2_adapters.config import L2AdapterConfigBase, get_l2_adapter_config_class
from lmcache.v1.distributed.l2_adapters.factory import create_l2_adapter_from_registry
from lmcache.v1.distributed.serde import (
    AsyncSerdeProcessor,
    Deserializer,
    SerdeProcessor,
    Serializer,
    get_registered_serde_types,
    register_serde_factory,
)
from lmcache.v1.memory_management import MemoryObj
from torch import Tensor

from unsloth_spectral.codec.chunk import ChunkCodec
from unsloth_spectral.errors import InvalidArgumentError

_OPTIONS = ("bits_per_element", "head_dim", "rope_theta", "block_tokens", "max_workers")
_log = logging.getLogger("unsloth_spectral")


class SpectralSerializer(Serializer):  # type: ignore[misc]
    """Chunks to records. Groups that the codec cannot take are stored as they are, and that is logged once."""

    def __init__(self, codec: ChunkCodec) -> None:
        self._codec = codec
        self._told: set[str] = set()

    def serialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> int:
        """Fill ``dst``, a byte buffer of the estimated size; returns that size."""
        out, place = _bytes_of(dst), 0
        for chunk in _groups(src):
            obstacle = self._codec.obstacle(chunk.shape, chunk.dtype)
            record = _raw(chunk) if obstacle else self._codec.encode(chunk.cpu())
            out[place : place + len(record)] = record
            place += len(record)
        return place

    def estimate_serialized_size(self, layout_desc: MemoryLayoutDesc) -> int:
        """The exact size: LMCache reads back as many bytes as this says."""
        groups = list(zip(layout_desc.shapes, layout_desc.dtypes, strict=True))
        for shape, dtype in groups:
            obstacle = self._codec.obstacle(shape, dtype)
            if obstacle and obstacle not in self._told:
                self._told.add(obstacle)
                _log.warning("stored as it is: %s", obstacle)
        return sum(_record_bytes(self._codec, shape, dtype) for shape, dtype in groups)


class SpectralDeserializer(Deserializer):  # type: ignore[misc]
    """Records to chunks. What it raises LMCache takes as a miss: the engine computes the tokens anew."""

    def __init__(self, codec: ChunkCodec) -> None:
        self._codec = codec

    def deserialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> None:
        """Fill the chunk ``dst`` from the record ``src``."""
        record, place = _bytes_of(src), 0
        for chunk in _groups(dst):
            end = place + _record_bytes(self._codec, chunk.shape, chunk.dtype)
            own, place = record[place:end], end
            if self._codec.obstacle(chunk.shape, chunk.dtype):
                _raw(chunk).copy_(own)
            else:
                chunk.copy_(self._codec.decode(own, chunk.shape, chunk.dtype))


class SpectralL2Adapter(L2AdapterInterface):  # type: ignore[misc]
    """Any adapter of LMCache's own, by its own parameters: there so that LMCache imports this module."""

    def __new__(cls, config: "SpectralL2AdapterConfig", l1_memory_desc: Any = None) -> Any:
        return create_l2_adapter_from_registry(config.inner, l1_memory_desc)


class SpectralL2AdapterConfig(L2AdapterConfigBase):  # type: ignore[misc]
    """``adapter_params``: a ``type`` that LMCache knows and what that type takes."""

    def __init__(self, inner: L2AdapterConfigBase) -> None:
        self.inner = inner

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> "SpectralL2AdapterConfig":
        """Raises InvalidArgumentError where the type is missing."""
        if not isinstance(d.get("type"), str):
            raise InvalidArgumentError(
                f'adapter_params must name the adapter to store with, {{"type": "fs", ...}}; got {d}'
            )
        return cls(get_l2_adapter_config_class(d["type"]).from_dict(d))

    @classmethod
    def help(cls) -> str:
        """One line for ``lmcache server --help``."""
        return "adapter_params: the type and the parameters of the adapter inside, e.g. type fs, base_path"


def create_serde(options: dict[str, Any]) -> SerdeProcessor:
    """The serde of type ``spectral``.

    ``options``: ``bits_per_element``, ``head_dim``, ``rope_theta`` and ``block_tokens`` as in ``ChunkCodec``;
    ``max_workers`` threads, 1.

    Raises:
        InvalidArgumentError: an option is missing, unknown or out of its range.
    """
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        raise InvalidArgumentError(f"the spectral serde takes {', '.join(_OPTIONS)}; got {', '.join(unknown)}")
    missing = [name for name in _OPTIONS[:2] if name not in options]
    if missing:
        raise InvalidArgumentError(f"the spectral serde needs {' and '.join(missing)}, e.g. head_dim 128")
    workers = options.get("max_workers", 1)
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise InvalidArgumentError(f"max_workers must be an integer of 1 or more, got {workers!r}")
    codec = ChunkCodec(
        options["bits_per_element"], options["head_dim"], options.get("rope_theta"), options.get("block_tokens")
    )
    return AsyncSerdeProcessor(SpectralSerializer(codec), SpectralDeserializer(codec), max_workers=workers)


def _record_bytes(codec: ChunkCodec, shape: Sequence[int], dtype: torch.dtype) -> int:
    if codec.obstacle(shape, dtype):
        return torch.Size(shape).numel() * dtype.itemsize
    return codec.nbytes(shape)


def _groups(memory: MemoryObj) -> list[Tensor]:
    """The chunk's tensors: one, or one for each group of like layers."""
    count = len(memory.get_shapes())
    tensors = [memory.tensor] if count == 1 else [memory.get_tensor(index) for index in range(count)]
    found = [tensor for tensor in tensors if tensor is not None]
    if len(found) < count:
        raise InvalidArgumentError("a chunk was taken back before it was coded")
    return found


def _bytes_of(memory: MemoryObj) -> Tensor:
    tensor = memory.tensor
    if tensor is None:
        raise InvalidArgumentError("a record's buffer was taken back before it was used")
    return tensor.flatten().view(torch.uint8)


def _raw(chunk: Tensor) -> Tensor:
    return chunk.view(-1).view(torch.uint8)


if "spectral" not in get_registered_serde_types():
    register_serde_factory("spectral", create_serde)
