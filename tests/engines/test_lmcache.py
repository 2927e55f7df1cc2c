"""The spectral serde inside the real LMCache: its factory, its memory objects, its worker thread, its adapters."""

import json
import select
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("lmcache")

from known_model import THETA, chunk_of, known_profile
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.l2_adapters.config import get_l2_adapter_config_class
from lmcache.v1.distributed.l2_adapters.factory import create_l2_adapter_from_registry
from lmcache.v1.distributed.l2_adapters.fs_l2_adapter import FSL2Adapter
from lmcache.v1.distributed.serde import SerdeConfig, create_serde_processor
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj

from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.integrations import lmcache as spectral_lmcache
from unsloth_spectral.integrations.profile_file import profile_to_json

OPTIONS = {"bits_per_element": 4.0, "layout": "heads", "head_dim": 64, "rope_theta": 10_000}
PLANES = {**OPTIONS, "layout": "planes", "rope_theta": None}
LATENT = {"bits_per_element": 4.5, "layout": "latent", "kv_lora_rank": 512, "qk_rope_head_dim": 64}
KEY = ObjectKey(chunk_hash=b"0" * 32, model_name="model", kv_rank=0)


def memory(*tensors: Tensor) -> TensorMemoryObj:
    """One memory object, with a group for each tensor."""
    parts = [tensor.flatten().view(torch.uint8) for tensor in tensors]
    metadata = MemoryObjMetadata(
        shape=tensors[0].shape,
        dtype=tensors[0].dtype,
        address=0,
        phy_size=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        ref_count=1,
        fmt=MemoryFormat.KV_2LTD,
        shapes=[tensor.shape for tensor in tensors],
        dtypes=[tensor.dtype for tensor in tensors],
    )
    # A single tensor is not copied, so that a test sees what is written to it.
    raw = parts[0] if len(parts) == 1 else torch.cat(parts)
    return TensorMemoryObj(raw_data=raw, metadata=metadata, parent_allocator=None)


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


