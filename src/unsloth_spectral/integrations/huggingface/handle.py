"""The handle that a spectral layer gives a model in place of keys and values."""

from collections.abc import Callable
from typing import Any, NoReturn

from transformers import PreTrainedModel

from unsloth_spectral.cache.layer import SpectralLayer
from unsloth_spectral.cache.step_buffers import StepBuffers
from unsloth_spectral.errors import SpectralError
from unsloth_spectral.integrations.huggingface.attention_call import AttentionCall
from unsloth_spectral.integrations.huggingface.cache_argument import CACHE_NAME
from unsloth_spectral.integrations.huggingface.private_api import attention_of
from unsloth_spectral.integrations.huggingface.support import ATTENTION_NAME, rebuild_from_now_on

# A weak reference to a model: it returns None once the model is gone.
ModelReference = Callable[[], PreTrainedModel | None]


class CompressedStates:
    """A handle on a spectral layer, which ``update`` returns in place of a tensor.

    Code that uses the handle as a tensor, by an attribute, an operator or a torch function, gets a SpectralError that
    names the fix.

    Attributes:
        layer: the layer, which already holds the newest tokens.
        seal_after: whether to seal once those tokens have been attended to.
        model: the model that the cache was made for; None for a handle outside a call.
        call: the attention module's call that received the handle; None if no hook saw it, because the module's model
            has no spectral cache or has been unpatched.
        was_read: whether attention has read the handle. In some models several layers share one layer's keys: only the
            first, which made them, knows their positions.
        step: the layer's buffers, if the newest tokens are in their ring; None if they are in the layer alone.
    """

    __slots__ = ("call", "layer", "model", "seal_after", "step", "was_read")

    def __init__(
        self,
        layer: SpectralLayer,
        seal_after: bool,
        model: ModelReference | None = None,
        call: AttentionCall | None = None,
        step: StepBuffers | None = None,
    ) -> None:
        self.layer = layer
        self.seal_after = seal_after
        self.model = model
        self.call = call
        self.was_read = False
        self.step = step

    def to(self, *_: Any) -> "CompressedStates":
        """The handle itself: in the first supported releases, Gemma 4 moves shared keys to the device of each layer."""
        return self

    def numel(self) -> int:
        """0, because a model can read no element. Mllama calls it on every layer, to find those with an image."""
        return 0

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # copy, pickle and torch look for these and expect an AttributeError
            raise AttributeError(name)
        _refuse((self,), f"have no `.{name}`")

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        handles = _handles_in((*args, *(kwargs or {}).values()))
        _refuse(handles, f"are no tensor for torch's `{getattr(function, '__name__', function)}`")


def _refusing(operation: str) -> Callable[..., NoReturn]:
    def refuse(self: CompressedStates, *args: Any) -> NoReturn:
        _refuse((self,), f"are no tensor for `{operation}`")

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


def _handles_in(arguments: tuple[Any, ...]) -> tuple[CompressedStates, ...]:
    """The handles among the ``arguments`` of a torch function, and in lists and tuples among them."""
    flat = [item for value in arguments for item in (value if isinstance(value, list | tuple) else (value,))]
    return tuple(item for item in flat if isinstance(item, CompressedStates))


def _refuse(handles: tuple[CompressedStates, ...], problem: str) -> NoReturn:
    """Raise an error that says that the keys and values are compressed and ``problem``, why, and the fix.

    The first of the ``handles`` has the model and the call. If an attention module of the cache's own model computes
    with its keys and values, that model is marked: the next cache made for it returns them rebuilt.

    Raises:
        SpectralError: always.
    """
    subject = f"the keys and values in a spectral cache are compressed and {problem}"
    handle = handles[0] if handles else None
    if handle is None or handle.model is None:
        raise SpectralError(f"{subject}: cache.stats() says what it holds, and model(..., {CACHE_NAME}=cache) reads it")
    model, call = handle.model(), handle.call
    if model is None or call is None or not _computes_with_keys(model, call):
        raise SpectralError(
            f"{subject}: {_reader(model, call)}; make the cache for this very model, and after any "
            "model.set_attn_implementation(...): cache = SpectralCache(model)"
        )
    rebuild_from_now_on(model)
    raise SpectralError(
        f"{subject}: {type(call.module).__name__} computes with them itself, before attention; from now on a new cache "
        "rebuilds them for it at every step: cache = SpectralCache(model)"
    )


def _computes_with_keys(model: PreTrainedModel, call: AttentionCall) -> bool:
    """True if the module of ``call`` belongs to ``model`` and uses the spectral attention function."""
    return _attention(model, call) == ATTENTION_NAME and any(module is call.module for module in model.modules())


def _attention(model: PreTrainedModel | None, call: AttentionCall) -> str | None:
    """The attention implementation of the module of ``call``; that of ``model`` if the module has none."""
    attention = attention_of(getattr(call.module, "config", None))
    if attention is None and model is not None:
        return attention_of(model.config.get_text_config(decoder=True))
    return attention


def _reader(model: PreTrainedModel | None, call: AttentionCall | None) -> str:
    """Who read the keys and values without the spectral attention function, as a sentence; None: ``model`` is gone."""
    owner = "the cache's" if model is None else f"the cache's {type(model).__name__}"
    if call is None:
        return f"they were read by another model than {owner}, or after unpatching"
    reader, attention = type(call.module).__name__, _attention(model, call)
    if attention == ATTENTION_NAME:
        return f"{reader} is a module of another model than {owner}"
    return f"{reader} attends with {attention!r}, not with the spectral attention function"
