"""The file of a snapshot: reading returns what was written, and any other file is refused."""

import json
import multiprocessing
import os
import random
import signal
import stat
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from unsloth_spectral.cache import snapshot
from unsloth_spectral.errors import InvalidArgumentError, LoadError

CPU = torch.device("cpu")
SHARED = torch.arange(6.0)
FIELDS: dict[str, Any] = {
    "float": torch.randn(3, 5),
    "bfloat": torch.randn(2, 3).bfloat16(),
    "half, transposed": torch.randn(2, 4, 6).half().mT,
    "codes": torch.arange(7, dtype=torch.uint8),
    "signed": torch.arange(-3, 3, dtype=torch.int8),
    "long": torch.tensor([2**40, -1]),
    "double": torch.randn(3, dtype=torch.float64),
    "complex": torch.complex(torch.randn(1, 3, 4), torch.randn(1, 3, 4)),
    "bool": torch.tensor([True, False]),
    "nothing": torch.empty(0, 3),
    "one": torch.tensor(3),
    "view": torch.randn(4, 10)[:, 3:5],
    "first": SHARED,
    "second": SHARED,
    "alias": SHARED.view(2, 3),
}
HEADER = {"a": 1, "b": {"c": "text"}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    snapshot.write(tmp_path / "a.safetensors", HEADER, FIELDS)
    return tmp_path / "a.safetensors"


def refusal(path: Path) -> str:
    with pytest.raises(LoadError) as caught:
        snapshot.read(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_everything_comes_back(path: Path) -> None:
    opened = snapshot.read(path)
    assert opened.header.integer("a") == 1
    assert opened.header.sub("b").text("c") == "text"
    for name, expected in FIELDS.items():
        tensor = opened.fields.tensor(name, None, None)
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected), name
        assert tensor.untyped_storage().nbytes() == expected.numel() * expected.element_size(), name
    # Products over it are summed in the same order as before.
    assert opened.fields.tensor("half, transposed", None, None).stride() == FIELDS["half, transposed"].stride()
    assert opened.num_tensors == len(FIELDS) - 1


def test_one_tensor_stays_one(path: Path) -> None:
    fields = snapshot.read(path).fields
    first, second = (fields.tensor(name, torch.float32, (6,)) for name in ("first", "second"))
    assert first is second
    assert fields.tensor("alias", torch.float32, (2, 3)) is not first


def test_codes_are_mapped_and_writing_to_them_leaves_the_file_alone(path: Path) -> None:
    before = path.read_bytes()
    codes = snapshot.read(path).fields.tensor("codes", torch.uint8, (7,))
    if sys.platform == "linux":
        maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
        ranges = [[int(end, 16) for end in line[0].split("-")] for line in maps]
        assert any(start <= codes.data_ptr() < end for start, end in ranges), "read, not mapped"
    codes.fill_(9)
    assert path.read_bytes() == before
    assert snapshot.read(path).fields.tensor("codes", torch.uint8, (7,)).tolist() == list(range(7))


def test_anyone_can_read_it(path: Path) -> None:
    """The file is plain safetensors."""
    assert torch.equal(load_file(path)["0"], FIELDS["float"])
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["record"])
    assert set(record) == {"header", "fields", "tensors"}
    assert record["header"] == HEADER


def test_every_altered_byte_is_seen(path: Path) -> None:
    content = path.read_bytes()
    draw = random.Random(0)
    begin = 8 + struct.unpack("<Q", content[:8])[0]
    # The length of the header, every byte of the data, and many within the header.
    places = [*range(8), *range(begin, len(content)), *draw.sample(range(8, begin), 400)]
    missed = []
    for place in places:
        altered = bytearray(content)
        altered[place] ^= 1 << draw.randrange(8)
        path.write_bytes(altered)
        try:
            snapshot.read(path)
        except LoadError:
            continue
        missed.append(place)
    assert not missed, [content[max(0, place - 20) : place + 20] for place in missed]


def test_every_truncation_is_seen(path: Path) -> None:
    content = path.read_bytes()
    for length in {0, 1, 7, 8, 9, len(content) - 1, *random.Random(0).sample(range(len(content)), 50)}:
        path.write_bytes(content[:length])
        assert "truncated" in refusal(path)
    path.write_bytes(content + b"\0")
    refusal(path)


def test_what_is_no_snapshot(tmp_path: Path, path: Path) -> None:
    assert "no snapshot at" in refusal(tmp_path / "missing.safetensors")
    refusal(tmp_path)
    other = tmp_path / "b.safetensors"
    save_file({"0": torch.zeros(3)}, other)
    assert "is no snapshot of a spectral cache" in refusal(other)
    other.write_bytes(b"PK\3\4 a pickle in a zip file, as torch.save writes it")
    assert "truncated, or no safetensors file" in refusal(other)


def test_what_is_no_file(tmp_path: Path) -> None:
    assert "is a folder, pipe or device" in refusal(tmp_path)
    assert "is a folder, pipe or device" in refusal(Path("/dev/null"))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    both_ends = os.open(pipe, os.O_RDWR)  # else a reader that opens it waits for good
    try:
        assert "is a folder, pipe or device" in refusal(pipe)
    finally:
        os.close(both_ends)


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_file_that_goes_while_it_is_opened(is_gone: bool, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*args: Any, **kwargs: Any) -> None:
        if is_gone:
            path.unlink()
        raise RuntimeError("unable to map it")

    monkeypatch.setattr(snapshot, "safe_open", opened)
    assert ("no snapshot at" if is_gone else "cannot be mapped (unable to map it)") in refusal(path)


