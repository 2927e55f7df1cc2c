"""The call of an attention module, which a forward pre-hook passes to the call's cache."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """One call of an attention module.

    Attributes:
        module: the module, whose layer of the cache receives the new keys and values.
        position_embeddings: the argument of that name, usually cosines and sines; None if there is none.
    """

    module: nn.Module
    position_embeddings: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> "AttentionCall":
        # A layer keeps the call of an interrupted pass, and copying the cache must not copy the model.
        return self


def note_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook, with keyword arguments, of an attention module: tells a spectral cache about the call.

    The cache is recognised by its type, because models name it differently (``layer_past`` in GPT-NeoX).
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Cache) and hasattr(value, "note_call") and not in_compiled_step(value):
            _note(value, module, kwargs.get("position_embeddings"))


# Not compiled, because the call changes at every step.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _note(cache: Any, module: nn.Module, position_embeddings: Any) -> None:
    cache.note_call(module.layer_idx, AttentionCall(module, position_embeddings))


def in_compiled_step(cache: Any) -> bool:
    """True while a step of ``cache`` is compiled: its graph needs no more than the cache's buffers."""
    return torch.compiler.is_compiling() and cache.is_in_step
