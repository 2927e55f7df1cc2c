"""Giving every ``model.generate(...)`` a spectral cache, and giving the model back as it was."""

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from transformers import PreTrainedModel

from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.integrations.huggingface.cache import SpectralCache
from unsloth_spectral.integrations.huggingface.support import check_model
from unsloth_spectral.integrations.huggingface.switch import disable, enable

_WRAPPED = "_prepare_cache_for_generation"
_STATE = "_unsloth_spectral_patch"


@dataclass(slots=True)
class _Patch:
    """The options of the last patch, and the instance's own method from before the first, if it had one."""

    config: SpectralConfig
    previous: Callable[..., Any] | None


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
    enable(model)
    if _STATE not in vars(model):
        setattr(model, _STATE, _Patch(config, vars(model).get(_WRAPPED)))
    vars(model)[_STATE].config = config
    # A bound method: a deepcopy of the model gets one bound to itself.
    setattr(model, _WRAPPED, MethodType(_prepare_cache, model))


def unpatch(model: PreTrainedModel) -> None:
    """Undo ``patch``, but leave the attention function to caches that were made with ``SpectralCache(model)``."""
    patch: _Patch | None = vars(model).get(_STATE)
    if patch is not None:
        delattr(model, _STATE)
        delattr(model, _WRAPPED)
        if patch.previous is not None:
            setattr(model, _WRAPPED, patch.previous)


def restore(model: PreTrainedModel) -> None:
    """Undo ``patch`` and what ``SpectralCache(model)`` switched; harmless on any other model."""
    unpatch(model)
    disable(model)


def _prepare_cache(
    model: PreTrainedModel, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    patch: _Patch = vars(model)[_STATE]
    own_cache = model_kwargs.get("past_key_values") is not None
    if own_cache or generation_config.use_cache is False:
        original = patch.previous or MethodType(getattr(type(model), _WRAPPED), model)
        return original(generation_config, model_kwargs, *args, **kwargs)
    enable(model)
    cache = SpectralCache(model, config=patch.config)
    if generation_config.is_assistant:
        cache.activate_past_recording()
    model_kwargs["past_key_values"] = cache
    return None
