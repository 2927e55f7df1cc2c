"""Reading the weights of any module: plain, quantized, packed, or tensor subclasses that consist of several tensors."""

import contextlib

import torch
from torch import Tensor, nn

from unsloth_spectral.errors import UnsupportedModelError

# torch slices, compares and copies tensors of these dtypes on every device; for other dtypes an operation is missing.
_COMPLETE = {torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bool}
_COMPLETE |= {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def stored_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The tensors that a checkpoint of ``module`` holds, each once, with its name.

    Quantized layers may have buffers and no parameter, or split a parameter: their ``state_dict`` has all tensors.
    """
    state = module.state_dict(keep_vars=True)
    by_id: dict[int, tuple[str, Tensor]] = {}
    for name, value in state.items():
        # Skip details of another entry, such as "weight.absmax": bitsandbytes rounds them in its first product on a
        # CPU.
        above = name.split(".")[:-1]
        is_detail = any(".".join(above[: end + 1]) in state for end in range(len(above)))
        if isinstance(value, Tensor) and not is_detail:
            by_id.setdefault(id(value), (name, value))
    return list(by_id.values())


def plain_tensors(weight: Tensor) -> list[Tensor]:
    """The tensors that ``weight`` consists of, as dense ones of torch's own class, without gradients.

    Dtypes for which torch lacks operators are viewed as integers, in which a float8 keeps its sign.

    Raises:
        UnsupportedModelError: the data of ``weight`` is offloaded, or its class gives no access to it; the message has
            the reason and the fix, as part of a sentence about the model.
    """
    # Otherwise subclasses that intercept every function may not even return their dtype.
    with torch._C.DisableTorchFunctionSubclass():
        if weight.is_meta:
            raise UnsupportedModelError("it has weights that are offloaded, load it whole")
        return [_comparable(tensor) for tensor in _inner_tensors(weight, may_convert=True)]


def described(weight: Tensor) -> str:
    """Dtype and shape of ``weight``."""
    with torch._C.DisableTorchFunctionSubclass():
        return f"{weight.dtype} {list(weight.shape)}"


def version(weight: Tensor) -> tuple[object, ...]:
    """A value that changes when the contents of ``weight`` change, in place or by moving to other memory."""
    with torch._C.DisableTorchFunctionSubclass():
        try:
            tensors = [weight] if weight.is_meta else _inner_tensors(weight, may_convert=False)
        except UnsupportedModelError:
            return (object(),)  # equals no other value, so the weight always counts as changed
        # Tensors made under inference_mode have no version counter, but cannot be changed outside it either.
        counts = [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
    return (id(weight), *counts)


def sample(tensor: Tensor, count: int) -> Tensor:
    """At most ``count`` elements of ``tensor``, evenly spaced."""
    flat = tensor.reshape(-1)
    return flat[:: max(1, len(flat) // count)][:count]


def _inner_tensors(weight: Tensor, *, may_convert: bool) -> list[Tensor]:
    """The tensors behind ``weight``, sharing its memory unless it has to be converted."""
    try:
        # The protocol by which torch.compile unwraps tensor subclasses.
        if hasattr(weight, "__tensor_flatten__"):
            names, _ = weight.__tensor_flatten__()
            # A DTensor also names its device mesh.
            inner = [value for name in names if isinstance(value := getattr(weight, name), Tensor)]
            if inner:
                return [plain for tensor in inner for plain in _inner_tensors(tensor, may_convert=may_convert)]
        return [_uncovered(weight)]
    except Exception as error:  # a foreign class may raise anything
        reason = error
    if may_convert:
        with contextlib.suppress(Exception):
            return [_uncovered(weight.dequantize() if weight.layout == torch.strided else weight.to_dense())]
    raise UnsupportedModelError(
        f"it has weights of {type(weight).__name__}, whose data cannot be read ({type(reason).__name__}), load it in "
        "another format"
    )


def _uncovered(weight: Tensor) -> Tensor:
    """``weight`` without its subclass."""
    with torch._C._DisableTorchDispatch():
        plain = weight.detach().as_subclass(Tensor)
        has_memory = not plain.numel() or plain.untyped_storage().data_ptr()
    if not has_memory or plain.is_quantized:
        raise TypeError("a tensor without plain numbers in memory")
    return plain


def _comparable(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    return tensor if tensor.dtype in _COMPLETE else tensor.view(_SIGNED[tensor.itemsize])
