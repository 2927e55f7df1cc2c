"""Images, video and audio in a prompt: the tokens that stand for them, and hashes of the inputs they came in."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from unsloth_spectral.codec.tensors import raw_bytes
from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.fields import Field, Fields

_PLACEHOLDERS = tuple(f"{kind}_token_{form}" for kind in ("image", "video", "audio") for form in ("id", "index"))
# Outputs of processors that follow from the tokens, and grow with them.
_OF_TOKENS = {
    "attention_mask",
    "batch_num_images",
    "cross_attention_mask",
    "input_ids",
    "labels",
    "mm_token_type_ids",
    "position_ids",
    "token_type_ids",
}


def placeholders_in(model: PreTrainedModel, input_ids: Tensor) -> str | None:
    """The number of tokens in ``input_ids`` that stand for images, video or audio, and their setting; None if none."""
    for config in _configs(model.config):
        for name in _PLACEHOLDERS:
            token = getattr(config, name, None)
            count = int((input_ids == token).sum()) if isinstance(token, int) else 0
            if count:
                return f"{count} tokens that stand for other inputs ({name} {token})"
    return None


def media_hashes(model: PreTrainedModel, model_inputs: Mapping[str, Any]) -> dict[str, Field]:
    """The rows (images, patches) of each of ``model_inputs`` that does not follow from the tokens, and their SHA-256.

    Floating-point inputs are rounded to the model's dtype first.

    Raises:
        InvalidArgumentError: an input is not made of tensors or numbers.
    """
    rows = _rows(model_inputs)
    return {name: {"rows": len(value), "sha256": _digest(model, value)} for name, value in rows.items()}


def media_difference(stored: Fields, batch: int, model: PreTrainedModel, model_inputs: Mapping[str, Any]) -> str | None:
    """The first difference between ``model_inputs`` and those whose hashes were ``stored``; None if there is none.

    Further rows may follow the stored ones, except in a batch, whose inputs are compared as a whole.

    Raises:
        InvalidArgumentError: as ``media_hashes``.
        LoadError: the stored fields are no hashes.
    """
    rows = _rows(model_inputs)
    for name in sorted({*rows, *stored.names()}):
        if name not in rows:
            return f"{name!r} is missing"
        if name not in stored.names():
            return f"{name!r} was not given to cache.save"
        count, value = stored.sub(name).integer("rows"), rows[name]
        fits = len(value) == count if batch > 1 else len(value) >= count
        if not fits or _digest(model, value[:count]) != stored.sub(name).text("sha256"):
            return f"{name!r} differs"
    return None


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            yield from _configs(getattr(config, name))


def _rows(model_inputs: Mapping[str, Any]) -> dict[str, Tensor | list[Tensor]]:
    if not isinstance(model_inputs, Mapping):
        raise InvalidArgumentError(
            f"model_inputs must be what the processor returned, names with tensors, got a {type(model_inputs).__name__}"
        )
    media = {name: value for name, value in model_inputs.items() if name not in _OF_TOKENS and value is not None}
    return {name: _as_rows(name, value) for name, value in media.items()}


def _as_rows(name: str, value: Any) -> Tensor | list[Tensor]:
    try:
        if isinstance(value, list | tuple) and not all(isinstance(item, int | float) for item in value):
            return [_as_tensor(item) for item in value]  # images of different sizes
        return torch.atleast_1d(_as_tensor(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidArgumentError(
            f"model_inputs must be tensors or numbers, got {name!r} as {type(value).__name__}: give what the processor "
            "returned"
        ) from error


def _as_tensor(value: Any) -> Tensor:
    # By numpy, whose dtypes do not depend on torch's defaults.
    return value if isinstance(value, Tensor) else torch.from_numpy(np.asarray(value))


def _digest(model: PreTrainedModel, rows: Tensor | list[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in [rows] if isinstance(rows, Tensor) else rows:
        plain = tensor.detach().to(model.dtype if tensor.is_floating_point() else torch.int64).cpu().contiguous()
        shape = tensor.shape[1:] if tensor is rows else tensor.shape
        digest.update(f"{plain.dtype} {list(shape)}".encode())
        digest.update(raw_bytes(plain))
    return digest.hexdigest()
