"""Storing the cache layers that a model keeps in the library's own form: sliding windows, states."""

from typing import Any

import torch
from torch import Tensor

from unsloth_spectral.errors import SpectralError
from unsloth_spectral.fields import Field, Fields


def transformers_layer_to_fields(layer: Any) -> dict[str, Field]:
    """All attributes of ``layer``.

    Raises:
        SpectralError: one of them is of a kind that is not stored.
    """
    return {name: _field(layer, name, value) for name, value in vars(layer).items()}


def restore_transformers_layer(layer: Any, fields: Fields, device: torch.device) -> None:
    """Give a fresh ``layer`` of the same kind the attributes of the one whose fields these are, tensors on ``device``.

    Raises:
        LoadError: an attribute is not one that a layer of this kind has.
    """
    for name in fields.names():
        # Data alone: nothing that the class defines is put aside.
        fields.require(name.isidentifier() and not hasattr(type(layer), name), f"no attribute {name!r}")
        setattr(layer, name, _value(fields, name, device))


def _field(layer: Any, name: str, value: Any) -> Field:
    if value is None or isinstance(value, bool | int | float | str | Tensor):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": "the layer's"}
    if isinstance(value, dict) and all(type(key) is int for key in value):
        return {"numbered": {str(key): _field(layer, name, item) for key, item in value.items()}}
    raise SpectralError(
        f"this cache cannot be saved: its {type(layer).__name__} keeps {name!r} as {type(value).__name__}, of which "
        "there is no stored form"
    )


def _value(fields: Fields, name: str, device: torch.device) -> Any:
    if fields.is_tensor(name):
        return fields.tensor(name, None, None)
    if not fields.is_group(name):
        return fields.scalar(name)
    group = fields.sub(name)
    if group.has("dtype"):
        return group.dtype("dtype")
    if group.has("device"):
        return device
    numbered = group.sub("numbered")
    numbered.require(all(key.isdecimal() for key in numbered.names()), "numbered fields")
    return {int(key): _value(numbered, key, device) for key in numbered.names()}
