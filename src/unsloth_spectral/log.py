"""The library's one logger, and warnings that are given once."""

import logging
from weakref import WeakKeyDictionary

logger = logging.getLogger("unsloth_spectral")

# Messages already logged, by the object they are about; messages about no object are stored under the logger.
_logged: WeakKeyDictionary[object, set[str]] = WeakKeyDictionary()


def warn_once(message: str, *args: object, about: object = None) -> None:
    """Log ``message % args`` as a warning the first time, and at debug level from then on.

    Args:
        message: the template; the same template with other ``args`` counts as the same message.
        args: exceptions are logged as text, because a handler that keeps its records would keep the tensors of their
            tracebacks alive.
        about: an object, held weakly, for which the message is counted separately; None to count it for the process.
    """
    logged = _logged.setdefault(logger if about is None else about, set())
    texts = [str(arg) if isinstance(arg, BaseException) else arg for arg in args]
    logger.log(logging.DEBUG if message in logged else logging.WARNING, message, *texts)
    logged.add(message)
