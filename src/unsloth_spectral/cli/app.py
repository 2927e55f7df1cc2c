"""The entry point and its commands. A new command: its file beside this one, and its name in ``_COMMANDS``."""

import logging
import sys
from typing import Annotated

import typer

# Not `from unsloth_spectral.cli import ...`: the package imports this module.
import unsloth_spectral.cli.compare as compare
import unsloth_spectral.cli.eval as evaluation
import unsloth_spectral.cli.info as info
import unsloth_spectral.cli.profile as profile
import unsloth_spectral.cli.report as report
import unsloth_spectral.cli.spectrum as spectrum
from unsloth_spectral import __version__
from unsloth_spectral.cli.shared import err, out, plain
from unsloth_spectral.errors import SpectralError

EXIT_USER_ERROR = 2
# Each is a module with `command`, whose docstring and options are the help, and `EXAMPLES`.
_COMMANDS = {
    "compare": compare,
    "spectrum": spectrum,
    "profile": profile,
    "eval": evaluation,
    "report": report,
    "info": info,
}

app = typer.Typer(
    name="unsloth-spectral",
    help="A KV cache stored as spectral factors: what it saves and what it costs, on your model and your document.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for _name, _module in _COMMANDS.items():
    app.command(_name, epilog="\n\n".join(["Examples:", *(f"  {line}" for line in _module.EXAMPLES)]))(_module.command)


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
        err.print(f"[bold red]error:[/] {plain(error)}", highlight=False, soft_wrap=True)
        sys.exit(EXIT_USER_ERROR)
