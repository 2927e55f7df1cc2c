"""Shared by the benchmarks: alternating timings, the record of the machine, and one line of JSON at the end."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from unsloth_spectral.eval.environment import environment
from unsloth_spectral.files import check_target, replacing

THREADS = 2
SETTLE_SECONDS = 0.15
WARM_SECONDS = 0.02
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds over the repeats."""

    median: float
    lower_quartile: float
    upper_quartile: float


@dataclass(frozen=True, slots=True)
class Target:
    """A target for a figure, and whether it was met."""

    name: str
    wanted: float
    measured: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.measured >= self.wanted if self.at_least else self.measured <= self.wanted

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def arguments(name: str, description: str, repeats: int) -> argparse.Namespace:
    """Parse ``--json`` and ``--repeats``; also set the number of threads of all contenders."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, default=RESULTS / f"{name}.json", help="where the results go")
    parser.add_argument("--repeats", type=int, default=repeats, help="timed runs of each contender")
    parsed = parser.parse_args()
    check_target(parsed.json, (".json",))
    torch.set_num_threads(THREADS)
    return parsed


def alternate(contenders: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Timing]:
    """Time the contenders in turn, ``repeats`` times each, so that a busy moment hits all of them alike.

    Idle threads of a library's pool spin for some milliseconds and would slow down the next contender. So each
    contender waits until they sleep, then runs untimed for a moment, to warm its own pool and caches.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            time.sleep(SETTLE_SECONDS)
            warm = time.perf_counter() + WARM_SECONDS
            run()
            while time.perf_counter() < warm:
                run()
            started = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: summarize(measured) for name, measured in times.items()}


def summarize(milliseconds: list[float]) -> Timing:
    """Median and quartiles."""
    if len(milliseconds) < 2:
        return Timing(*(milliseconds * 3))
    lower, median, upper = statistics.quantiles(milliseconds, n=4, method="inclusive")
    return Timing(median, lower, upper)


def finish(path: Path, results: dict[str, Any], targets: list[Target]) -> None:
    """Write the results with their environment, print which targets were met, and end in one line of JSON."""
    record = write(path, results, targets)
    for target in targets:
        sign = ">=" if target.at_least else "<="
        verdict = "met" if target.met else "MISSED"
        print(f"{verdict:>6}  {target.name}: {target.measured:.4g} (wanted {sign} {target.wanted:g})")
    print(json.dumps(record))


def write(path: Path, results: dict[str, Any], targets: list[Target]) -> dict[str, Any]:
    """Write the results with where they came from, and return what was written."""
    record = {"environment": environment(), **results, "targets": [target.to_dict() for target in targets]}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record
