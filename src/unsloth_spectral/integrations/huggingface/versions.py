"""The newest transformers that this library is tested with."""

import transformers

from unsloth_spectral.log import warn_once

NEWEST_TESTED = "5.24"


def warn_if_untested() -> None:
    """Log one line where the installed transformers is newer than the newest tested one."""
    installed = transformers.__version__
    if _release(installed) > _release(NEWEST_TESTED):
        warn_once(
            "transformers %s is newer than %s, the newest that unsloth-spectral is tested with: if something fails, "
            "install that one, or a newer unsloth-spectral",
            installed,
            NEWEST_TESTED,
        )


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split(".")[:2])
