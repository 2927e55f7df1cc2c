"""Run every method on every case of every task; a run that was killed continues where it stopped."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.eval.environment import environment
from unsloth_spectral.eval.json_lines import append_line, keep_lines, read_lines
from unsloth_spectral.eval.methods.base import DENSE, Method
from unsloth_spectral.eval.progress import OnProgress
from unsloth_spectral.eval.results import CONFIG, ENVIRONMENT, METRICS, PREDICTIONS, read_config
from unsloth_spectral.eval.settings import check_same, run_config
from unsloth_spectral.eval.tasks.base import Task
from unsloth_spectral.files import replacing
from unsloth_spectral.integrations.models import LoadedModel


@dataclass(frozen=True, slots=True)
class Summary:
    """Counts of a run.

    Attributes:
        num_measured: lines written by this run, failures included.
        num_skipped: lines that an earlier run had written.
        failures: ``task, method, case: error`` of each that failed in this run; the next run tries them again.
    """

    num_measured: int
    num_skipped: int
    failures: list[str]


def run_evaluation(
    loaded: LoadedModel,
    tasks: Sequence[Task],
    methods: Sequence[Method],
    folder: Path,
    settings: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
) -> Summary:
    """Run every method on every case of every task, the dense cache first, and write each outcome as it comes.

    The folder receives ``config.json``, ``environment.json``, ``metrics.jsonl`` and ``predictions.jsonl``. Results of
    an earlier run in it stay and are not measured again; failures are tried again. Tasks and methods may be added. An
    exception of one method on one case becomes an error line; the run continues.

    Args:
        loaded: model and tokenizer.
        tasks: in the order to run them.
        methods: in any order.
        folder: created if missing; its parent must exist.
        settings: other settings that the results depend on, ready for JSON. The options of tasks that are dataclasses
            are added automatically.
        on_progress: called with a task's name, how many of its runs are done and how many there are; and by the task
            with its own stages.

    Raises:
        InvalidArgumentError: the folder holds results of another model or other settings, or cannot be created.
        LoadError: a file in the folder is damaged.
    """
    ordered = sorted(methods, key=lambda method: method.name != DENSE)
    cases = {task.name: list(task.cases(loaded)) for task in tasks}
    _prepare(folder, run_config(loaded, tasks, ordered, settings or {}))
    # Two runs in one folder would measure everything twice.
    try:
        lock = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise InvalidArgumentError(
            f"another run is writing to {str(folder)!r}: wait for it, or give another folder"
        ) from None
    with lock:
        return _run_all(loaded, tasks, ordered, cases, folder, on_progress)


def _run_all(
    loaded: LoadedModel,
    tasks: Sequence[Task],
    ordered: Sequence[Method],
    cases: Mapping[str, Sequence[str]],
    folder: Path,
    on_progress: OnProgress | None,
) -> Summary:
    done = _resume(folder)
    num_measured, num_skipped, failures = 0, 0, []
    for task in tasks:
        total = len(cases[task.name]) * len(ordered)
        for index, (case, method) in enumerate((case, method) for case in cases[task.name] for method in ordered):
            if on_progress is not None:
                on_progress(task.name, index, total)
            if (task.name, method.name, case) in done:
                num_skipped += 1
                continue
            error = _measure(loaded, task, method, case, folder, on_progress)
            num_measured += 1
            if error is not None:
                failures.append(f"{task.name}, {method.name}, {case}: {error}")
        if on_progress is not None:
            on_progress(task.name, total, total)
    return Summary(num_measured, num_skipped, failures)


def _measure(
    loaded: LoadedModel, task: Task, method: Method, case: str, folder: Path, on_progress: OnProgress | None
) -> str | None:
    """Run one method on one case and write its lines. Returns the error, or None."""
    line: dict[str, Any] = {"task": task.name, "method": method.name, "family": method.family, "case": case}
    predictions: list[dict[str, Any]] = []
    start = time.perf_counter()
    try:
        with torch.inference_mode():
            outcome = task.run(loaded, method, case, on_progress)
        predictions = outcome.predictions
        line |= {"metrics": outcome.metrics, "footprint": outcome.footprint.to_dict(), "series": outcome.series}
        # Checked here, so that a task's value that is not JSON fails this case alone.
        json.dumps([line, predictions])
    except Exception as error:
        line = {name: line[name] for name in ("task", "method", "family", "case")}
        line["error"], predictions = _one_line(error), []
    if "error" in line and torch.cuda.is_available():
        # Out of memory is the likeliest failure, and the next method must not inherit it. The exception and the frames
        # that held tensors are gone by now.
        torch.cuda.empty_cache()
    line["seconds"] = round(time.perf_counter() - start, 4)
    # Metrics are written last: their line marks the case as done.
    place = {name: line[name] for name in ("task", "method", "case")}
    append_line(folder / PREDICTIONS, {**place, "predictions": predictions})
    append_line(folder / METRICS, line)
    return line.get("error")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500] if text else type(error).__name__


def _prepare(folder: Path, config: dict[str, Any]) -> None:
    """Create the folder, or check that it fits this run; write its config and environment."""
    if folder.exists() and not folder.is_dir():
        raise InvalidArgumentError(f"cannot write results to {str(folder)!r}: it is a file")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InvalidArgumentError(f"cannot make the folder {str(folder)!r}: {error.strerror or error}") from error
    present = environment()
    if (folder / CONFIG).exists():
        earlier = read_config(folder)
        check_same(folder, earlier, config)
        for name in ("tasks", "methods"):
            config[name] = list(dict.fromkeys([*earlier[name], *config[name]]))
        config["task_settings"] = {**earlier.get("task_settings", {}), **config["task_settings"]}
        present = _with_earlier(folder / ENVIRONMENT, present)
    elif any((folder / name).exists() for name in (METRICS, PREDICTIONS)):
        raise InvalidArgumentError(f"{str(folder)!r} holds results without their {CONFIG}: use another folder")
    # The environment first: a folder with a config counts as a results folder and must be complete.
    for name, content in {ENVIRONMENT: present, CONFIG: config}.items():
        with replacing(folder / name) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for name in (METRICS, PREDICTIONS):
        (folder / name).touch()


def _with_earlier(path: Path, present: dict[str, Any]) -> dict[str, Any]:
    """This run's environment, and those of earlier runs that differ in more than the date."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        others = before.pop("earlier", [])
    except (OSError, ValueError, AttributeError):
        return present  # missing or damaged; no result depends on it
    if {**before, "date": None} != {**present, "date": None}:
        others = [*others, before]
    return {**present, "earlier": others} if others else present


def _resume(folder: Path) -> set[tuple[str, str, str]]:
    """Triples that are done. Failures, half-written lines and lines that only one of the files has are dropped."""

    def triple(line: dict[str, Any]) -> tuple[str, str, str]:
        return line.get("task", ""), line.get("method", ""), line.get("case", "")

    measured = {triple(line) for line in read_lines(folder / METRICS) if line.get("error") is None}
    done = measured & {triple(line) for line in read_lines(folder / PREDICTIONS)}
    keep_lines(folder / METRICS, lambda line: triple(line) in done)
    keep_lines(folder / PREDICTIONS, lambda line: triple(line) in done)
    return done
