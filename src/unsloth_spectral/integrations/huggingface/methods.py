"""Replacing methods of one module, not of its class, and restoring them."""

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

from torch import nn

Replacement = Callable[..., Any]


class Method:
    """``function(module, original, *args, **kwargs)`` as a method of ``module``, in place of ``original``.

    A bound function would also work, but unpickling one gives the method of the class.

    Attributes:
        module: the module that has the method.
        function: defined in a Python module, so that it can be pickled.
        previous: the module's own attribute of this name before; None if it had its class's method.
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
        """The original; transformers inspects its signature."""
        return self.previous or MethodType(getattr(type(self.module), self.__name__), self.module)

    def give_back(self) -> None:
        """Restore the previous method, even if another one has replaced this since."""
        vars(self.module).pop(self.__name__, None)
        if self.previous is not None:
            setattr(self.module, self.__name__, self.previous)


def replace(module: nn.Module, functions: Mapping[str, Replacement], methods: dict[str, Method]) -> None:
    """Replace the methods of ``module`` by ``functions``, and add to ``methods`` the first replacement for each name.

    A function that is in place already stays. If other code has replaced it, it is put in place again.
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
