"""Records of ``metrics.jsonl``, checked line by line."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unsloth_spectral.errors import LoadError
from unsloth_spectral.eval.methods.base import Footprint


@dataclass(frozen=True, slots=True)
class Record:
    """The measurement of one method on one case of one task.

    ``error`` is the reason where the measurement failed, else None.
    """

    task: str
    method: str
    family: str
    case: str
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)
    footprint: Footprint | None = None
    series: dict[str, list[float]] = field(default_factory=dict)
    error: str | None = None


def record_of(line: dict[str, Any], path: Path, number: int) -> Record:
    """The record in one line of ``metrics.jsonl``.

    Raises:
        LoadError: the runner did not write this line; the message names the file, the line and the entry.
    """

    def take(name: str, is_right: Callable[[Any], bool], wanted: str) -> Any:
        if name not in line or not is_right(line[name]):
            raise LoadError(f"line {number} of {str(path)!r}: {name!r} must be {wanted}, got {line.get(name)!r:.60}")
        return line[name]

    task, method, family, case = (take(name, _is_text, "text") for name in ("task", "method", "family", "case"))
    seconds = take("seconds", _is_number, "a number")
    if line.get("error") is not None:
        return Record(task, method, family, case, seconds, error=take("error", _is_text, "text"))
    footprint = take("footprint", _is_footprint, "a footprint")
    return Record(
        task,
        method,
        family,
        case,
        seconds,
        metrics=take("metrics", lambda value: _is_dictionary(value, _is_number), "numbers by name"),
        footprint=Footprint(**footprint),
        series=take("series", lambda value: _is_dictionary(value, _is_row), "rows of numbers by name"),
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _is_row(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _is_dictionary(value: Any, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(is_right, value.values()))


def _is_footprint(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != set(Footprint.__dataclass_fields__):
        return False
    bits = value["cold_bits_per_element"]
    return all(_is_number(value[name]) for name in ("stored_bytes", "dense_bytes")) and (
        bits is None or _is_number(bits)
    )
