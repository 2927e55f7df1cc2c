"""Giving a model the spectral attention function while an owner needs it, and restoring the model afterwards."""

from dataclasses import dataclass, field
from typing import Any, TypeAlias

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from unsloth_spectral.integrations import fast_path
from unsloth_spectral.integrations.forward_check import after_pass, before_pass
from unsloth_spectral.integrations.huggingface.attention import attend
from unsloth_spectral.integrations.huggingface.compiling import step_mask
from unsloth_spectral.integrations.huggingface.inputs import prepare_inputs, refuse_batching
from unsloth_spectral.integrations.huggingface.methods import Method, Replacement, give_back, replace
from unsloth_spectral.integrations.huggingface.owners import Owner, Scope, innermost, lock
from unsloth_spectral.integrations.huggingface.private_api import (
    attention_of,
    can_set_attention,
    store_attention,
    stored_attention,
)
from unsloth_spectral.integrations.huggingface.rotary import note_rotations
from unsloth_spectral.integrations.huggingface.support import ATTENTION_NAME, why_materialised

_STATE = "_unsloth_spectral_switch"
_METHODS: dict[str, Replacement] = {
    "prepare_inputs_for_generation": prepare_inputs,
    "init_continuous_batching": refuse_batching,
}
# These owners never end by themselves: they hold a model until it is unpatched.
PATCH, CACHES = "patch", "caches"

# Configuration objects, each with its attention implementation.
_Implementations: TypeAlias = tuple[tuple[Any, str | None], ...]


@dataclass
class _Switched:
    """The owners that keep a model switched, and what the model had before.

    Attributes:
        implementations: every configuration object with the attention implementation it had before the first owner.
        methods: the methods put on the model.
        hooks: the hooks put on its modules.
        owners: ``PATCH``, ``CACHES``, scopes and calls that have not ended.
        beneath: the implementations to restore when the last scope ends: those at the beginning of the first open
            scope, or those that a patch or cache has set since.
    """

    implementations: _Implementations
    methods: dict[str, Method] = field(default_factory=dict)
    hooks: list[Any] = field(default_factory=list)
    owners: list[Owner | str] = field(default_factory=list)
    beneath: _Implementations | None = None

    def __getstate__(self) -> dict[str, Any]:
        # No scope or call of a copy will end: it stays switched until it is unpatched.
        lasting = [owner for owner in self.owners if isinstance(owner, str)]
        return {**vars(self), "owners": lasting or [CACHES], "beneath": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        _register()  # this may be another process
        vars(self).update(state)


def is_enabled(model: PreTrainedModel) -> bool:
    """True if the model's language part uses the spectral attention function now."""
    return attention_of(model.config.get_text_config(decoder=True)) == ATTENTION_NAME


def hold(model: PreTrainedModel, owner: Owner | str | None = None) -> None:
    """Let ``model`` attend through ``attend``, off Unsloth's fast path, until ``owner`` releases it.

    A model that gets rebuilt keys and values keeps its own attention. ``owner`` defaults to the innermost call or scope
    of this context, or else to ``CACHES``.
    """
    with lock:
        owner = owner or innermost(model, Owner) or CACHES
        switched: _Switched | None = vars(model).get(_STATE)
        if switched is None:
            switched = _Switched(_implementations(model), owners=[owner])
            setattr(model, _STATE, switched)
        if isinstance(owner, Scope) and switched.beneath is None:
            switched.beneath = _implementations(model)
        if owner not in switched.owners:
            switched.owners.append(owner)
        _switch_on(model, switched)
        if isinstance(owner, str) and switched.beneath is not None:
            switched.beneath = _implementations(model)


def release(model: PreTrainedModel, owner: Owner | str) -> None:
    """Undo ``hold``; the last owner restores attention, methods and fast path. Other owners are ignored."""
    with lock:
        switched: _Switched | None = vars(model).get(_STATE)
        if switched is None or owner not in switched.owners:
            return
        switched.owners.remove(owner)
        if not switched.owners:
            _switch_off(model, switched)
        elif switched.beneath is not None and all(isinstance(other, str) for other in switched.owners):
            _assign(switched.beneath)
            switched.beneath = None


def _switch_on(model: PreTrainedModel, switched: _Switched) -> None:
    is_direct = why_materialised(model) is None
    if is_direct:
        # Repeated even if the model is switched already: adding an adapter puts a model back on its fast path.
        fast_path.leave(model)
    replace(model, _METHODS, switched.methods)
    if not switched.hooks:
        switched.hooks.append(model.register_forward_pre_hook(before_pass, with_kwargs=True))
        switched.hooks.append(model.register_forward_hook(after_pass, with_kwargs=True))
        if is_direct:
            switched.hooks.extend(note_rotations(model))
    if not is_direct or is_enabled(model):
        return
    _register()
    text_config = model.config.get_text_config(decoder=True)
    if not can_set_attention(type(model)):
        _assign(((text_config, ATTENTION_NAME),))  # a copy by Unsloth's compiler, unknown to transformers
        return
    name = next((key for key in model.config.sub_configs if getattr(model.config, key, None) is text_config), None)
    model.set_attn_implementation(ATTENTION_NAME if name is None else {name: ATTENTION_NAME})


def _switch_off(model: PreTrainedModel, switched: _Switched) -> None:
    give_back(switched.methods)
    fast_path.take(model)
    _assign(switched.implementations)
    for handle in switched.hooks:
        handle.remove()
    delattr(model, _STATE)


def _register() -> None:
    AttentionInterface.register(ATTENTION_NAME, attend)
    # Without a mask function of the same name transformers would silently ignore padding.
    AttentionMaskInterface.register(ATTENTION_NAME, step_mask)


def _implementations(model: PreTrainedModel) -> _Implementations:
    configs = {id(config): config for config in _configs(model)}
    return tuple((config, stored_attention(config)) for config in configs.values())


def _assign(implementations: _Implementations) -> None:
    for config, implementation in implementations:
        store_attention(config, implementation)


def _configs(model: PreTrainedModel) -> list[Any]:
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    for config in list(configs):
        configs.extend(sub for key in config.sub_configs if (sub := getattr(config, key, None)) is not None)
    return configs
