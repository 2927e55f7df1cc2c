"""The command line: options in, tables out. The work is done in ``eval``."""

from unsloth_spectral.cli.app import main

__all__ = ["main"]
