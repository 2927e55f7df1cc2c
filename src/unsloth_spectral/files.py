"""Atomic writing of files."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from unsloth_spectral.errors import InvalidArgumentError


def expanded(path: str | os.PathLike[str]) -> Path:
    """``path`` with the user's home folder in place of ``~``.

    Raises:
        InvalidArgumentError: there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InvalidArgumentError(f"there is no home folder for {str(path)!r}: write the whole path") from None


def check_target(path: str | os.PathLike[str], suffixes: tuple[str, ...]) -> Path:
    """``path``, checked as the target of a file before the work that fills it.

    Raises:
        InvalidArgumentError: the suffix is none of ``suffixes``, or the folder is missing or cannot be written to.
    """
    target = expanded(path)
    if target.suffix.lower() not in suffixes:
        raise InvalidArgumentError(f"cannot write {str(path)!r}: the name must end in {' or '.join(suffixes)}")
    if target.is_dir():
        raise InvalidArgumentError(f"cannot write {str(path)!r}: it is a folder")
    if not target.parent.is_dir():
        raise InvalidArgumentError(f"cannot write {str(path)!r}: the folder {str(target.parent)!r} does not exist")
    if not os.access(target.parent, os.W_OK):
        raise InvalidArgumentError(f"cannot write {str(path)!r}: no permission to write in {str(target.parent)!r}")
    return target


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, which replaces it if the block succeeds, and is deleted if the block fails.

    It has the same suffix, from which some writers tell the format.

    Raises:
        OSError: the disk is full or the like; its ``filename`` is ``path``.
    """
    with _naming(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        with _naming(path):
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            # mkstemp makes files for the owner alone; a result is an ordinary file.
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Make the system's errors name ``path``: a failed write names no file, other errors name the temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename, error.filename2 = str(path), None
        raise


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    # Windows can open neither a folder nor a read-only handle for this.
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
