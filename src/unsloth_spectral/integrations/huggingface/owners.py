"""Scopes and calls of ``generate`` that keep a model switched, and those that this thread or task is in."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import RLock
from typing import TypeVar
from weakref import ref

from transformers import PreTrainedModel

from unsloth_spectral.codec.codec import CodecConfig

# Locked while a model is switched or restored, for microseconds: one lock serves all models.
lock = RLock()


class Owner:
    """A scope or a call that needs ``model`` switched until it ends.

    Attributes:
        config: the options of the caches that ``generate`` makes for this owner; None if it makes none.
        is_open: whether the owner has not ended; a task or a generator may outlive the scope that it began in.
    """

    def __init__(self, model: PreTrainedModel, config: CodecConfig | None) -> None:
        # Weak: a context may live as long as its thread.
        self._model = ref(model)
        self.config, self.is_open = config, True

    def is_for(self, model: PreTrainedModel) -> bool:
        return self.is_open and self._model() is model


class Scope(Owner):
    """A ``with spectral(model):``."""


OwnerT = TypeVar("OwnerT", bound=Owner)
_entered: ContextVar[tuple[Owner, ...]] = ContextVar("entered", default=())


@contextmanager
def entered(owner: Owner) -> Iterator[None]:
    """Make ``owner`` the innermost one of this context, and end it afterwards."""
    _entered.set((*(outer for outer in _entered.get() if outer.is_open), owner))
    try:
        yield
    finally:
        owner.is_open = False
        # Not ContextVar.reset(token), because generators leave their scopes in any order.
        _entered.set(tuple(outer for outer in _entered.get() if outer is not owner))


def innermost(model: PreTrainedModel, kind: type[OwnerT]) -> OwnerT | None:
    """The innermost open owner of this ``kind`` that this context is in, for ``model``; None where there is none."""
    return next((owner for owner in reversed(_entered.get()) if isinstance(owner, kind) and owner.is_for(model)), None)
