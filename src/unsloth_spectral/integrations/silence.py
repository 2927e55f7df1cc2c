"""Silencing transformers and its hub client, because this package reports every failure in one line of its own."""

import contextlib
import warnings
from collections.abc import Iterator
from logging import ERROR

from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
from transformers.utils import logging


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Silence the progress bars and warnings of transformers and its hub client, and restore their state afterwards."""
    bars, hub_bars = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    verbosity, hub_verbosity = logging.get_verbosity(), hub_logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable_progress_bar()
        logging.set_verbosity(ERROR)
        hub_logging.set_verbosity(ERROR)
        try:
            yield
        finally:
            hub_logging.set_verbosity(hub_verbosity)
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
            if not hub_bars:
                disable_progress_bars()
