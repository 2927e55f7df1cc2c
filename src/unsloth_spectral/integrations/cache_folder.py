"""The folder for files that this package makes once: profiles, and the copy of the embedded model."""

import os
from pathlib import Path

from platformdirs import user_cache_path

CACHE_VARIABLE = "UNSLOTH_SPECTRAL_CACHE"


def cache_folder() -> Path:
    """``$UNSLOTH_SPECTRAL_CACHE``, or the user's cache folder for this package; it may be missing or unreadable.

    Raises:
        OSError: the variable is not set, and the user has no home folder.
    """
    try:
        return Path(os.environ.get(CACHE_VARIABLE) or user_cache_path("unsloth-spectral")).expanduser().absolute()
    except RuntimeError as error:  # from platformdirs, or from pathlib if an older platformdirs leaves the `~`
        raise NotADirectoryError(str(error)) from error
