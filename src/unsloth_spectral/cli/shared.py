"""Streams, options, loading, progress and files of all commands."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.files import check_target, expanded, replacing

if TYPE_CHECKING:
    from unsloth_spectral.integrations.models import LoadedModel

# Tables and results go to stdout, progress and errors to stderr: a pipe gets the results alone.
out = Console()
err = Console(stderr=True)


def given_path(text: str | Path) -> Path:
    """Parse a path option. An empty string (an unset shell variable) is an error, not the current folder."""
    if not str(text):
        raise typer.BadParameter("must not be empty")
    try:
        return expanded(text)
    except InvalidArgumentError as error:
        raise typer.BadParameter(str(error)) from error


# Settings of every path option and argument.
PATH: dict[str, Any] = {"parser": given_path, "metavar": "PATH"}
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Hub name or local folder. Default: the embedded SmolLM2-135M-Instruct.")
]
DocumentOption = Annotated[
    Path | None, typer.Option("--document", help="UTF-8 text file. Default: the Python language reference.", **PATH)
]
ContextOption = Annotated[int, typer.Option("--context-length", min=1, help="Tokens to prefill.")]
BlockOption = Annotated[int, typer.Option("--block-size", help="Tokens sealed together.")]
PresetOption = Annotated[str, typer.Option("--preset", help="quality, balanced, small or tiny.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write all results to this .json file.", **PATH)]
PlotOption = Annotated[
    Path | None, typer.Option("--plot", help="Draw the results to this .png, .svg or .pdf file.", **PATH)
]


def check_outputs(json_file: Path | None, plot: Path | None = None) -> None:
    """Refuse an unwritable output file now, before minutes of work."""
    if json_file is not None:
        check_target(json_file, (".json",))
    if plot is not None:
        from unsloth_spectral import plots

        plots.check_figure_target(plot)


def load(model: str | None, report: "Reporter") -> "LoadedModel":
    """The model that ``--model`` names."""
    from unsloth_spectral.integrations.models import load_model

    report("loading the model", 0, 1)
    loaded = load_model(model, on_progress=lambda line: report.say(line))
    report("loading the model", 1, 1)
    return loaded


def write_json(result: dict[str, Any], path: Path | None) -> None:
    """Write ``result`` to the file of ``--json``, if one was given."""
    if path is not None:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        err.print(f"results written to {plain(path)}", highlight=False)


def write_plot(figure: Any, path: Path) -> None:
    """Write ``figure`` to the file of ``--plot``."""
    from unsloth_spectral import plots

    plots.save_figure(figure, path)
    err.print(f"plot written to {plain(path)}", highlight=False)


class Reporter:
    """Shows (stage, done, total) as progress bars, a new one for each stage."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self.progress.add_task(plain(stage), total=total)
        self.progress.update(self._tasks[stage], completed=done, total=total)

    def say(self, line: str) -> None:
        self.progress.console.print(plain(line), highlight=False)


@contextmanager
def progress_shown(if_interrupted: str = "nothing was written") -> Iterator[Reporter]:
    """Show progress bars on stderr. An interrupt prints one line that says what became of the work."""
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=err) as progress:
            yield Reporter(progress)
    except KeyboardInterrupt:
        err.print(f"interrupted; {plain(if_interrupted)}", highlight=False, soft_wrap=True)
        raise


def plain(text: object) -> str:
    """``text`` with its square brackets escaped, which rich would read as markup."""
    return str(text).replace("[", r"\[")
