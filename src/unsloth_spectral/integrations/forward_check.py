"""The check that a forward pass gave its tokens to its spectral cache, and the explanation if it did not."""

import inspect
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from unsloth_spectral.codec.codec import CodecConfig
from unsloth_spectral.errors import CacheBypassedError
from unsloth_spectral.integrations.huggingface.attention_call import in_compiled_step
from unsloth_spectral.integrations.huggingface.cache_argument import cache_in
from unsloth_spectral.integrations.huggingface.owners import Owner, innermost
from unsloth_spectral.integrations.huggingface.private_api import PREPARE_CACHE
from unsloth_spectral.log import warn_once

SUPPORTED = "Unsloth 2026.10.8, 2026.10.9 and newer ones of that build"


class Call(Owner):
    """A call of ``generate``.

    Attributes:
        is_prepared: whether the call has asked for its cache.
        cache: the call's spectral cache; None if it uses another kind or none.
    """

    def __init__(self, model: PreTrainedModel, config: CodecConfig) -> None:
        super().__init__(model, config)
        self.is_prepared = False
        self.cache: Cache | None = None


def expect(model: PreTrainedModel, cache: Cache | None) -> None:
    """Note that the call of ``generate`` in this context uses ``cache``; None for another kind of cache or no cache."""
    call = innermost(model, Call)
    if call is not None:
        call.is_prepared, call.cache = True, cache


def check_cache_was_used(call: Call, model: PreTrainedModel, method: Callable[..., Any]) -> None:
    """Check that ``method``, which generated in ``call``, asked for a cache and gave it tokens.

    Raises:
        CacheBypassedError: it did not; the message names the method and the fix.
    """
    if not call.is_prepared:
        raise CacheBypassedError(_explain(model, method, f"made no cache by transformers' {PREPARE_CACHE}"))
    if call.cache is not None and call.cache.get_seq_length() == 0:
        raise CacheBypassedError(_explain(model, method, "gave its spectral cache no token"))


def before_pass(model: PreTrainedModel, _: Any, kwargs: dict[str, Any]) -> None:
    """A forward pre-hook, with keyword arguments, of a model: tells a spectral cache that a pass begins."""
    cache = cache_in(kwargs)
    if hasattr(cache, "begin_pass") and not in_compiled_step(cache):
        _begin(model, cache)


# Not compiled: the compiler would compile the model again for every length.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _begin(model: PreTrainedModel, cache: Any) -> None:
    cache.begin_pass(model)


def after_pass(model: PreTrainedModel, _: Any, kwargs: dict[str, Any], __: Any) -> None:
    """A forward hook, with keyword arguments, of a model.

    A pass with another cache or none is not checked: guidance, logits processors and stopping criteria run the model
    without the spectral cache of the generation.

    Raises:
        CacheBypassedError: in a call of ``generate``, if its cache received no token; elsewhere it warns once.
    """
    cache = cache_in(kwargs)
    if hasattr(cache, "begin_pass") and not in_compiled_step(cache):
        _check(model, cache)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _check(model: PreTrainedModel, cache: Any) -> None:
    if cache.received_nothing:
        bypassed(model, model.forward, cache, f"took a step after {cache.get_seq_length()} tokens past")


def bypassed(model: PreTrainedModel, method: Callable[..., Any], cache: Any, action: str) -> None:
    """Raise in the call of ``generate`` that made ``cache``; warn once about a cache that the caller made."""
    call = innermost(model, Call)
    if call is not None and call.cache is cache:
        raise CacheBypassedError(_explain(model, method, f"{action} its spectral cache"))
    warn_once(_explain(model, method, "gave the spectral cache that it was called with no token").replace("%", "%%"))


def _explain(model: PreTrainedModel, method: Callable[..., Any], action: str) -> str:
    function: Any = inspect.unwrap(getattr(method, "__func__", method))
    path = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(method).__name__)}"
    return f"{type(model).__name__}: {path} {action}; {_remedy(model, path)}"


def _remedy(model: PreTrainedModel, path: str) -> str:
    """Why the function named ``path`` may have kept tokens out of ``model``'s cache, and the fix."""
    unpatch = "or call unpatch_unsloth_attention(model)"
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return (
            f"gradient checkpointing, in training mode, lets no layer see a cache: call model.eval() first, {unpatch}"
        )
    if path.startswith("unsloth") or hasattr(model, "for_training"):
        return f"supported are {SUPPORTED}{_installed()}: install one of them, {unpatch}"
    return f"that function must pass the cache it is given on to transformers' own code: change it, {unpatch}"


def _installed() -> str:
    if "unsloth" not in sys.modules:
        return ""
    try:
        return f", installed is {version('unsloth')}"
    except PackageNotFoundError:
        return ""
