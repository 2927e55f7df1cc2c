"""Reading what ``runner`` wrote: checked lines, means over cases, points of the quality-against-bytes frontier."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unsloth_spectral.errors import LoadError
from unsloth_spectral.eval.json_lines import read_lines
from unsloth_spectral.eval.records import Record, record_of

METRICS, PREDICTIONS, CONFIG, ENVIRONMENT = "metrics.jsonl", "predictions.jsonl", "config.json", "environment.json"


@dataclass(frozen=True, slots=True)
class Mean:
    """One method on one task, over the cases that went well.

    Attributes:
        num_cases: how many went into the means.
        complete: whether no other method has more cases; means over fewer compare with nothing.
        metrics: means by name.
        cold_bits_per_element: mean, None where nothing is compressed.
        compression_factor: dense bytes over stored bytes, of all cases together.
        series: means by name, position by position over the cases that have the position.
        seconds: mean.
    """

    method: str
    family: str
    num_cases: int
    complete: bool
    metrics: dict[str, float]
    cold_bits_per_element: float | None
    compression_factor: float
    series: dict[str, list[float]]
    seconds: float


@dataclass(frozen=True, slots=True)
class Point:
    """Where a method lies between bytes and quality."""

    method: str
    family: str
    bits: float
    value: float


@dataclass(frozen=True, slots=True)
class Results:
    """A results folder.

    Attributes:
        config: model, dtype, settings, methods and tasks.
        environment: versions, device and time.
        records: what went well, in the order of the file; a triple of task, method and case comes once.
        failures: what did not.
    """

    config: dict[str, Any]
    environment: dict[str, Any]
    records: list[Record]
    failures: list[Record]

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks that have records, in the order they were asked for."""
        return _ordered((record.task for record in self.records), self.config["tasks"])

    def of(self, task: str) -> list[Record]:
        """The records of a task."""
        return [record for record in self.records if record.task == task]

    def means(self, task: str) -> list[Mean]:
        """Of every method with a record in the task, in the order they were asked for."""
        by_method: dict[str, list[Record]] = {}
        for record in self.of(task):
            by_method.setdefault(record.method, []).append(record)
        most = max(map(len, by_method.values()), default=0)
        names = _ordered(by_method, self.config["methods"])
        return [_mean(by_method[name], complete=len(by_method[name]) == most) for name in names]

    def summary(self) -> dict[str, Any]:
        """All of it in plain numbers, ready for JSON: what a picture or another program needs."""
        return {
            "config": self.config,
            "environment": self.environment,
            "tasks": {task: [asdict(mean) for mean in self.means(task)] for task in self.tasks},
            "failures": [asdict(failure) for failure in self.failures],
        }


def read_results(folder: Path) -> Results:
    """A results folder, checked; a run still going on may be read.

    Raises:
        LoadError: a file is missing or is not what the runner writes; the message names the file and the line.
    """
    if not folder.is_dir():
        raise LoadError(f"no results folder at {str(folder)!r}: give the folder `unsloth-spectral eval --output` wrote")
    config = read_config(folder)
    environment = _read_object(folder / ENVIRONMENT)
    found: dict[tuple[str, str, str], Record] = {}
    for number, line in enumerate(read_lines(folder / METRICS), start=1):
        record = record_of(line, folder / METRICS, number)
        found[record.task, record.method, record.case] = record  # a later try counts, not the first
    records = [record for record in found.values() if record.error is None]
    return Results(config, environment, records, [record for record in found.values() if record.error is not None])


def read_config(folder: Path) -> dict[str, Any]:
    """What a folder was made with.

    Raises:
        LoadError: the file is missing or is not what the runner writes.
    """
    config = _read_object(folder / CONFIG)
    for name, kind in {"model": str, "methods": list, "tasks": list, "settings": dict}.items():
        if not isinstance(config.get(name), kind):
            raise LoadError(f"{str(folder / CONFIG)!r} has no {name!r} that is a {kind.__name__}: no run wrote it")
    return config


def frontier(means: Iterable[Mean], metric: str) -> list[Point]:
    """Bits against a metric, of the methods that compress, have all cases, and whose metric is finite."""
    return [
        Point(mean.method, mean.family, mean.cold_bits_per_element, mean.metrics[metric])
        for mean in means
        if mean.cold_bits_per_element is not None
        and mean.complete
        and math.isfinite(mean.metrics.get(metric, math.nan))
    ]


def _ordered(names: Iterable[str], order: list[str]) -> list[str]:
    """Each name once, those in ``order`` first and in its order."""
    given = list(dict.fromkeys(names))
    return sorted(given, key=lambda name: order.index(name) if name in order else len(order))


def _mean(records: list[Record], *, complete: bool) -> Mean:
    footprints = [record.footprint for record in records if record.footprint is not None]
    bits = [each.cold_bits_per_element for each in footprints if each.cold_bits_per_element is not None]
    stored = sum(each.stored_bytes for each in footprints)
    return Mean(
        method=records[0].method,
        family=records[0].family,
        num_cases=len(records),
        complete=complete,
        metrics=_means_by_name([record.metrics for record in records]),
        cold_bits_per_element=_average(bits) if bits else None,
        compression_factor=sum(each.dense_bytes for each in footprints) / stored if stored else math.nan,
        series=_mean_series([record.series for record in records]),
        seconds=_average([record.seconds for record in records]),
    )


def _average(values: list[float]) -> float:
    # Not math.fsum, which raises where both infinities are among the values.
    return sum(values) / len(values)


def _means_by_name(dictionaries: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for each in dictionaries for name in each)
    return {name: _average([each[name] for each in dictionaries if name in each]) for name in names}


def _mean_series(dictionaries: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    names = dict.fromkeys(name for each in dictionaries for name in each)
    means = {}
    for name in names:
        rows = [each[name] for each in dictionaries if name in each]
        length = max(map(len, rows))
        means[name] = [_average([row[place] for row in rows if place < len(row)]) for place in range(length)]
    return means


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LoadError(f"cannot read {str(path)!r}: {error.strerror or error}; is it a results folder?") from error
    except ValueError as error:
        raise LoadError(f"{str(path)!r} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise LoadError(f"{str(path)!r} is no JSON object")
    return found
