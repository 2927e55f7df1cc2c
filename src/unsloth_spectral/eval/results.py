"""Reading a results folder: checked lines, means over cases, and points of the quality-against-bytes frontier."""

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
    """Means of one method on one task, over the cases that succeeded.

    Attributes:
        num_cases: cases in the means.
        complete: whether no other method has more cases. Means over fewer cases cannot be compared.
        metrics: means by name.
        cold_bits_per_element: mean, None where nothing is compressed.
        compression_factor: dense bytes over stored bytes, summed over all cases.
        series: means by name and position, over the cases that are long enough to have the position.
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
    """Bits and quality of one method: a point of the frontier."""

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
        records: successful measurements in file order, one per task, method and case.
        failures: failed measurements.
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
        """Means of every method that has a record in the task, in the order of the run's configuration."""
        by_method: dict[str, list[Record]] = {}
        for record in self.of(task):
            by_method.setdefault(record.method, []).append(record)
        most = max(map(len, by_method.values()), default=0)
        names = _ordered(by_method, self.config["methods"])
        return [_mean(by_method[name], complete=len(by_method[name]) == most) for name in names]

    def summary(self) -> dict[str, Any]:
        """All results as plain numbers, ready for JSON."""
        return {
            "config": self.config,
            "environment": self.environment,
            "tasks": {task: [asdict(mean) for mean in self.means(task)] for task in self.tasks},
            "failures": [asdict(failure) for failure in self.failures],
        }


def read_results(folder: Path) -> Results:
    """Read and check a results folder; the run may still be in progress.

    Raises:
        LoadError: a file is missing or is not what the runner writes; the message names the file and the line.
    """
    if not folder.is_dir():
        raise LoadError(f"no results folder at {str(folder)!r}: give the folder `unsloth-spectral eval --output` wrote")
    config = read_config(folder)
    environment = _read_object(folder / ENVIRONMENT)
    latest: dict[tuple[str, str, str], Record] = {}
    for number, line in enumerate(read_lines(folder / METRICS), start=1):
        record = record_of(line, folder / METRICS, number)
        latest[record.task, record.method, record.case] = record  # a later try counts, not the first
    records = [record for record in latest.values() if record.error is None]
    return Results(config, environment, records, [record for record in latest.values() if record.error is not None])


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of the run that wrote ``folder``.

    Raises:
        LoadError: the file is missing or is not what the runner writes.
    """
    config = _read_object(folder / CONFIG)
    for name, kind in {"model": str, "methods": list, "tasks": list, "settings": dict}.items():
        if not isinstance(config.get(name), kind):
            raise LoadError(
                f"{str(folder / CONFIG)!r} has no {name!r} of type {kind.__name__}: `unsloth-spectral eval` "
                "did not write it"
            )
    return config


def frontier(means: Iterable[Mean], metric: str) -> list[Point]:
    """Bits and metric of each method that compresses, has all cases and has a finite metric."""
    return [
        Point(mean.method, mean.family, mean.cold_bits_per_element, mean.metrics[metric])
        for mean in means
        if mean.cold_bits_per_element is not None
        and mean.complete
        and math.isfinite(mean.metrics.get(metric, math.nan))
    ]


def _ordered(names: Iterable[str], order: list[str]) -> list[str]:
    """Each name once: names in ``order`` first, in that order, then the others."""
    distinct = list(dict.fromkeys(names))
    return sorted(distinct, key=lambda name: order.index(name) if name in order else len(order))


def _mean(records: list[Record], *, complete: bool) -> Mean:
    footprints = [record.footprint for record in records if record.footprint is not None]
    bits = [size.cold_bits_per_element for size in footprints if size.cold_bits_per_element is not None]
    stored = sum(size.stored_bytes for size in footprints)
    return Mean(
        method=records[0].method,
        family=records[0].family,
        num_cases=len(records),
        complete=complete,
        metrics=_means_by_name([record.metrics for record in records]),
        cold_bits_per_element=_average(bits) if bits else None,
        compression_factor=sum(size.dense_bytes for size in footprints) / stored if stored else math.nan,
        series=_mean_series([record.series for record in records]),
        seconds=_average([record.seconds for record in records]),
    )


def _average(values: list[float]) -> float:
    # Not math.fsum, which raises where both infinities are among the values.
    return sum(values) / len(values)


def _means_by_name(dictionaries: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for metrics in dictionaries for name in metrics)
    return {name: _average([row[name] for row in dictionaries if name in row]) for name in names}


def _mean_series(dictionaries: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    names = dict.fromkeys(name for series in dictionaries for name in series)
    means = {}
    for name in names:
        rows = [series[name] for series in dictionaries if name in series]
        length = max(map(len, rows))
        means[name] = [_average([row[place] for row in rows if place < len(row)]) for place in range(length)]
    return means


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LoadError(f"cannot read {str(path)!r}: {error.strerror or error}; is it a results folder?") from error
    except ValueError as error:
        raise LoadError(f"{str(path)!r} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise LoadError(f"{str(path)!r} is not a JSON object")
    return content
