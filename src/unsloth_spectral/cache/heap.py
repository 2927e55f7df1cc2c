"""Returning memory to the system once dense tokens have been sealed.

The C library's allocator keeps memory that torch frees if something small lies above it, and codes are allocated after
the dense tokens that they replace. Without this a process stays as large as if nothing had been compressed.
"""

import ctypes
from collections.abc import Callable
from functools import lru_cache

# Trimming the heap takes some milliseconds, so it waits until this much has been freed.
_ENOUGH_BYTES = 64 << 20

_waiting = 0


def released(nbytes: int) -> None:
    """Note that ``nbytes`` of dense tensors were freed; from time to time, return all free memory to the system."""
    global _waiting
    # No lock: an interruption could leave it locked, and a miscount between threads only delays a trim.
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
