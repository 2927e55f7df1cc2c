"""Leaving Unsloth's fast path for transformers' code: its one-token steps keep keys and values out of any cache.

Nothing here needs Unsloth: a model shows whether it has a fast path. Since 2026.10.9 every module checks its own flag
at each call. Earlier releases replaced methods of the classes, so each instance gets the methods of the original source
file.
"""

import re
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.util import module_from_spec, spec_from_file_location
from types import MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from unsloth_spectral.integrations.huggingface.methods import Method

_FLAG = "_unsloth_fast_path"
_REPLACED = ("forward", "prepare_inputs_for_generation")
# The keys and values of one generation, which a later generation would use as its own.
_BUFFERS = ("paged_attention", "paged_attention_K", "paged_attention_V")


class TransformersMethod(Method):
    """A method of ``module`` as transformers has it, in place of Unsloth's."""

    def __init__(self, module: nn.Module, name: str, previous: Callable[..., Any] | None) -> None:
        super().__init__(module, name, _call, previous)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The method to call; transformers inspects its signature."""
        kind: Any = type(self.module)
        return MethodType(_source_function(kind, self.__name__), self.module)


def leave(model: nn.Module) -> None:
    """Let ``model`` run transformers' code, which gives every key and value to the cache; harmless if it already
    does."""
    for module in model.modules():
        attributes = vars(module)
        for name in _BUFFERS:
            attributes.pop(name, None)
        if _FLAG in attributes:
            attributes[_FLAG] = False
            continue
        for name in _replaced(module):
            _put(module, name)


def take(model: nn.Module) -> None:
    """Undo ``leave``; harmless on any other model."""
    for module in model.modules():
        attributes = vars(module)
        if _FLAG in attributes:
            attributes[_FLAG] = True
            continue
        for name in _REPLACED:
            method = attributes.get(name)
            if isinstance(method, TransformersMethod):
                method.give_back()


def _put(module: nn.Module, name: str) -> None:
    """Put transformers' method ``name`` beneath the methods that this library has put on ``module``."""
    lowest, current = None, vars(module).get(name)
    while isinstance(current, Method):
        if isinstance(current, TransformersMethod):
            return
        lowest, current = current, current.previous
    method = TransformersMethod(module, name, current)
    if lowest is None:
        setattr(module, name, method)
    else:
        lowest.previous = method


def _call(module: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return original(*args, **kwargs)


def _replaced(module: nn.Module) -> Iterator[str]:
    """Names of the methods of ``module``'s class that Unsloth replaced."""
    kind = type(module)
    if _is_unsloths(kind):
        # Unsloth's class of rotary embeddings: other modules must be able to call it like transformers' own.
        if hasattr(kind, "get_cached"):
            yield "forward"
        return
    if not _home(kind).startswith("transformers.models."):
        return
    for name in _REPLACED:
        method = getattr(kind, name, None)
        if _is_unsloths(method) or (_is_attention(module) and _is_unsloths(method, "unsloth_zoo.")):
            yield name


@lru_cache
def _source_function(kind: type, name: str) -> Callable[..., Any]:
    """Method ``name`` of ``kind`` as transformers' source file has it; a stand-in for Unsloth's rotary embeddings."""
    function: Callable[..., Any] = _rotary_tables if _is_unsloths(kind) else getattr(_pristine_class(kind), name)
    return function


def copied_class(kind: type) -> Any:
    """Transformers' class that FastModel's compiler copied to ``kind``; ``kind`` itself if it is no copy."""
    return kind if _home(kind) == kind.__module__ else _pristine_class(kind)


def _pristine_class(kind: type) -> Any:
    return getattr(_pristine(_home(kind)), kind.__name__)


def _home(kind: type) -> str:
    """The module that defines ``kind``, or its original: FastModel's compiler names a copied file after it."""
    return re.sub(r"^unsloth_compiled_module_(\w+)$", r"transformers.models.\1.modeling_\1", kind.__module__)


def _is_unsloths(definition: Any, package: str = "unsloth.") -> bool:
    # A gated method checks the flag, and runs transformers' code for a module without one.
    if getattr(definition, "_unsloth_gated", False):
        return False
    # A replacement may have the module name of the method that it replaced.
    homes = (getattr(definition, "__module__", ""), getattr(definition, "__globals__", {}).get("__name__", ""))
    return any(str(home).startswith(package) for home in homes)


def _is_attention(module: nn.Module) -> bool:
    """True if ``module`` is an attention module: of the modules that `unsloth_zoo` replaces, only these read keys."""
    return isinstance(getattr(module, "layer_idx", None), int)


@lru_cache
def _pristine(name: str) -> ModuleType:
    """A copy of module ``name`` as its source file has it, beside the one in ``sys.modules``."""
    spec = spec_from_file_location(f"{name}_pristine", sys.modules[name].__file__ or "")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    # Decorators look up the module of their function.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _rotary_tables(rotary: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines at ``position_ids [B, T]``, ``[B, T, dim]`` each, from the tables of Unsloth's module."""
    rows = int(position_ids.max()) + 1
    rotary.extend_rope_embedding(x, rows)
    cos, sin = rotary.get_cached(rows, x.device.index)
    return cos[position_ids].to(x.dtype), sin[position_ids].to(x.dtype)
