"""Leaving Unsloth's fast path, whose one-token steps keep keys and values out of any cache, for transformers' code.

Nothing here needs Unsloth: a model shows whether it has a fast path. Since 2026.10.9 every module asks a flag of its
own at each call; before, the classes' methods were replaced, and each instance is given those of the untouched source.
"""

import re
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.util import module_from_spec, spec_from_file_location
from types import MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

_FLAG = "_unsloth_fast_path"
_REPLACED = ("forward", "prepare_inputs_for_generation")
# One generation's keys and values, and later ones would take them for theirs.
_BUFFERS = ("paged_attention", "paged_attention_K", "paged_attention_V")


def leave(model: nn.Module) -> None:
    """Let ``model`` run transformers' code, which gives every key and value to the cache; harmless where it does."""
    for module in model.modules():
        own = vars(module)
        for name in _BUFFERS:
            own.pop(name, None)
        if _FLAG in own:
            own[_FLAG] = False
            continue
        for name, function in _originals(module):
            setattr(module, name, MethodType(function, module))


def take(model: nn.Module) -> None:
    """Undo ``leave``; harmless on any other model."""
    for module in model.modules():
        own = vars(module)
        if _FLAG in own:
            own[_FLAG] = True
            continue
        for name, function in _originals(module):
            if getattr(own.get(name), "__func__", None) is function:
                delattr(module, name)


def _originals(module: nn.Module) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The methods of ``module``'s class that Unsloth replaced, each as transformers has it."""
    kind = type(module)
    if _is_unsloths(kind):
        # Its own class of rotary embeddings, which the others are to call as they call transformers'.
        if hasattr(kind, "get_cached"):
            yield "forward", _rotary_tables
        return
    if not _home(kind).startswith("transformers.models."):
        return
    for name in _REPLACED:
        method = getattr(kind, name, None)
        if _is_unsloths(method) or (_is_attention(module) and _is_unsloths(method, "unsloth_zoo.")):
            yield name, getattr(_pristine_class(kind), name)


def copied_class(kind: type) -> Any:
    """Transformers' class of which ``kind`` is a copy by FastModel's compiler; ``kind`` itself if it is none."""
    return kind if _home(kind) == kind.__module__ else _pristine_class(kind)


def _pristine_class(kind: type) -> Any:
    return getattr(_pristine(_home(kind)), kind.__name__)


def _home(kind: type) -> str:
    """The module ``kind`` is of. FastModel's compiler names its copy of a file after it."""
    return re.sub(r"^unsloth_compiled_module_(\w+)$", r"transformers.models.\1.modeling_\1", kind.__module__)


def _is_unsloths(thing: Any, package: str = "unsloth.") -> bool:
    # A gated method asks the flag, and a module without one gets transformers'.
    if getattr(thing, "_unsloth_gated", False):
        return False
    # A replacement may carry the name of what it replaced.
    homes = (getattr(thing, "__module__", ""), getattr(thing, "__globals__", {}).get("__name__", ""))
    return any(str(home).startswith(package) for home in homes)


def _is_attention(module: nn.Module) -> bool:
    """Whether it may be what attends: of what `unsloth_zoo` replaces, that alone reads keys (Gemma 3's does)."""
    return isinstance(getattr(module, "layer_idx", None), int)


@lru_cache
def _pristine(name: str) -> ModuleType:
    """A copy of module ``name`` as its source file has it, beside the one in ``sys.modules``."""
    spec = spec_from_file_location(f"{name}_pristine", sys.modules[name].__file__ or "")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    # Decorators look their function's module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _rotary_tables(rotary: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines at ``position_ids [B, T]``, ``[B, T, dim]`` each, from the tables of Unsloth's module."""
    rows = int(position_ids.max()) + 1
    rotary.extend_rope_embedding(x, rows)
    cos, sin = rotary.get_cached(rows, x.device.index)
    return cos[position_ids].to(x.dtype), sin[position_ids].to(x.dtype)
