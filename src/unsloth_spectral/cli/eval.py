"""``unsloth-spectral eval``."""

import fnmatch
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress, TaskID

from unsloth_spectral.cli.shared import (
    PATH,
    DocumentOption,
    JsonOption,
    ModelOption,
    Reporter,
    check_outputs,
    err,
    load,
    out,
    plain,
    progress_shown,
    write_json,
)
from unsloth_spectral.errors import InvalidArgumentError

if TYPE_CHECKING:
    from unsloth_spectral.eval.methods.base import Method
    from unsloth_spectral.eval.tasks.base import Task

EXAMPLES = (
    "unsloth-spectral eval --list",
    "unsloth-spectral eval --task fidelity --task needle --method 'spectral *' --method 'kivi*' --output results",
    "unsloth-spectral eval --document book.txt --starts 5000,20000 --output book",
)
EXIT_FAILURES = 1


def command(
    model: ModelOption = None,
    task: Annotated[list[str] | None, typer.Option(help="Task; repeat for several. Default: fidelity.")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Method or pattern such as 'kivi*'; repeat for several. Default: all that run here."),
    ] = None,
    document: DocumentOption = None,
    starts: Annotated[
        str | None,
        typer.Option(help="Tokens of the document where fidelity, drift and lengths start, such as 5000,20000."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the results; a stopped run continues in it.", **PATH)] = Path(
        "results"
    ),
    show_list: Annotated[bool, typer.Option("--list", help="Show the tasks and methods, and run nothing.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Measure every method on every case of the tasks; each result is saved as soon as it is ready.

    A method is a way to store the cache: dense, spectral, or a peer's. The dense cache always runs too. Run the same
    command again to continue after an interrupt, to add tasks or methods, or to retry failures. `unsloth-spectral
    report` draws the results. Exit status 1: a measurement failed; 2: an option is wrong.
    """
    from unsloth_spectral import reports
    from unsloth_spectral.eval.documents import read_document
    from unsloth_spectral.eval.methods import registry
    from unsloth_spectral.eval.results import read_results
    from unsloth_spectral.eval.runner import run_evaluation
    from unsloth_spectral.eval.tasks.registry import TASKS

    available, missing = registry.methods(), registry.unavailable()
    if show_list:
        listed = {name: _first_line(make) for name, make in TASKS.items()}
        out.print(reports.choices_table(listed, available, missing))
        return
    check_outputs(json_file)
    makers = {name: TASKS[name] for name in _chosen_tasks(task or ["fidelity"], list(TASKS))}
    # None is passed on: the results then record the default document.
    text = None if document is None else read_document(document)
    tasks = _make_tasks(makers, document=text, starts=None if starts is None else _parse_starts(starts))
    methods = chosen_methods(method or ["*"], available, missing)
    with progress_shown(f"run the same command again to continue; all finished cases are in {output}") as report:
        loaded = load(model, report)
        progress = _Bars(report, [task_object.name for task_object in tasks])
        summary = run_evaluation(loaded, tasks, methods, output, on_progress=progress)
    results = read_results(output)
    for name in results.tasks:
        out.print(reports.evaluation_table(name, results.means(name)))
    write_json(results.summary(), json_file)
    err.print(f"{summary.num_measured} measured, {summary.num_skipped} from an earlier run; results in {plain(output)}")
    if summary.failures:
        lines = "\n".join(f"  {line}" for line in summary.failures)
        err.print(f"[bold red]{len(summary.failures)} failed:[/]\n{plain(lines)}", highlight=False, soft_wrap=True)
        raise typer.Exit(EXIT_FAILURES)


def chosen_methods(patterns: list[str], available: dict[str, "Method"], missing: dict[str, str]) -> list["Method"]:
    """Methods that match the names and patterns, and ``dense``, in the registry's order.

    Raises:
        InvalidArgumentError: a pattern matches no method that runs here.
    """
    chosen = {"dense"}
    for pattern in patterns:
        matching = [name for name in available if fnmatch.fnmatchcase(name, pattern)]
        if not matching:
            obstacles = [f"{name!r} {why}" for name, why in missing.items() if fnmatch.fnmatchcase(name, pattern)]
            reason = f"does not run here: {'; '.join(obstacles)}" if obstacles else "matches no method"
            raise InvalidArgumentError(f"--method {pattern!r} {reason}; see `unsloth-spectral eval --list`")
        chosen.update(matching)
    return [method for name, method in available.items() if name in chosen]


def _chosen_tasks(names: list[str], known: list[str]) -> list[str]:
    for name in names:
        if name not in known:
            raise InvalidArgumentError(f"--task must be one of {', '.join(known)}; got {name!r}")
    return list(dict.fromkeys(names))


def _make_tasks(makers: "dict[str, Callable[..., Task]]", **options: Any) -> "list[Task]":
    """Make the tasks; each gets those ``options`` that are not None and that it accepts."""
    chosen = {name: value for name, value in options.items() if value is not None}
    accepted = {task: set(chosen) & set(inspect.signature(make).parameters) for task, make in makers.items()}
    for name in chosen:
        if not any(name in names for names in accepted.values()):
            raise InvalidArgumentError(
                f"--{name} has no effect on {', '.join(makers)}: leave it out, or add a task that uses it"
            )
    return [make(**{name: chosen[name] for name in accepted[task]}) for task, make in makers.items()]


def _parse_starts(text: str) -> Sequence[int]:
    try:
        return tuple(dict.fromkeys(map(int, text.split(","))))
    except ValueError:
        raise InvalidArgumentError(f"--starts must be whole numbers such as 5000,20000; got {text!r}") from None


def _first_line(make: Any) -> str:
    lines = (make.__doc__ or "").strip().splitlines()
    return lines[0] if lines else ""


class _Bars:
    """One progress bar per task, and one for the stages of the current measurement."""

    def __init__(self, report: Reporter, tasks: list[str]) -> None:
        self._report, self._tasks = report, tasks
        self._progress: Progress = report.progress
        self._inner: TaskID | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage in self._tasks:
            self._report(stage, done, total)
        elif self._inner is None:
            self._inner = self._progress.add_task(plain(stage), completed=done, total=total)
        else:
            self._progress.update(self._inner, description=plain(stage), completed=done, total=total)
