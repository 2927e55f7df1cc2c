"""Replacing methods of one module, not of its class, and giving back what it had."""

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

from torch import nn

Replacement = Callable[..., Any]


class Method:
    """``function(module, original, *args, **kwargs)`` as a method of ``module``, in place of ``original``.

    A bound function would serve calls as well, but a pickled one comes back as the class's.

    Attributes:
        module: whose method it is.
        function: defined in a Python module, so that it can be pickled.
        previous: what the module itself had by this name; None where it had its class's method.
    """

    def __init__(
        self, module: nn.Module, name: str, function: Replacement, previous: Callable[..., Any] | None
    ) -> None:
        self.module, self.function, self.previous = module, function, previous
        self.__name__ = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module, self.__wrapped__, *args, **kwargs)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The original, whose signature transformers looks at."""
        return self.previous or MethodType(getattr(type(self.module), self.__name__), self.module)

    def give_back(self) -> None:
        """Let the module have what it had before, whatever was put in place since."""
        vars(self.module).pop(self.__name__, None)
        if self.previous is not None:
            setattr(self.module, self.__name__, self.previous)


def replace(module: nn.Module, functions: Mapping[str, Replacement], methods: dict[str, Method]) -> None:
    """Put ``functions`` in place of the methods that ``module`` has, and add to ``methods`` the first for each name.

    A function that is in place already stays. One that somebody else has covered is put on top again.
    """
    for name, function in functions.items():
        current = vars(module).get(name)
        is_in_place = isinstance(current, Method) and current.function is function
        if hasattr(module, name) and not is_in_place:
            method = Method(module, name, function, current)
            setattr(module, name, method)
            methods.setdefault(name, method)


def give_back(methods: Mapping[str, Method]) -> None:
    """Undo ``replace``."""
    for method in methods.values():
        method.give_back()
