"""The entry point and its commands. To add a command, put its file beside this one and its name in ``_COMMANDS``."""

import contextlib
import io
import logging
import os
import sys
from typing import Annotated, NoReturn

import typer

# Not `from unsloth_spectral.cli import ...`: the package imports this module.
import unsloth_spectral.cli.chat as chat
import unsloth_spectral.cli.compare as compare
import unsloth_spectral.cli.eval as evaluation
import unsloth_spectral.cli.info as info
import unsloth_spectral.cli.profile as profile
import unsloth_spectral.cli.report as report
import unsloth_spectral.cli.snapshot as snapshot
import unsloth_spectral.cli.spectrum as spectrum
from unsloth_spectral import __version__
from unsloth_spectral.cli.shared import err, out, plain
from unsloth_spectral.errors import SpectralError
from unsloth_spectral.log import logger

EXIT_USER_ERROR = 2
EXIT_BROKEN_PIPE = 1
# Modules with `EXAMPLES` and a function `command`, whose docstring and options are the help.
_COMMANDS = {
    "compare": compare,
    "chat": chat,
    "spectrum": spectrum,
    "profile": profile,
    "eval": evaluation,
    "report": report,
    "info": info,
}

app = typer.Typer(
    name="unsloth-spectral",
    help="Measure what a KV cache stored as spectral factors saves and costs, on your model and your document.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _examples(lines: tuple[str, ...]) -> str:
    return "\n\n".join(["Examples:", *(f"  {line}" for line in lines)])


for _name, _module in _COMMANDS.items():
    app.command(_name, epilog=_examples(_module.EXAMPLES))(_module.command)
_snapshots = typer.Typer(
    name="snapshot",
    help="Save a cache to a file, inspect it, check it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
_snapshots.command("save", epilog=_examples(snapshot.SAVE_EXAMPLES))(snapshot.save)
_snapshots.command("info", epilog=_examples(snapshot.INFO_EXAMPLES))(snapshot.info)
_snapshots.command("verify", epilog=_examples(snapshot.VERIFY_EXAMPLES))(snapshot.verify)
app.add_typer(_snapshots)


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
    """Run the command line. User mistakes and system errors end in one line and exit status 2.

    Success ends in 0, an interrupt in 130 and a closed output pipe in 1; typer sets all three.
    """
    logger.addHandler(logging.StreamHandler())
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As on stderr: letters that the terminal's encoding lacks are escaped instead of failing the command.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            app()
        finally:
            _flush_stdout()
    except SpectralError as error:
        _fail(str(error))
    except OSError as error:
        place = "input or output" if error.filename is None else repr(error.filename)
        _fail(f"{place}: {error.strerror}" if error.strerror else str(error))


def _fail(reason: str) -> NoReturn:
    with contextlib.suppress(OSError):  # stderr may be closed; the exit status remains
        err.print(f"[bold red]error:[/] {plain(reason)}", highlight=False, soft_wrap=True)
    sys.exit(EXIT_USER_ERROR)


def _flush_stdout() -> None:
    """Flush stdout while a failure can still be reported: at exit, Python would print a traceback."""
    if sys.stdout is None or sys.stdout.closed:
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        # Drop the unwritable rest, or Python would try again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(EXIT_BROKEN_PIPE)
        raise
