"""Files of one JSON object a line, written so that a kill at any moment costs no more than the line at hand."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unsloth_spectral.errors import LoadError
from unsloth_spectral.files import replacing


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of all whole lines; a last line without its end is one that a kill cut off, and is left out.

    Raises:
        LoadError: the file cannot be read, or a whole line of it is no JSON object.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LoadError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    # A JSON string holds no raw newline, so every newline ends a line.
    return [_parse(line, path, number) for number, line in enumerate(content.split(b"\n")[:-1], start=1)]


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Write one line, through to the disk."""
    with open(path, "ab") as file:
        file.write(_encode(line))
        file.flush()
        os.fsync(file.fileno())


def keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the lines that are not wanted, and a half-written last one; the file is changed whole or not at all."""
    if not path.exists():
        return
    kept = b"".join(_encode(line) for line in read_lines(path) if wanted(line))
    if kept != path.read_bytes():
        with replacing(path) as temporary:
            temporary.write_bytes(kept)


def _encode(line: dict[str, Any]) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:  # UnicodeDecodeError too
        raise LoadError(f"line {number} of {str(path)!r} is no JSON ({error}): remove the line or the file") from error
    if not isinstance(found, dict):
        raise LoadError(f"line {number} of {str(path)!r} is no JSON object: remove the line or the file")
    return found
