"""Giving a model the spectral attention function, and giving back its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from unsloth_spectral.integrations import fast_path
from unsloth_spectral.integrations.huggingface.attention import attend
from unsloth_spectral.integrations.huggingface.cache_argument import cache_in
from unsloth_spectral.integrations.huggingface.rotary import note_rotations
from unsloth_spectral.integrations.huggingface.support import ATTENTION_NAME, why_materialised

_STATE = "_unsloth_spectral_switch"


# Configuration objects, each with its attention implementation.
_Implementations: TypeAlias = tuple[tuple[Any, str | None], ...]


@dataclass(frozen=True, slots=True)
class _Switched:
    """Every configuration object of a model with the attention implementation it had, and the hooks put on."""

    implementations: _Implementations
    hooks: tuple[Any, ...]


def is_enabled(model: PreTrainedModel) -> bool:
    """Whether the model's language part uses the spectral attention function now."""
    return model.config.get_text_config(decoder=True)._attn_implementation == ATTENTION_NAME


def enable(model: PreTrainedModel) -> None:
    """Let ``model`` attend through ``attend``, off Unsloth's fast path; harmless where it does already.

    A model that is handed rebuilt keys and values keeps its own attention.
    """
    if why_materialised(model) is not None:
        return
    # Again where the function is on already: adding an adapter puts a model back on its fast path.
    fast_path.leave(model)
    if is_enabled(model):
        return
    AttentionInterface.register(ATTENTION_NAME, attend)
    # Without a mask function of the same name padding would be ignored without a word.
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    if _STATE not in vars(model):
        before = _implementations(model)
        setattr(
            model,
            _STATE,
            _Switched(before, (*note_rotations(model), model.register_forward_pre_hook(_check, with_kwargs=True))),
        )
    text_config = model.config.get_text_config(decoder=True)
    if not model._can_set_attn_implementation():
        _assign(((text_config, ATTENTION_NAME),))  # a copy by Unsloth's compiler, of which transformers knows nothing
        return
    name = next((key for key in model.config.sub_configs if getattr(model.config, key, None) is text_config), None)
    model.set_attn_implementation(ATTENTION_NAME if name is None else {name: ATTENTION_NAME})


def disable(model: PreTrainedModel) -> None:
    """Give every part of ``model`` the attention implementation it had before ``enable``, and its fast path."""
    fast_path.take(model)
    switched: _Switched | None = vars(model).get(_STATE)
    if switched is None:
        return
    _assign(switched.implementations)
    for hook in switched.hooks:
        hook.remove()
    delattr(model, _STATE)


def _check(model: nn.Module, _: Any, kwargs: dict[str, Any]) -> None:
    """A forward pre-hook: a spectral cache, which knows what it fits, is asked before the model runs with it."""
    check_fits = getattr(cache_in(kwargs), "check_fits", None)
    if check_fits is not None:
        check_fits(model)


@contextmanager
def remembered(model: PreTrainedModel) -> Iterator[None]:
    """Give ``model`` back as it is now: switched as it is, or not at all."""
    was_switched, before = _STATE in vars(model), _implementations(model)
    try:
        yield
    finally:
        if was_switched:
            _assign(before)
        else:
            disable(model)


def _implementations(model: PreTrainedModel) -> _Implementations:
    configs = {id(config): config for config in _configs(model)}
    return tuple((config, config._attn_implementation_internal) for config in configs.values())


def _assign(implementations: _Implementations) -> None:
    for config, implementation in implementations:
        config._attn_implementation_internal = implementation


def _configs(model: PreTrainedModel) -> list[Any]:
    found = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    for config in list(found):
        found.extend(sub for key in config.sub_configs if (sub := getattr(config, key, None)) is not None)
    return found
