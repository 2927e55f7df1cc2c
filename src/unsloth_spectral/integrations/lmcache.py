"""Spectral records in LMCache (0.5.6 or newer), which make offloaded and shared prefixes several times smaller.

Configuration alone loads this module: an L2 adapter of type ``plugin`` that names it, with any of LMCache's own
adapters inside, and a serde of type ``spectral`` (docs/engines.md has complete commands):

    {"type": "plugin", "module_path": "unsloth_spectral.integrations.lmcache", "class_name": "SpectralL2Adapter",
     "adapter_params": {"type": "fs", "base_path": "/var/cache/kv"},
     "serde": {"type": "spectral", "bits_per_element": 2.5, "layout": "heads", "head_dim": 128, "rope_theta": 500000}}

Importing this module registers the serde, so that LMCache finds it; no other module of this package imports it.
"""

from typing import Any

import torch
from lmcache.logging import init_logger
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

from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.integrations.engine_options import records_from_options
from unsloth_spectral.integrations.engine_records import EngineRecords

# LMCache creates adapters and serdes separately, and asks only adapters for their status.
_open_records: list[EngineRecords] = []


class SpectralSerializer(Serializer):  # type: ignore[misc]
    """Encodes chunks into records."""

    def __init__(self, records: EngineRecords) -> None:
        self._records = records

    def serialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> int:
        """Fill ``dst``, a byte buffer of the estimated size; returns that size."""
        return self._records.encode(_groups(src), _bytes_of(dst))

    def estimate_serialized_size(self, layout_desc: MemoryLayoutDesc) -> int:
        """The exact size of the record, because LMCache reads back this many bytes."""
        return self._records.nbytes(layout_desc.shapes, layout_desc.dtypes)


class SpectralDeserializer(Deserializer):  # type: ignore[misc]
    """Decodes records into chunks. LMCache treats an exception as a miss: the engine computes the tokens again."""

    def __init__(self, records: EngineRecords) -> None:
        self._records = records

    def deserialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> None:
        """Fill the chunk ``dst`` from the record ``src``."""
        self._records.decode(_bytes_of(src), _groups(dst))


class SpectralSerde(AsyncSerdeProcessor):  # type: ignore[misc]
    """Serializer and deserializer in threads. While it is open, the adapters' status has its count of raw chunks."""

    def __init__(self, records: EngineRecords, max_workers: int) -> None:
        super().__init__(SpectralSerializer(records), SpectralDeserializer(records), max_workers=max_workers)
        self._records = records
        _open_records.append(records)

    def close(self) -> None:
        """Finish running work, and log how many chunks were stored raw."""
        super().close()
        if self._records in _open_records:
            _open_records.remove(self._records)
            self._records.close()


class SpectralL2Adapter(L2AdapterInterface):  # type: ignore[misc]
    """Any of LMCache's own adapters, with that adapter's parameters. It exists so that LMCache imports this module.

    Its status, which ``lmcache server`` shows under ``/status``, also has the ``stats`` of the spectral serdes.
    """

    def __new__(cls, config: "SpectralL2AdapterConfig", l1_memory_desc: Any = None) -> Any:
        adapter = create_l2_adapter_from_registry(config.inner, l1_memory_desc)
        report = adapter.report_status
        adapter.report_status = lambda: {**report(), "spectral": [records.stats() for records in _open_records]}
        return adapter


class SpectralL2AdapterConfig(L2AdapterConfigBase):  # type: ignore[misc]
    """``adapter_params``: a ``type`` that LMCache knows, and the parameters of that type."""

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

    ``options``: those of ``records_from_options``, and ``max_workers``, the number of threads (1 by default).

    Raises:
        InvalidArgumentError: an option is missing, unknown or out of its range.
    """
    workers = options.get("max_workers", 1)
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise InvalidArgumentError(f"max_workers must be an integer of 1 or more, got {workers!r}")
    records = records_from_options(options)
    init_logger("unsloth_spectral")  # the server prints nothing of loggers that LMCache has not set up
    return SpectralSerde(records, workers)


def _groups(memory: MemoryObj) -> list[Tensor]:
    """The tensors of a chunk, one for each group of equal layers."""
    count = len(memory.get_shapes())
    tensors = [memory.tensor] if count == 1 else [memory.get_tensor(index) for index in range(count)]
    groups = [tensor for tensor in tensors if tensor is not None]
    if len(groups) < count:
        raise InvalidArgumentError("a chunk was taken back before it was coded")
    return groups


def _bytes_of(memory: MemoryObj) -> Tensor:
    tensor = memory.tensor
    if tensor is None:
        raise InvalidArgumentError("a record's buffer was taken back before it was used")
    return tensor.flatten().view(torch.uint8)


if "spectral" not in get_registered_serde_types():
    register_serde_factory("spectral", create_serde)
