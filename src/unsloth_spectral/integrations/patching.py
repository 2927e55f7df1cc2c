"""Giving every ``model.generate(...)`` a spectral cache, and restoring the model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from unsloth_spectral.codec.codec import CodecConfig
from unsloth_spectral.errors import CacheBypassedError
from unsloth_spectral.integrations.forward_check import Call, check_cache_was_used, expect
from unsloth_spectral.integrations.huggingface.cache import SpectralCache
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument, cache_in
from unsloth_spectral.integrations.huggingface.compiling import would_compile
from unsloth_spectral.integrations.huggingface.inputs import refuse_batching
from unsloth_spectral.integrations.huggingface.methods import Method, Replacement, give_back, replace
from unsloth_spectral.integrations.huggingface.owners import Owner, Scope, entered, innermost, lock
from unsloth_spectral.integrations.huggingface.private_api import PREPARE_CACHE
from unsloth_spectral.integrations.huggingface.support import check_model
from unsloth_spectral.integrations.huggingface.switch import CACHES, PATCH, hold, release
from unsloth_spectral.log import warn_once

_STATE = "_unsloth_spectral_patch"


@dataclass
class _Patch:
    """The reasons why a model's ``generate`` is replaced.

    Attributes:
        methods: the methods put on the model.
        config: the options of the last patch; None if there are only scopes and calls.
        owners: scopes and calls that have not ended, of all threads.
    """

    methods: dict[str, Method] = field(default_factory=dict)
    config: CodecConfig | None = None
    owners: list[Owner] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        # No scope of a copy will end: the copy is patched with the options of the innermost scope.
        return {**vars(self), "config": self.newest(), "owners": []}

    def newest(self) -> CodecConfig | None:
        """The options of the scope opened last, in any thread, or those of the patch."""
        scopes = [owner for owner in self.owners if isinstance(owner, Scope) and owner.config is not None]
        return scopes[-1].config if scopes else self.config


def patched(model: PreTrainedModel) -> CodecConfig | None:
    """The options of the cache that ``generate`` would make for ``model`` here; None if it would make none.

    Scopes of this context come first. A thread started within a scope does not inherit it, so a thread without a scope
    of its own follows the scope opened last, and then the patch.
    """
    patch: _Patch | None = vars(model).get(_STATE)
    if patch is None:
        return None
    scope = innermost(model, Scope)
    return patch.newest() if scope is None else scope.config


def patch(model: PreTrainedModel, config: CodecConfig) -> None:
    """Give every later ``model.generate(...)`` a fresh spectral cache; patching again changes the options.

    Within a scope, it changes that scope's options.

    Raises:
        InvalidArgumentError: a rank exceeds the model's head_dim.
        UnsupportedModelError: the model cannot carry a spectral cache.
    """
    check_model(model, config)
    with lock:
        scope = innermost(model, Scope)
        if scope is None:
            _attach(model).config = config
            _attend(model, PATCH)
        else:
            scope.config = config
            _attend(model, scope)


def unpatch(model: PreTrainedModel) -> None:
    """Undo ``patch`` and the switch by ``SpectralCache(model)``; within a scope, undo that scope.

    Scopes of other threads and running calls stay. Harmless on any other model.
    """
    with lock:
        scope = innermost(model, Scope)
        if scope is not None:
            scope.config = None
            release(model, scope)
            return
        patch: _Patch | None = vars(model).get(_STATE)
        if patch is not None:
            patch.config = None
            _detach_if_unused(model, patch)
        release(model, PATCH)
        release(model, CACHES)


@contextmanager
def scoped(model: PreTrainedModel, config: CodecConfig) -> Iterator[None]:
    """``patch`` for a scope of this context."""
    scope = Scope(model, config)
    with entered(scope), _owned(model, scope):
        _attend(model, scope)
        yield


def _attend(model: PreTrainedModel, owner: Owner | str) -> None:
    # Unsloth's models train on Unsloth's own code between calls: they are switched only while they generate.
    if not _trains_in_between(model):
        hold(model, owner)


def _trains_in_between(model: PreTrainedModel) -> bool:
    """True if ``model`` is Unsloth's, which trains on its own code between calls of ``generate``."""
    return hasattr(model, "for_training")


@contextmanager
def _owned(model: PreTrainedModel, owner: Owner) -> Iterator[None]:
    """Keep the methods of ``model`` replaced for ``owner``, and release the model afterwards."""
    with lock:
        patch = _attach(model)
        patch.owners.append(owner)
    try:
        yield
    finally:
        with lock:
            patch.owners.remove(owner)
            _detach_if_unused(model, patch)
            release(model, owner)


def _attach(model: PreTrainedModel) -> _Patch:
    if _STATE not in vars(model):
        setattr(model, _STATE, _Patch())
        replace(model, _METHODS, vars(model)[_STATE].methods)
    patch: _Patch = vars(model)[_STATE]
    return patch


def _detach_if_unused(model: PreTrainedModel, patch: _Patch) -> None:
    if patch.config is None and not patch.owners:
        give_back(patch.methods)
        delattr(model, _STATE)


def _generate(model: PreTrainedModel, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    config = patched(model)
    if config is None:
        return original(*args, **kwargs)
    call = Call(model, config)
    with entered(call), _owned(model, call):
        hold(model, call)
        result = original(*args, **kwargs)
    check_cache_was_used(call, model, original)
    return result


def _fast_generate(model: PreTrainedModel, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if patched(model) is not None and getattr(model, "vllm_engine", None) is not None:
        raise CacheBypassedError(
            f"{type(model).__name__}: fast_generate runs in vLLM, which holds keys and values itself: call generate, "
            "load with fast_inference=False, or call unpatch_unsloth_attention(model)"
        )
    return _generate(model, original, *args, **kwargs)


def _generate_batch(model: PreTrainedModel, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if patched(model) is None:
        return original(*args, **kwargs)
    return refuse_batching(model, original)


def _prepare_cache(
    model: PreTrainedModel,
    original: Callable[..., Any],
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> Any:
    call = innermost(model, Call)
    config = patched(model) if call is None else call.config
    caller_cache = cache_in(model_kwargs)
    if caller_cache is not None and _trains_in_between(model):
        # Unsloth's generate names an implementation in every call, which transformers refuses together with a cache.
        generation_config.cache_implementation = None
    if (
        caller_cache is not None
        or config is None
        or generation_config.use_cache is False
        or _names_another_cache(model, generation_config)
    ):
        expect(model, caller_cache if isinstance(caller_cache, SpectralCache) else None)
        return original(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
    max_length = max_cache_length if would_compile(model, generation_config) else None
    cache = SpectralCache(model, config=config, max_length=max_length)
    if generation_config.is_assistant:
        cache.activate_past_recording()
    model_kwargs |= cache_argument(cache)
    expect(model, cache)
    return None


def _names_another_cache(model: PreTrainedModel, generation_config: Any) -> bool:
    """True if a call asks for a cache of transformers by name; the model's settings do not count, with one warning."""
    name = generation_config.cache_implementation
    if name is None or _trains_in_between(model):
        return False
    if name != model.generation_config.cache_implementation:
        return True
    warn_once(
        "%s: its generation_config names cache_implementation=%r: while the model is patched, generate gets a spectral "
        "cache instead",
        type(model).__name__,
        name,
    )
    return False


_METHODS: dict[str, Replacement] = {
    PREPARE_CACHE: _prepare_cache,
    "generate": _generate,
    "generate_batch": _generate_batch,
    # Unsloth's method, which calls none of the others.
    "fast_generate": _fast_generate,
}
