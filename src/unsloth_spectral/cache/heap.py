"""Giving memory back to the system once dense tokens have been sealed.

The C library's allocator keeps what torch frees where something small lies above it, and codes are made after the
dense tokens they replace: without this a process stays as large as if nothing had been compressed.
"""

import ctypes
from collections.abc import Callable
from functools import lru_cache

# Looking through the heap takes some milliseconds, so it waits for enough to have come together.
_ENOUGH_BYTES = 64 << 20

_waiting = 0


def released(nbytes: int) -> None:
    """Note that ``nbytes`` of dense tensors were let go; now and then all free memory goes back to the system."""
    global _waiting
    # No lock: an interruption could leave it held, and threads that miscount cost nothing but a late trim.
    _waiting += nbytes
    if _waiting < _ENOUGH_BYTES:
        return
    _waiting = 0
    trim = _trim()
    if trim is not None:
        trim(0)


@lru_cache
def _trim() -> Callable[[int], int] | None:
    """glibc's ``malloc_trim``; None elsewhere."""
    try:
        function: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return function
