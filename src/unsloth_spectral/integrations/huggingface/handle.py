"""What a spectral layer hands to the model in place of keys and values."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from torch import nn

from unsloth_spectral.cache.layer import SpectralLayer
from unsloth_spectral.errors import SpectralError
from unsloth_spectral.integrations.huggingface.cache_argument import CACHE_NAME
from unsloth_spectral.integrations.huggingface.support import ATTENTION_NAME, materialise_from_now_on


class CompressedStates:
    """A handle on a spectral layer, returned by its ``update`` where a tensor is expected.

    Whoever takes it for a tensor, by an attribute, an operator or a function of torch's, is told what to do.

    Attributes:
        layer: the layer, the newest tokens already in it.
        seal_after: whether to seal once those tokens have been attended to.
        was_read: whether attention has read it. In some models several layers share one layer's keys: only the first,
            which made them, says where they stand.
    """

    __slots__ = ("layer", "seal_after", "was_read")

    def __init__(self, layer: SpectralLayer, seal_after: bool) -> None:
        self.layer = layer
        self.seal_after = seal_after
        self.was_read = False

    def to(self, *_: Any) -> "CompressedStates":
        """Itself: Gemma 4, in the first supported releases, moves keys that layers share to the device of each."""
        return self

    def numel(self) -> int:
        """None that a model could read: Mllama asks it of every layer, to find those that hold an image."""
        return 0

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # copy, pickle and torch probe for these and expect an AttributeError
            raise AttributeError(name)
        raise _explanation(f"have no `.{name}`")

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        raise _explanation(f"are no tensor for torch's `{getattr(function, '__name__', function)}`")


def _refusing(operation: str) -> Callable[..., NoReturn]:
    def refuse(self: CompressedStates, *args: Any) -> NoReturn:
        raise _explanation(f"are no tensor for `{operation}`")

    return refuse


# Python looks these up on the class, past ``__getattr__``.
_OPERATORS = (
    *("len", "iter", "getitem", "setitem", "contains", "float", "int", "index", "neg", "pos", "abs", "invert"),
    *(
        side + name
        for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
        for side in ("", "r")
    ),
    *("and", "or", "xor", "lt", "le", "gt", "ge"),
)
for _name in _OPERATORS:
    setattr(CompressedStates, f"__{_name}__", _refusing(f"__{_name}__"))


def _explanation(what: str) -> SpectralError:
    """Why ``what`` was asked of a handle, and the line that mends it."""
    module = _reader()
    subject = "the keys and values in a spectral cache are compressed and " + what
    if module is None:
        return SpectralError(
            f"{subject}: cache.stats() says what it holds, and model(..., {CACHE_NAME}=cache) reads it"
        )
    reader, attention = type(module).__name__, module.config._attn_implementation
    if attention != ATTENTION_NAME:
        return SpectralError(
            f"{subject}: {reader} attends with {attention!r}, not with the spectral attention function; make the cache "
            "for this very model, and after any model.set_attn_implementation(...): cache = SpectralCache(model)"
        )
    materialise_from_now_on(module.config)
    return SpectralError(
        f"{subject}: {reader} computes with them itself, before attention; from now on a new cache rebuilds them for "
        "it at every step: cache = SpectralCache(model)"
    )


def _reader() -> Any:
    """The innermost module with a configuration on the call stack, whose code took a handle for a tensor; or None."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        for name in ("self", "module"):
            found = frame.f_locals.get(name)
            if isinstance(found, nn.Module) and hasattr(getattr(found, "config", None), "_attn_implementation"):
                return found
        frame = frame.f_back
    return None
