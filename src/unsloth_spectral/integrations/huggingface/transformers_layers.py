"""Storing the cache layers that stay transformers' own in a spectral cache: sliding windows, recurrent states."""

from typing import Any

import torch
from torch import Tensor

from unsloth_spectral.errors import SpectralError
from unsloth_spectral.fields import Field, Fields


def transformers_layer_to_fields(layer: Any) -> dict[str, Field]:
    """All attributes of ``layer``, as fields.

    Raises:
        SpectralError: an attribute is of a kind that has no stored form.
    """
    return {name: _field(layer, name, value) for name, value in vars(layer).items()}


def restore_transformers_layer(layer: Any, fields: Fields, device: torch.device) -> None:
    """Set the attributes of an empty ``layer`` from ``fields`` of a layer of the same kind, with tensors on ``device``.

    Raises:
        LoadError: a field cannot be an attribute of a layer of this kind.
    """
    for name in fields.names():
        # Only data is set: nothing that the class defines may be replaced.
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
        f"this cache cannot be saved: its {type(layer).__name__} keeps {name!r} as {type(value).__name__}, which "
        "has no stored form"
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
