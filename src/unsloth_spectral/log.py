"""The one logger, and warnings that are given once."""

import logging

logger = logging.getLogger("unsloth_spectral")
_told: set[str] = set()


def warn_once(message: str, *args: object) -> None:
    """Log ``message % args`` as a warning the first time that ``message`` comes, for debugging from then on."""
    logger.log(logging.DEBUG if message in _told else logging.WARNING, message, *args)
    _told.add(message)
