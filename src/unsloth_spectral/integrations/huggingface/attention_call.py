"""The call of an attention module, as its forward pre-hook sees it, handed to the cache that the call carries."""

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
        position_embeddings: what the model passes under that name, cosines and sines as a rule; None where it passes
            nothing.
    """

    module: nn.Module
    position_embeddings: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> "AttentionCall":
        # A layer keeps the call of an interrupted pass. A copy of the cache is no copy of the model.
        return self


# The compiler leaves the hook alone: the call changes at every step.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def note_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook, with keyword arguments, of an attention module: a spectral cache is told of the call.

    The cache is recognised by its type, because models disagree about its name (GPT-NeoX says ``layer_past``).
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Cache) and hasattr(value, "note_call"):
            value.note_call(module.layer_idx, AttentionCall(module, kwargs.get("position_embeddings")))
