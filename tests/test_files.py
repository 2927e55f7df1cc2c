"""Files are written completely or not at all."""

import errno
import os
import stat
import sys
from pathlib import Path

import pytest

from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.files import check_target, replacing


def test_a_good_target(tmp_path: Path) -> None:
    assert check_target(tmp_path / "a.JSON", (".json",)) == tmp_path / "a.JSON"
    assert check_target("~/a.json", (".json",)) == Path.home() / "a.json"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.txt", "must end in .json or .png"),
        ("a", "must end in .json or .png"),
        ("missing/a.json", "does not exist"),
        ("folder.json", "it is a folder"),
    ],
)
def test_bad_targets(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InvalidArgumentError, match=message):
        check_target(tmp_path / name, (".json", ".png"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InvalidArgumentError, match="no permission"):
            check_target(tmp_path / "a.json", (".json",))
    finally:
        tmp_path.chmod(0o700)


def test_replacing(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")
    with replacing(target) as temporary:
        assert (temporary.parent, temporary.suffix) == (tmp_path, ".json")
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")

    def write_half() -> None:
        with replacing(target) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_what_fails_names_the_file(tmp_path: Path) -> None:
    """Not the temporary one, nor nothing at all, as an error of writing does."""
    target = tmp_path / "a.json"

    def full(number: int | None) -> None:
        with replacing(target):
            raise OSError(number, "No space left on device") if number else OSError("transformers says so")

    with pytest.raises(OSError, match="No space left on device") as caught:
        full(errno.ENOSPC)
    assert caught.value.filename == str(target)
    with pytest.raises(OSError, match=r"^transformers says so$"):
        full(None)
    with pytest.raises(FileNotFoundError) as missing, replacing(tmp_path / "missing" / "a.json"):
        pass
    assert missing.value.filename == str(tmp_path / "missing" / "a.json")
    assert list(tmp_path.iterdir()) == []


def test_a_home_that_nobody_knows() -> None:
    with pytest.raises(InvalidArgumentError, match=r"no home folder for '~nobody-here/a\.json'"):
        check_target("~nobody-here/a.json", (".json",))


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_permissions_are_those_of_an_ordinary_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "a.json") as temporary:
            temporary.write_text("new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o640
