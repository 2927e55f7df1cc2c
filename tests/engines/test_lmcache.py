"""The spectral serde inside the real LMCache: its factory, its memory objects, its worker thread, its adapters."""

import logging
import select
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("lmcache")

from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.l2_adapters.config import get_l2_adapter_config_class
from lmcache.v1.distributed.l2_adapters.factory import create_l2_adapter_from_registry
from lmcache.v1.distributed.l2_adapters.fs_l2_adapter import FSL2Adapter
from lmcache.v1.distributed.serde import SerdeConfig, create_serde_processor
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj

from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.integrations import lmcache as spectral_lmcache

OPTIONS = {"bits_per_element": 4.0, "head_dim": 64, "rope_theta": 10_000}
KEY = ObjectKey(chunk_hash=b"0" * 32, model_name="model", kv_rank=0)


def memory(tensor: Tensor) -> TensorMemoryObj:
    nbytes = tensor.numel() * tensor.element_size()
    metadata = MemoryObjMetadata(
        shape=tensor.shape,
        dtype=tensor.dtype,
        address=0,
        phy_size=nbytes,
        ref_count=1,
        fmt=MemoryFormat.KV_2LTD,
        shapes=[tensor.shape],
        dtypes=[tensor.dtype],
    )
    return TensorMemoryObj(raw_data=tensor.flatten().view(torch.uint8), metadata=metadata, parent_allocator=None)


def finish(descriptor: int, query: Any, task: int) -> bool:
    """The outcome of a task, once its event has come."""
    for _ in range(600):
        select.select([descriptor], [], [], 1.0)
        outcome: bool | None = query(task)
        if outcome is not None:
            return outcome
    raise AssertionError("the serde never answered")


def there_and_back(chunk: Tensor, options: dict[str, Any]) -> tuple[int, bool, Tensor]:
    """Bytes stored, whether it went well, and what came back."""
    serde = create_serde_processor(SerdeConfig("spectral", options))
    try:
        size = serde.estimate_serialized_size(MemoryLayoutDesc(shapes=[chunk.shape], dtypes=[chunk.dtype]))
        record = memory(torch.zeros(size, dtype=torch.uint8))
        task = serde.submit_serialize([memory(chunk)], [record], [KEY])
        if not finish(serde.get_serialize_event_fd(), serde.query_serialize_result, task):
            return size, False, torch.empty(0)
        assert record.get_size() == size  # what LMCache stores, and what it will ask for
        back = torch.full_like(chunk, 7)
        task = serde.submit_deserialize([record], [memory(back)], [KEY])
        good = finish(serde.get_deserialize_event_fd(), serde.query_deserialize_result, task)
        return size, good, back
    finally:
        serde.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 3, 256, 128), (3, 256, 256), (2, 5, 512, 64)])
def test_chunks_of_both_layouts_come_back(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    falling = (torch.arange(1, 65) ** -0.7).repeat(shape[-1] // 64)
    chunk = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * falling).to(dtype)
    size, good, back = there_and_back(chunk, {**OPTIONS, "rope_theta": None})
    assert good
    assert size == chunk.numel() * 4 // 8
    error = (back.float() - chunk.float()).norm() / chunk.float().norm()
    assert float(error) < 0.15


def test_a_layout_it_cannot_code_is_stored_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    """As multi-head latent attention's: 576 numbers a token, no keys and values apart."""
    chunk = torch.randn(4, 256, 576, generator=torch.Generator().manual_seed(0)).half()
    with caplog.at_level(logging.WARNING, "unsloth_spectral"):
        size, good, back = there_and_back(chunk, {**OPTIONS, "head_dim": 128})
    assert good
    assert size == 2 * chunk.numel()
    assert torch.equal(back, chunk)
    assert [record.message for record in caplog.records if "stored as it is" in record.message]


def test_a_chunk_with_infinities_is_not_stored() -> None:
    chunk = torch.zeros(2, 1, 256, 64)
    chunk[0, 0, 5, 5] = float("inf")
    _, good, _ = there_and_back(chunk, OPTIONS)
    assert not good


def test_an_altered_record_is_a_miss() -> None:
    serde = create_serde_processor(SerdeConfig("spectral", OPTIONS))
    try:
        chunk = torch.randn(2, 2, 256, 64, generator=torch.Generator().manual_seed(0))
        size = serde.estimate_serialized_size(MemoryLayoutDesc(shapes=[chunk.shape], dtypes=[chunk.dtype]))
        stored = torch.zeros(size, dtype=torch.uint8)
        task = serde.submit_serialize([memory(chunk)], [memory(stored)], [KEY])
        assert finish(serde.get_serialize_event_fd(), serde.query_serialize_result, task)
        stored[size // 2] ^= 1
        task = serde.submit_deserialize([memory(stored)], [memory(torch.empty_like(chunk))], [KEY])
        assert not finish(serde.get_deserialize_event_fd(), serde.query_deserialize_result, task)
    finally:
        serde.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits_per_element": None}, "bits_per_element"),
        ({"bits_per_element": 40}, "bits_per_element"),
        ({"head_dim": 63}, "head_dim"),
        ({"theta": 1e4}, "got theta"),
        ({"max_workers": 0}, "max_workers"),
    ],
)
def test_options_are_checked_when_the_server_starts(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        create_serde_processor(SerdeConfig("spectral", {**OPTIONS, **change}))


def test_missing_options_are_named() -> None:
    with pytest.raises(InvalidArgumentError, match="needs bits_per_element and head_dim"):
        create_serde_processor(SerdeConfig("spectral", {}))


def test_the_plugin_is_the_adapter_inside(tmp_path: Path) -> None:
    config = get_l2_adapter_config_class("plugin").from_dict(
        {
            "type": "plugin",
            "module_path": spectral_lmcache.__name__,
            "class_name": "SpectralL2Adapter",
            "adapter_params": {"type": "fs", "base_path": str(tmp_path)},
        }
    )
    adapter = create_l2_adapter_from_registry(config)
    try:
        assert isinstance(adapter, FSL2Adapter)
    finally:
        adapter.close()
    with pytest.raises(InvalidArgumentError, match="adapter_params"):
        spectral_lmcache.SpectralL2AdapterConfig.from_dict({"base_path": "/somewhere"})
