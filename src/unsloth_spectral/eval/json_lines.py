"""Files with one JSON object per line; a kill at any moment loses at most the line being written."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unsloth_spectral.errors import LoadError
from unsloth_spectral.files import replacing


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of all complete lines. A last line without a newline was cut off by a kill and is left out.

    Raises:
        LoadError: the file cannot be read, or a complete line is not a JSON object.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LoadError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    # A JSON string holds no raw newline, so every newline ends a line.
    return [_parse(line, path, number) for number, line in enumerate(content.split(b"\n")[:-1], start=1)]


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append one line and flush it to the disk."""
    with open(path, "ab") as file:
        file.write(_encode(line))
        file.flush()
        os.fsync(file.fileno())


def keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Drop unwanted lines and a half-written last line. The file changes completely or not at all."""
    if not path.exists():
        return
    content = b"".join(_encode(line) for line in read_lines(path) if wanted(line))
    if content != path.read_bytes():
        with replacing(path) as temporary:
            temporary.write_bytes(content)


def _encode(line: dict[str, Any]) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:  # UnicodeDecodeError too
        raise LoadError(f"line {number} of {str(path)!r} is not JSON ({error}): remove the line or the file") from error
    if not isinstance(value, dict):
        raise LoadError(f"line {number} of {str(path)!r} is not a JSON object: remove the line or the file")
    return value
