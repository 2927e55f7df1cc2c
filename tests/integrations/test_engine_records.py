"""The serde for serving engines without an engine: its options, groups of layers, and its messages about raw chunks."""

import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from known_model import THETA, chunk_of, known_profile
from torch import Tensor

from unsloth_spectral.errors import InvalidArgumentError, LoadError
from unsloth_spectral.integrations.engine_options import records_from_options
from unsloth_spectral.integrations.engine_records import EngineRecords
from unsloth_spectral.integrations.profile_file import profile_to_json

HEADS = {"bits_per_element": 4.0, "layout": "heads", "head_dim": 64}
PLANES = {**HEADS, "layout": "planes"}
LATENT = {"bits_per_element": 4.5, "layout": "latent", "kv_lora_rank": 512, "qk_rope_head_dim": 64}


def chunk(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def there_and_back(records: EngineRecords, groups: list[Tensor]) -> tuple[int, list[Tensor]]:
    """The record's bytes, and what came back."""
    size = records.nbytes([group.shape for group in groups], [group.dtype for group in groups])
    record = torch.zeros(size, dtype=torch.uint8)
    assert records.encode(groups, record) == size
    back = [torch.full_like(group, 7) for group in groups]
    records.decode(record, back)
    return size, back


def relative_error(first: Tensor, second: Tensor) -> float:
    return float((first.float() - second.float()).norm() / first.float().norm())


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        (HEADS, (1, 3, 256, 512)),
        (HEADS, (3, 256, 512)),
        ({**HEADS, "layout": "blocks", "block_tokens": 128}, (1, 3, 256, 512)),
        (PLANES, (2, 3, 256, 256)),
        (PLANES, (1, 3, 256, 512)),
        (LATENT, (1, 3, 256, 576)),
        (LATENT, (3, 512, 576)),
    ],
)
def test_every_layout_is_compressed(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    records, group = records_from_options(options), chunk(*shape)
    size, (back,) = there_and_back(records, [group])
    assert size == int(options["bits_per_element"] * group.numel() / 8)
    assert relative_error(group, back) < 0.35  # noise: no spectrum to make use of
    assert records.stats() == {"chunks": 1, "raw": 0, "raw_because": {}}


@pytest.mark.parametrize(
    ("options", "shape", "dtype", "reason"),
    [
        (HEADS, (1, 2, 256, 576), torch.bfloat16, '"layout": "latent"'),
        (HEADS, (2, 2, 256, 512), torch.bfloat16, '"layout": "planes"'),
        (HEADS, (1, 2, 256, 512), torch.uint8, "floating dtype"),
        (HEADS, (1, 2, 64, 512), torch.bfloat16, "raise the chunk size"),
        (LATENT, (1, 2, 256, 656), torch.bfloat16, "576"),
    ],
)
def test_what_is_stored_raw_comes_back_exactly_and_is_counted_with_its_reason(
    options: dict[str, Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    records, group = records_from_options(options), chunk(*shape, dtype=dtype)
    with caplog.at_level(logging.WARNING, "unsloth_spectral"):
        size, (back,) = there_and_back(records, [group])
    assert size == group.numel() * dtype.itemsize
    assert torch.equal(back, group)
    stats = records.stats()
    assert (stats["chunks"], stats["raw"]) == (1, 1)
    ((stored_reason, count),) = stats["raw_because"].items()
    assert reason in stored_reason
    assert count == 1
    assert [record.getMessage() for record in caplog.records] == [f"stored raw: 1 of 1 chunks so far: {stored_reason}"]


def test_the_log_says_how_many_chunks_were_stored_raw(caplog: pytest.LogCaptureFixture) -> None:
    records, group = records_from_options(HEADS), chunk(1, 1, 1, 128)
    record = torch.zeros(256, dtype=torch.uint8)
    with caplog.at_level(logging.WARNING, "unsloth_spectral"):
        for _ in range(125):
            records.encode([group], record)
        records.close()
    reason = "chunks must have 256 tokens or more, got 1: raise the chunk size"
    assert [record.getMessage() for record in caplog.records] == [
        *(f"stored raw: {count} of {count} chunks so far: {reason}" for count in (1, 10, 100)),
        f"stored raw: 125 of 125 chunks in all: {reason}",
    ]


def test_nothing_is_said_where_nothing_is_raw(caplog: pytest.LogCaptureFixture) -> None:
    records = records_from_options(HEADS)
    with caplog.at_level(logging.WARNING, "unsloth_spectral"):
        there_and_back(records, [chunk(1, 2, 256, 128)])
        records.close()
    assert caplog.records == []


def test_chunks_are_counted_from_several_threads() -> None:
    records, group = records_from_options(HEADS), chunk(1, 1, 1, 128)

    def store() -> None:
        record = torch.zeros(256, dtype=torch.uint8)
        for _ in range(200):
            records.encode([group], record)

    threads = [threading.Thread(target=store) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = records.stats()
    assert (stats["chunks"], stats["raw"], sum(stats["raw_because"].values())) == (800, 800, 800)


def test_groups_of_layers_have_sizes_of_their_own() -> None:
    """As a model whose sliding layers have heads of another size."""
    records = records_from_options({**HEADS, "head_dim": [64, 128]})
    groups = [chunk(1, 3, 256, 512), chunk(1, 1, 256, 256)]
    size, back = there_and_back(records, groups)
    assert size == sum(group.numel() // 2 for group in groups)
    assert max(map(relative_error, groups, back)) < 0.35
    assert records.stats()["raw"] == 0


@pytest.mark.parametrize(
    ("options", "width"), [({**HEADS, "head_dim": [None, 64]}, 512), ({**LATENT, "kv_lora_rank": [None, 512]}, 576)]
)
def test_a_group_that_the_options_leave_out_is_stored_raw(options: dict[str, Any], width: int) -> None:
    """States of recurrent layers have the shape of keys and values and must not be rounded."""
    records = records_from_options(options)
    states, attended = chunk(1, 3, 256, width), chunk(1, 1, 256, width)
    size, back = there_and_back(records, [states, attended])
    assert size == 2 * states.numel() + int(options["bits_per_element"] * attended.numel() / 8)
    assert torch.equal(back[0], states)
    assert not torch.equal(back[1], attended)
    stats = records.stats()
    assert (stats["chunks"], stats["raw"]) == (1, 1)
    assert "null for group 0" in next(iter(stats["raw_because"]))


@pytest.mark.parametrize(("options", "width"), [(HEADS, 512), ({**HEADS, "head_dim": [64] * 3}, 512), (LATENT, 576)])
def test_groups_that_the_options_do_not_count_are_stored_raw(options: dict[str, Any], width: int) -> None:
    records = records_from_options(options)
    groups = [chunk(1, 3, 256, width), chunk(1, 1, 256, width)]
    _, back = there_and_back(records, groups)
    assert all(map(torch.equal, back, groups))
    ((reason, count),) = records.stats()["raw_because"].items()
    assert "2 groups of layers" in reason
    assert "write a list" in reason
    assert count == 1


def test_a_chunk_that_cannot_be_coded_is_not_counted() -> None:
    records, group = records_from_options(HEADS), chunk(1, 2, 256, 128)
    group[0, 1, 17, 3] = float("nan")
    with pytest.raises(InvalidArgumentError, match="finite"):
        records.encode([group], torch.zeros(group.numel(), dtype=torch.uint8))
    assert records.stats()["chunks"] == 0


def test_a_record_of_another_layout_is_refused() -> None:
    group = chunk(1, 2, 256, 256)
    record = torch.zeros(group.numel() // 2, dtype=torch.uint8)
    records_from_options(HEADS).encode([group], record)
    with pytest.raises(LoadError, match="other options"):
        records_from_options(PLANES).decode(record, [torch.empty_like(group)])


PROFILE = known_profile(3, 2, 64)
WITH_PROFILE = {"bits_per_element": 3.0, "layout": "planes", "head_dim": 64, "rope_theta": THETA}


@pytest.fixture
def profile(tmp_path: Path) -> str:
    """The path of a profile of three layers of two heads of 64."""
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile_to_json(PROFILE)))
    return str(path)


def test_records_follow_the_profile_that_the_options_name(profile: str) -> None:
    group, lost = chunk_of(PROFILE, 256, 3), []
    for options in (WITH_PROFILE, {**WITH_PROFILE, "profile": profile}, {**WITH_PROFILE, "profile": [profile]}):
        size, (back,) = there_and_back(records_from_options(options), [group])
        assert size == 3 * group.numel() // 8
        lost.append(relative_error(group[0], back[0]))
    assert lost[2] == lost[1] != lost[0]


def test_servers_of_different_profiles_refuse_each_others_records(profile: str, tmp_path: Path) -> None:
    group = chunk_of(PROFILE, 256, 3)
    record = torch.zeros(3 * group.numel() // 8, dtype=torch.uint8)
    records_from_options({**WITH_PROFILE, "profile": profile}).encode([group], record)
    other = tmp_path / "other.json"
    other.write_text(json.dumps(profile_to_json(known_profile(3, 2, 64, seed=1))))
    with pytest.raises(LoadError, match="other options"):
        records_from_options({**WITH_PROFILE, "profile": str(other)}).decode(record, [torch.empty_like(group)])
    with pytest.raises(LoadError, match="another version"):
        records_from_options(WITH_PROFILE).decode(record, [torch.empty_like(group)])


def test_chunks_of_another_model_than_the_profiles_are_stored_raw(profile: str) -> None:
    records, group = records_from_options({**WITH_PROFILE, "profile": profile}), chunk(2, 4, 256, 128)
    _, (back,) = there_and_back(records, [group])
    assert torch.equal(back, group)
    ((reason, _),) = records.stats()["raw_because"].items()
    assert "the profile is of 3 layers of 2 heads of 64, and chunks have 4 of 2 of 64" in reason


def test_a_group_of_layers_may_have_no_profile(profile: str) -> None:
    options = {**WITH_PROFILE, "head_dim": [64, 64], "profile": [None, profile]}
    records, groups = records_from_options(options), [chunk(2, 5, 256, 128), chunk_of(PROFILE, 256, 1)]
    there_and_back(records, groups)
    assert records.stats()["raw"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"profile": "/nowhere/profile.json"}, "/nowhere/profile.json cannot be read (No such file or directory)"),
        ({"profile": 5}, "profile must be the path of a profile"),
        ({"profile": ["a", "b"]}, "for each of 1 groups of layers, got ['a', 'b']"),
        ({"profile": [5]}, "profile must be the path of a profile"),
    ],
)
def test_profiles_that_cannot_be_used_are_refused_at_the_start(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        records_from_options({**WITH_PROFILE, **changes})
    assert message in str(refused.value)


def test_latents_take_no_profile(profile: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r'with layout "latent" the spectral serde takes .*; got profile'):
        records_from_options({**LATENT, "profile": profile})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, 'add "layout": "heads" for vLLM since 0.26'),
        ({**HEADS, "layout": None}, 'add "layout": "heads"'),
        ({**HEADS, "layout": "fused"}, "layout must be one of heads, blocks, planes, latent, got 'fused'"),
        ({**HEADS, "layout": ["heads"]}, "layout must be one of"),
        ({"layout": "heads"}, 'needs bits_per_element and head_dim: add e.g. "bits_per_element": 2.5, "head_dim": 128'),
        ({"layout": "latent", "bits_per_element": 4.5}, '"kv_lora_rank": 512, "qk_rope_head_dim": 64'),
        ({**LATENT, "qk_rope_head_dim": None}, "needs qk_rope_head_dim"),
        ({**LATENT, "head_dim": 128}, "got head_dim"),
        ({**HEADS, "kv_lora_rank": 512}, "got kv_lora_rank"),
        ({**PLANES, "block_tokens": 128}, "got block_tokens"),
        ({**HEADS, "block_tokens": 128}, "got block_tokens"),
        ({**HEADS, "layout": "blocks"}, 'needs block_tokens: add e.g. "block_tokens": 128'),
        ({**HEADS, "theta": 1e4}, "got theta"),
        ({**HEADS, "head_dim": []}, "head_dim must be a number, or a list"),
        ({**HEADS, "head_dim": [None]}, "head_dim must be a number, or a list"),
        ({**HEADS, "head_dim": [64, 63]}, "head_dim must be an even integer"),
        ({**HEADS, "head_dim": "64"}, "head_dim must be an even integer"),
        ({**HEADS, "bits_per_element": 40}, "bits_per_element"),
        ({**HEADS, "rope_theta": 0.5}, "rope_theta"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        records_from_options(options)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
