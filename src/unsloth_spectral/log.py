"""The one logger, and warnings that are given once."""

import logging

logger = logging.getLogger("unsloth_spectral")
_told: set[str] = set()


def warn_once(message: str, *args: object) -> None:
    """Log ``message % args`` as a warning the first time that ``message`` comes, for debugging from then on.

    Exceptions among ``args`` go as text: a handler that keeps its records would keep the tensors of their tracebacks.
    """
    texts = [str(arg) if isinstance(arg, BaseException) else arg for arg in args]
    logger.log(logging.DEBUG if message in _told else logging.WARNING, message, *texts)
    _told.add(message)