def rewrite(path: Path, **changes: str) -> None:
    """The same tensors with other metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, {**metadata, **changes})


def with_record(path: Path, change: Callable[[Any], None]) -> None:
    """A file whose record was changed and whose checksum was recomputed."""
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["record"])
    change(record)
    text = json.dumps(record)
    rewrite(path, record=text, record_sha256=snapshot._digest_of(text))


@pytest.mark.parametrize("version", [2, 8, 10])
def test_another_version(path: Path, version: int) -> None:
    rewrite(path, version=str(version))
    expected = f"is a snapshot of format {version}, which this version cannot convert to its own, 9: make it again from"
    assert expected in refusal(path)


def test_an_altered_record(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        record = file.metadata()["record"]
    rewrite(path, record=record.replace('"a": 1', '"a": 2'))
    assert "the checksum of its record differs" in refusal(path)


def test_altered_tensors(path: Path) -> None:
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({**tensors, "0": tensors["0"] + 1}, path, metadata)
    assert "the checksum of tensor 0 differs" in refusal(path)
    save_file({**tensors, "0": tensors["0"].flatten()}, path, metadata)
    assert "tensor 0 is not what its record says" in refusal(path)
    save_file({**tensors, "more": torch.zeros(1)}, path, metadata)
    assert "it holds other tensors than its record says" in refusal(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("fields"),
        lambda record: record.update(tensors=3),
        lambda record: record["tensors"][0].pop("sha256"),
        lambda record: record["tensors"].__setitem__(0, "text"),
        lambda record: record["tensors"][0].update(order=[0, 0]),
        lambda record: record["tensors"][0].update(order="x"),
        lambda record: record["tensors"][0].update(is_complex=True),
        lambda record: record.update(fields=[]),
    ],
    ids=range(8),
)
def test_a_record_made_up(path: Path, change: Callable[[Any], None]) -> None:
    with_record(path, change)
    refusal(path)


def test_fields_made_up_are_refused_when_they_are_asked_for(path: Path) -> None:
    with_record(path, lambda record: record["fields"].update(codes={"$tensor": 99}, float="text", one=True, long=-1))
    fields = snapshot.read(path).fields
    requests: dict[str, Callable[[], Any]] = {
        "refers to a tensor 99": lambda: fields.tensor("codes", None, None),
        "must have a tensor as 'float'": lambda: fields.tensor("float", None, None),
        "must have an integer of at least 0 as 'one'": lambda: fields.integer("one"),
        "must have an integer of at least 0 as 'long'": lambda: fields.integer("long"),
        "must have a field 'missing'": lambda: fields.integer("missing"),
        "must have a number as 'float'": lambda: fields.number("float"),
        "must have true or false as 'float'": lambda: fields.flag("float"),
        "must have a floating point dtype as 'float'": lambda: fields.dtype("float"),
        "must have a list as 'float'": lambda: fields.subs("float"),
        "'float' must have fields|float must have fields": lambda: fields.sub("float"),
        "must have torch.float16 as 'double', not torch.float64": lambda: fields.tensor("double", torch.float16, None),
        r"must have a tensor \[4\] as 'double', not \[3\]": lambda: fields.tensor("double", None, (4,)),
    }
    for message, ask in requests.items():
        with pytest.raises(LoadError, match=message):
            ask()


def test_where_it_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgumentError, match=r"must end in \.safetensors"):
        snapshot.check_path(tmp_path / "a.json")

    def full(*_: Any) -> None:
        raise snapshot.SafetensorError("no space left")

    monkeypatch.setattr(snapshot, "save_file", full)
    with pytest.raises(OSError, match="cannot be written: no space left"):
        snapshot.write(tmp_path / "a.safetensors", HEADER, FIELDS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_it_is_an_ordinary_file(path: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


# Killed while writing


def write_again_and_again(path: Path, ready: Any) -> None:
    torch.set_num_threads(1)
    count = 0
    while True:
        count += 1
        snapshot.write(path, {"count": count}, {"all": torch.full((50_000,), count)})
        if count == 1:
            ready.set()


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL, no fork")
@pytest.mark.parametrize("kills", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_is_the_old_one_or_the_new_one(kills: int, tmp_path: Path) -> None:
    path, context, draw = tmp_path / "a.safetensors", multiprocessing.get_context("fork"), random.Random(0)
    left, counts = 0, set()
    for _ in range(kills):
        ready = context.Event()
        writer = context.Process(target=write_again_and_again, args=(path, ready), daemon=True)
        writer.start()
        assert ready.wait(120)
        time.sleep(draw.uniform(0, 0.03))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join(120)
        assert writer.exitcode == -signal.SIGKILL
        opened = snapshot.read(path)
        count = opened.header.integer("count", 1)
        assert torch.equal(opened.fields.tensor("all", torch.int64, (50_000,)), torch.full((50_000,), count))
        counts.add(count)
        # The temporary file of the killed process.
        for temporary in tmp_path.glob(".*"):
            temporary.unlink()
            left += 1
    assert len(counts) > 1, "it was always killed after the same one"
    assert left > kills // 10, "it was hardly ever killed while it wrote"
