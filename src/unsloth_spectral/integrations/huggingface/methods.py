"""Replacing methods of one model, not of its class, and giving back what it had."""

from collections.abc import Callable, Iterable, Mapping
from types import MethodType
from typing import Any

from transformers import PreTrainedModel

Replacement = Callable[..., Any]


class Method:
    """``function(model, original, *args, **kwargs)`` as a method of ``model``, in place of ``original``.

    A bound function would do, but a pickled one comes back as the class's.

    Args:
        function: of a module, so that it can be pickled.
        previous: what the model itself had by this name; None where it had its class's method.
    """

    def __init__(
        self, model: PreTrainedModel, name: str, function: Replacement, previous: Callable[..., Any] | None
    ) -> None:
        self._model, self._function, self._previous = model, function, previous
        self.__name__ = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self._model, self.__wrapped__, *args, **kwargs)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The original, whose signature transformers looks at."""
        return self._previous or MethodType(getattr(type(self._model), self.__name__), self._model)


def own_methods(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Any]:
    """Those of ``names`` that ``model`` has for itself, past its class."""
    return {name: vars(model)[name] for name in names if name in vars(model)}


def replace(model: PreTrainedModel, functions: Mapping[str, Replacement]) -> None:
    """Put ``functions`` in place of the methods that ``model`` has; those replaced already stay so."""
    for name, function in functions.items():
        previous = vars(model).get(name)
        if hasattr(model, name) and not isinstance(previous, Method):
            setattr(model, name, Method(model, name, function, previous))


def give_back(model: PreTrainedModel, names: Iterable[str], previous: Mapping[str, Any]) -> None:
    """Undo ``replace``: ``previous`` are the methods that the model had for itself."""
    for name in names:
        vars(model).pop(name, None)
    for name, method in previous.items():
        setattr(model, name, method)
