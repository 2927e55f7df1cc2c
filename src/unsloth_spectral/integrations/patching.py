"""Giving every ``model.generate(...)`` a spectral cache, and giving the model back as it was."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock
from types import MethodType
from typing import Any

from transformers import PreTrainedModel

from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.errors import CacheBypassedError
from unsloth_spectral.integrations.huggingface.cache import SpectralCache
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument, cache_in
from unsloth_spectral.integrations.huggingface.support import check_model
from unsloth_spectral.integrations.huggingface.switch import disable, enable, is_enabled
from unsloth_spectral.integrations.reached import expect, generating, watch

_PREPARE = "_prepare_cache_for_generation"
_STATE = "_unsloth_spectral_patch"
_counting = Lock()


@dataclass(slots=True)
class _Patch:
    """The options of the last patch, and what the instance itself had before the first.

    Attributes:
        config: how to compress.
        previous: the methods the instance had of its own, by name.
        hooks: the watch on its steps.
        running: calls of ``generate`` in all threads, for whose time Unsloth's models are switched.
        was_on: whether the model was switched before the first of them, and stays so after the last.
    """

    config: SpectralConfig
    previous: dict[str, Callable[..., Any]]
    hooks: tuple[Any, ...]
    running: int = 0
    was_on: bool = False


def patched(model: PreTrainedModel) -> SpectralConfig | None:
    """The options ``model`` is patched with; None where it is not."""
    patch: _Patch | None = vars(model).get(_STATE)
    return None if patch is None else patch.config


def patch(model: PreTrainedModel, config: SpectralConfig) -> None:
    """Give every ``model.generate(...)`` from now on a fresh spectral cache; patching again changes the options.

    Raises:
        InvalidArgumentError: a rank exceeds the model's head_dim.
        UnsupportedModelError: the model cannot carry a spectral cache.
    """
    check_model(model, config)
    if not _trains_in_between(model):
        enable(model)
    own = vars(model)
    if _STATE in own:
        own[_STATE].config = config
        return
    methods = {name: method for name, method in _METHODS.items() if hasattr(model, name)}
    previous = {name: own[name] for name in methods if name in own}
    setattr(model, _STATE, _Patch(config, previous, watch(model)))
    for name, method in methods.items():
        setattr(model, name, _bound(method, model))


def _bound(method: Callable[..., Any], model: PreTrainedModel) -> Callable[..., Any]:
    """``method`` of ``model``; a copy of the model, pickled or deep, gets one bound to itself."""
    # A method is pickled as an attribute's name, which the new model would look up on its class.
    bound: Any = partial(method, model)
    bound.__name__ = method.__name__  # a method has one, which Unsloth asks for
    return bound


def unpatch(model: PreTrainedModel) -> None:
    """Undo ``patch``, but leave the attention function to caches that were made with ``SpectralCache(model)``."""
    patch: _Patch | None = vars(model).get(_STATE)
    if patch is None:
        return
    for hook in patch.hooks:
        hook.remove()
    for name in (_STATE, *_METHODS):
        vars(model).pop(name, None)
    for name, method in patch.previous.items():
        setattr(model, name, method)


def restore(model: PreTrainedModel) -> None:
    """Undo ``patch`` and what ``SpectralCache(model)`` switched; harmless on any other model."""
    unpatch(model)
    disable(model)


def _trains_in_between(model: PreTrainedModel) -> bool:
    """Whether ``model`` is Unsloth's, which trains on code of its own: it is switched while it generates only."""
    return hasattr(model, "for_training")


def _generate(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    return _run(model, "generate", args, kwargs)


def _fast_generate(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    if getattr(model, "vllm_engine", None) is not None:
        raise CacheBypassedError(
            f"{type(model).__name__}: fast_generate runs in vLLM, which holds keys and values itself: call generate, "
            "load with fast_inference=False, or call unpatch_unsloth_attention(model)"
        )
    return _run(model, "fast_generate", args, kwargs)


def _run(model: PreTrainedModel, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    original = _previous(model, name)
    with _switched(model), generating(model, original):
        return original(*args, **kwargs)


@contextmanager
def _switched(model: PreTrainedModel) -> Iterator[None]:
    """Switch ``model`` for a call of generate, if it is not for good; the last of several calls gives it back."""
    patch: _Patch = vars(model)[_STATE]
    with _counting:
        if not patch.running:
            patch.was_on = is_enabled(model) or not _trains_in_between(model)
        patch.running += 1
    try:
        with _counting:
            enable(model)
        yield
    finally:
        with _counting:
            patch.running -= 1
            if not patch.running and not patch.was_on:
                disable(model)


def _previous(model: PreTrainedModel, name: str) -> Callable[..., Any]:
    patch: _Patch = vars(model)[_STATE]
    return patch.previous.get(name) or MethodType(getattr(type(model), name), model)


def _prepare_cache(
    model: PreTrainedModel, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    own_cache = cache_in(model_kwargs)
    if own_cache is not None or generation_config.use_cache is False:
        if own_cache is not None and _trains_in_between(model):
            # Unsloth's generate names one in every call, which transformers refuses beside a cache.
            generation_config.cache_implementation = None
        expect(own_cache if isinstance(own_cache, SpectralCache) else None)
        return _previous(model, _PREPARE)(generation_config, model_kwargs, *args, **kwargs)
    enable(model)
    cache = SpectralCache(model, config=vars(model)[_STATE].config)
    if generation_config.is_assistant:
        cache.activate_past_recording()
    model_kwargs |= cache_argument(cache)
    expect(cache)
    return None


_METHODS: dict[str, Callable[..., Any]] = {
    _PREPARE: _prepare_cache,
    "generate": _generate,
    # Unsloth's, which does not pass through the other.
    "fast_generate": _fast_generate,
}