def test_chunks_follow_the_profile_of_the_model(tmp_path: Path) -> None:
    profile, lost = known_profile(3, 2, 64), []
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile_to_json(profile)))
    chunk = chunk_of(profile, 256, 5).half()
    for more in ({}, {"profile": str(path)}):
        size, good, back = there_and_back(chunk, {**PLANES, "rope_theta": THETA, "bits_per_element": 2.5, **more})
        assert good
        assert size == int(2.5 * chunk.numel() / 8)
        lost.append(float((back[0].float() - chunk[0].float()).norm()))
    assert lost[1] != lost[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("options", "shape"),
    [
        (OPTIONS | {"rope_theta": None}, (1, 3, 256, 256)),
        (OPTIONS | {"rope_theta": None}, (3, 256, 256)),
        (PLANES, (2, 3, 256, 128)),
        (PLANES, (2, 5, 512, 64)),
        (PLANES, (1, 3, 256, 256)),
        (LATENT, (1, 3, 256, 576)),
    ],
)
def test_chunks_of_every_layout_come_back(options: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    falling = (torch.arange(1, 65) ** -0.7).repeat(shape[-1] // 64)
    chunk = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * falling).to(dtype)
    size, good, back = there_and_back(chunk, options)
    assert good
    assert size == int(chunk.numel() * options["bits_per_element"] / 8)
    error = (back.float() - chunk.float()).norm() / chunk.float().norm()
    assert float(error) < 0.15


def test_several_groups_of_layers_come_back() -> None:
    """A sliding and a full group with heads of their own, and recurrent states, which stay as they are."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 3, 256, 512), (1, 1, 256, 256), (1, 4, 256, 256)]
    groups = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    serde = create_serde_processor(SerdeConfig("spectral", {**OPTIONS, "head_dim": [64, 128, None]}))
    try:
        size = serde.estimate_serialized_size(
            MemoryLayoutDesc(shapes=[group.shape for group in groups], dtypes=[group.dtype for group in groups])
        )
        assert size == groups[0].numel() // 2 + groups[1].numel() // 2 + 2 * groups[2].numel()
        record, target = memory(torch.zeros(size, dtype=torch.uint8)), memory(*map(torch.zeros_like, groups))
        task = serde.submit_serialize([memory(*groups)], [record], [KEY])
        assert finish(serde.get_serialize_event_fd(), serde.query_serialize_result, task)
        task = serde.submit_deserialize([record], [target], [KEY])
        assert finish(serde.get_deserialize_event_fd(), serde.query_deserialize_result, task)
        back = [target.get_tensor(index) for index in range(3)]
        assert torch.equal(back[2], groups[2])
        for coded, group in zip(back[:2], groups[:2], strict=True):
            assert float((coded.float() - group.float()).norm() / group.float().norm()) < 0.35
    finally:
        serde.close()


def test_a_chunk_stored_raw_is_in_the_status_and_in_what_the_server_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The serde gets latents where heads were configured."""
    adapter = create_l2_adapter_from_registry(plugin_config(tmp_path))
    serde = create_serde_processor(SerdeConfig("spectral", {**OPTIONS, "head_dim": 128}))
    try:
        chunk = torch.randn(1, 4, 256, 576, generator=torch.Generator().manual_seed(0)).half()
        record = memory(torch.zeros(2 * chunk.numel(), dtype=torch.uint8))
        assert adapter.report_status()["spectral"] == [{"chunks": 0, "raw": 0, "raw_because": {}}]
        task = serde.submit_serialize([memory(chunk)], [record], [KEY])
        assert finish(serde.get_serialize_event_fd(), serde.query_serialize_result, task)
        status = adapter.report_status()
        assert status["is_healthy"]
        (stats,) = status["spectral"]
        assert (stats["chunks"], stats["raw"]) == (1, 1)
        assert '"layout": "latent"' in next(iter(stats["raw_because"]))
        assert json.loads(json.dumps(status)) == status
        assert "stored raw: 1 of 1 chunks so far: the last size of" in capsys.readouterr().err
        back = torch.zeros_like(chunk)
        task = serde.submit_deserialize([record], [memory(back)], [KEY])
        assert finish(serde.get_deserialize_event_fd(), serde.query_deserialize_result, task)
        assert torch.equal(back, chunk)
    finally:
        serde.close()
        adapter.close()
    assert "stored raw: 1 of 1 chunks in all: the last size of" in capsys.readouterr().err
    assert adapter.report_status()["spectral"] == []


def test_a_chunk_with_infinities_is_not_stored() -> None:
    chunk = torch.zeros(2, 1, 256, 64)
    chunk[0, 0, 5, 5] = float("inf")
    _, good, _ = there_and_back(chunk, PLANES)
    assert not good


@pytest.mark.parametrize("is_older", [False, True])
def test_an_altered_or_older_record_is_a_miss(is_older: bool) -> None:
    serde = create_serde_processor(SerdeConfig("spectral", PLANES))
    try:
        chunk = torch.randn(2, 2, 256, 64, generator=torch.Generator().manual_seed(0))
        size = serde.estimate_serialized_size(MemoryLayoutDesc(shapes=[chunk.shape], dtypes=[chunk.dtype]))
        stored = torch.zeros(size, dtype=torch.uint8)
        task = serde.submit_serialize([memory(chunk)], [memory(stored)], [KEY])
        assert finish(serde.get_serialize_event_fd(), serde.query_serialize_result, task)
        if is_older:
            stored[:4] = torch.tensor(list(b"USC1"), dtype=torch.uint8)
        else:
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
        ({"layout": None}, 'add "layout": "heads"'),
        ({"max_workers": 0}, "max_workers"),
    ],
)
def test_options_are_checked_when_the_server_starts(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        create_serde_processor(SerdeConfig("spectral", {**OPTIONS, **change}))


def test_missing_options_are_named() -> None:
    with pytest.raises(InvalidArgumentError, match="needs bits_per_element and head_dim"):
        create_serde_processor(SerdeConfig("spectral", {"layout": "heads"}))


def plugin_config(folder: Path) -> Any:
    return get_l2_adapter_config_class("plugin").from_dict(
        {
            "type": "plugin",
            "module_path": spectral_lmcache.__name__,
            "class_name": "SpectralL2Adapter",
            "adapter_params": {"type": "fs", "base_path": str(folder)},
        }
    )


def test_the_plugin_is_the_adapter_inside(tmp_path: Path) -> None:
    adapter = create_l2_adapter_from_registry(plugin_config(tmp_path))
    try:
        assert isinstance(adapter, FSL2Adapter)
    finally:
        adapter.close()
    with pytest.raises(InvalidArgumentError, match="adapter_params"):
        spectral_lmcache.SpectralL2AdapterConfig.from_dict({"base_path": "/somewhere"})
