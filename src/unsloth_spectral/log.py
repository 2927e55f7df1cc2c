"""The library's one logger, and warnings that are given once."""

import logging
from weakref import WeakKeyDictionary

logger = logging.getLogger("unsloth_spectral")

# The messages already given, by what they are about; those about nothing in particular are filed under the logger.
_told: WeakKeyDictionary[object, set[str]] = WeakKeyDictionary()


def warn_once(message: str, *args: object, about: object = None) -> None:
    """Log ``message % args`` as a warning the first time, and at debug level from then on.

    Args:
        message: the template; the same template with other ``args`` counts as the same message.
        args: exceptions are logged as text, because a handler that keeps its records would keep the tensors of their
            tracebacks alive.
        about: an object, held weakly, for which the message is counted separately; None to count it for the process.
    """
    told = _told.setdefault(logger if about is None else about, set())
    texts = [str(arg) if isinstance(arg, BaseException) else arg for arg in args]
    logger.log(logging.DEBUG if message in told else logging.WARNING, message, *texts)
    told.add(message)
