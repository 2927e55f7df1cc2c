"""The command line: options in, tables out. The work is done in ``eval``."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from unsloth_spectral import __version__
from unsloth_spectral.errors import InvalidArgumentError, SpectralError
from unsloth_spectral.files import check_target, replacing

EXIT_USER_ERROR = 2
_RANKS = ((16, 32), (24, 40), (32, 48))

app = typer.Typer(
    name="unsloth-spectral",
    help="A KV cache stored as spectral factors: what it saves and what it costs, on your model and your document.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
# Tables and results go to stdout, progress and errors to stderr: a pipe gets the results alone.
out = Console()
err = Console(stderr=True)

ModelOption = Annotated[
    str | None, typer.Option("--model", help="Hub name or local folder. Default: the embedded SmolLM2-135M-Instruct.")
]
DocumentOption = Annotated[
    Path | None, typer.Option("--document", help="UTF-8 text file. Default: the Python language reference.")
]
ContextOption = Annotated[int, typer.Option("--context-length", min=1, help="Tokens to prefill.")]
BlockOption = Annotated[int, typer.Option("--block-size", help="Tokens sealed together.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write all results to this .json file.")]
PlotOption = Annotated[Path | None, typer.Option("--plot", help="Draw the results to this .png, .svg or .pdf file.")]


@app.command(
    epilog="Examples:\n\n  unsloth-spectral compare --plot compare.png\n\n  unsloth-spectral compare "
    "--document book.txt --question 'Who is the thief?' --rank-keys 16 --rank-keys 32 --rank-values 48"
)
def compare(
    model: ModelOption = None,
    document: DocumentOption = None,
    question: Annotated[str, typer.Option(help="Asked after the document.")] = "What is the text above about?",
    context_length: ContextOption = 4096,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode with each cache.")] = 64,
    rank_keys: Annotated[
        list[int] | None, typer.Option(help="Rank of the keys; repeat for several caches. Default: 16, 24, 32.")
    ] = None,
    rank_values: Annotated[
        list[int] | None, typer.Option(help="Rank of the values; as often, or once for all. Default: 32, 40, 48.")
    ] = None,
    block_size: BlockOption = 512,
    json_file: JsonOption = None,
    plot: PlotOption = None,
    seed: Annotated[int, typer.Option(min=0, help="0: the document's beginning; else a place picked by it.")] = 0,
) -> None:
    """One long document through the dense cache and spectral ones, side by side: bytes, speed, fidelity, answers."""
    from unsloth_spectral import reports
    from unsloth_spectral.codec.config import SpectralConfig
    from unsloth_spectral.eval.compare import compare as run
    from unsloth_spectral.eval.documents import read_document

    _check_outputs(json_file, plot)
    configs = [
        SpectralConfig(rank_keys=keys, rank_values=values, block_size=block_size)
        for keys, values in _pair_ranks(rank_keys, rank_values)
    ]
    text = read_document(document)
    with _progress() as report:
        loaded = _load(model, report)
        result = run(
            loaded,
            text,
            configs,
            question=question,
            context_length=context_length,
            max_new_tokens=max_new_tokens,
            seed=seed,
            on_progress=report,
        ).to_dict()
    out.print(reports.comparison_table(result))
    out.print(reports.comparison_answers(result))
    _write(result, "compare", json_file, plot)


@app.command(
    epilog="Examples:\n\n  unsloth-spectral spectrum --plot spectrum.png\n\n  unsloth-spectral spectrum "
    "--model ./my-model --document book.txt --json spectrum.json"
)
def spectrum(
    model: ModelOption = None,
    document: DocumentOption = None,
    context_length: ContextOption = 4096,
    block_size: BlockOption = 512,
    json_file: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Singular values of every layer and head on a document: effective rank, entropy, share kept. To choose ranks."""
    from unsloth_spectral import reports
    from unsloth_spectral.eval.documents import read_document, tokens_of
    from unsloth_spectral.eval.spectrum import measure_spectrum

    _check_outputs(json_file, plot)
    text = read_document(document)
    with _progress() as report:
        loaded = _load(model, report)
        input_ids = tokens_of(text, loaded.tokenizer, context_length)[:, :context_length]
        measured = measure_spectrum(
            loaded.model, input_ids.to(loaded.model.device), block_size=block_size, on_progress=report
        )
    result = {"model": loaded.name, **measured.to_dict()}
    out.print(reports.spectrum_table(measured))
    _write(result, "spectrum", json_file, plot)


@app.command(epilog="Examples:\n\n  unsloth-spectral info\n\n  unsloth-spectral info --json info.json")
def info(json_file: JsonOption = None) -> None:
    """Versions, device, and which attention paths are available, or why not."""
    from unsloth_spectral import reports
    from unsloth_spectral.eval.info import collect_info

    _check_outputs(json_file, None)
    collected = collect_info()
    out.print(reports.info_table(collected))
    _write(collected, "info", json_file, None)


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(__version__, highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options before any command."""


def main() -> None:
    """Entry point: user mistakes end in one line and status 2, an interrupt in status 130 (typer's), success in 0."""
    logging.getLogger("unsloth_spectral").addHandler(logging.StreamHandler())
    try:
        app()
    except SpectralError as error:
        err.print(f"[bold red]error:[/] {_plain(error)}", highlight=False, soft_wrap=True)
        sys.exit(EXIT_USER_ERROR)


def _pair_ranks(rank_keys: list[int] | None, rank_values: list[int] | None) -> list[tuple[int, int]]:
    if not rank_keys and not rank_values:
        return list(_RANKS)
    keys = rank_keys or [_RANKS[0][0]]
    values = rank_values or [_RANKS[0][1]]
    count = max(len(keys), len(values))
    if len(keys) not in (1, count) or len(values) not in (1, count):
        raise InvalidArgumentError(
            f"--rank-keys and --rank-values must be given equally often, or one of them once; got {len(keys)} and "
            f"{len(values)}"
        )
    keys, values = keys * (count // len(keys)), values * (count // len(values))
    return list(zip(keys, values, strict=True))


def _check_outputs(json_file: Path | None, plot: Path | None) -> None:
    """Refuse a file that cannot be written before minutes of work, not after."""
    if json_file is not None:
        check_target(json_file, (".json",))
    if plot is not None:
        from unsloth_spectral import plots

        plots.check_figure_target(plot)


def _load(model: str | None, report: "_Reporter") -> Any:
    from unsloth_spectral.integrations.models import load_model

    report("loading the model", 0, 1)
    loaded = load_model(model, on_progress=lambda line: report.say(line))
    report("loading the model", 1, 1)
    return loaded


def _write(result: dict[str, Any], kind: str, json_file: Path | None, plot: Path | None) -> None:
    if json_file is not None:
        with replacing(json_file) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        err.print(f"results written to {json_file}", highlight=False)
    if plot is not None:
        from unsloth_spectral import plots

        figure = plots.comparison_figure(result) if kind == "compare" else plots.spectrum_figure(result)
        plots.save_figure(figure, plot)
        err.print(f"plot written to {plot}", highlight=False)


class _Reporter:
    """Shows (stage, done, total) as progress bars, a new one for each stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], completed=done, total=total)

    def say(self, line: str) -> None:
        self._progress.console.print(line, highlight=False)


@contextmanager
def _progress() -> Iterator[_Reporter]:
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=err) as progress:
            yield _Reporter(progress)
    except KeyboardInterrupt:
        err.print("interrupted; nothing was written")
        raise


def _plain(error: BaseException) -> str:
    # Square brackets in a message are text, not markup.
    return str(error).replace("[", r"\[")
