"""The check that every step of a generation reached its spectral cache, and the error where one did not."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from unsloth_spectral.errors import CacheBypassedError

SUPPORTED = "Unsloth 2026.10.8, 2026.10.9 and newer ones of that build"


@dataclass(slots=True)
class _Call:
    """A call of ``generate``: its spectral cache, once known, and how many tokens it held before the step."""

    is_prepared: bool = False
    cache: Cache | None = None
    num_tokens: int = 0


# Of this thread, and of the innermost of calls that assist each other.
_call: ContextVar[_Call | None] = ContextVar("call", default=None)


@contextmanager
def generating(model: PreTrainedModel, method: Callable[..., Any]) -> Iterator[None]:
    """A call of ``method``, which generates with ``model``.

    Raises:
        CacheBypassedError: it ended without having asked for a cache, or without having given it anything.
    """
    call = _Call()
    token = _call.set(call)
    try:
        yield
    finally:
        _call.reset(token)
    if not call.is_prepared:
        raise _bypassed(model, method, "made no cache by transformers' _prepare_cache_for_generation")
    if call.cache is not None and call.cache.get_seq_length() == 0:
        raise _bypassed(model, method, "gave its spectral cache no token")


def expect(cache: Cache | None) -> None:
    """Every step of this thread's call has to reach ``cache``; None where it uses another kind or none."""
    call = _call.get()
    if call is not None:
        call.is_prepared, call.cache = True, cache


def watch(model: PreTrainedModel) -> tuple[Any, ...]:
    """Hooks on ``model`` that raise ``CacheBypassedError`` after a step that did not reach the cache of its call."""
    return model.register_forward_pre_hook(_before), model.register_forward_hook(_after)


def _before(model: PreTrainedModel, args: Any) -> None:
    call = _call.get()
    if call is not None and call.cache is not None:
        call.num_tokens = call.cache.get_seq_length()


def _after(model: PreTrainedModel, args: Any, output: Any) -> None:
    call = _call.get()
    if call is not None and call.cache is not None and call.cache.get_seq_length() <= call.num_tokens:
        raise _bypassed(model, model.forward, f"took a step after {call.num_tokens} tokens past its spectral cache")


def _bypassed(model: PreTrainedModel, method: Callable[..., Any], what: str) -> CacheBypassedError:
    function: Any = inspect.unwrap(getattr(method, "__func__", method))
    path = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(method).__name__)}"
    return CacheBypassedError(
        f"{type(model).__name__}: {path} {what}; supported are transformers' own generate and {SUPPORTED}"
        f"{_installed()}: install one of them, or call unpatch_unsloth_attention(model)"
    )


def _installed() -> str:
    if "unsloth" not in sys.modules:
        return ""
    try:
        return f", installed is {version('unsloth')}"
    except PackageNotFoundError:
        return ""
