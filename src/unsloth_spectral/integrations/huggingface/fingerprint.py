"""Recognising a model, and storing the profile measured for it."""

import base64
import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from unsloth_spectral.codec.model_basis import ModelBasis
from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.codec.tensors import raw_bytes
from unsloth_spectral.errors import InvalidArgumentError, LoadError, UnsupportedModelError
from unsloth_spectral.files import check_target, replacing
from unsloth_spectral.integrations.cache_folder import CACHE_VARIABLE, cache_folder
from unsloth_spectral.integrations.huggingface.weights import plain_tensors, sample
from unsloth_spectral.log import warn_once

_known: "WeakKeyDictionary[PreTrainedModel, str]" = WeakKeyDictionary()
_SAMPLES = 4096
_VERSION = 4
_DTYPES = {"vectors": torch.int8, "row_scales": torch.float32, "variances": torch.float32}
_TABLES = ("value_sensitivities", "key_sensitivities", "key_variances")


def fingerprint(model: PreTrainedModel) -> str:
    """Sixteen hexadecimal digits from the sizes of ``model`` and a sample of its weights.

    Raises:
        UnsupportedModelError: none of the weights that are sampled can be read.
    """
    if model in _known:
        return _known[model]
    config = model.config.get_text_config(decoder=True)
    sizes = [config.model_type, config.num_hidden_layers, config.hidden_size, config.vocab_size]
    digest = hashlib.sha256(json.dumps(sizes).encode())
    parameters = list(model.parameters())
    sampled, reason = False, "it has no parameters"
    for weight in (parameters[0], parameters[len(parameters) // 2]) if parameters else ():
        try:
            tensors = plain_tensors(_whole(weight))
        except UnsupportedModelError as error:
            reason = str(error)
            continue
        for tensor in tensors:
            # Signs alone, so that a copy in half precision counts as the same model.
            digest.update((sample(tensor, _SAMPLES) > 0).cpu().numpy().tobytes())
        sampled = True
    if not sampled:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be recognised, so it has no profile: {reason}")
    digits = digest.hexdigest()[:16]
    _known[model] = digits
    return digits


def _whole(weight: Tensor) -> Tensor:
    """``weight``, gathered if this process has only a share: all processes make their caches at the same time."""
    if not isinstance(weight, DTensor) or weight.is_meta:
        return weight
    try:
        return weight.full_tensor()
    except Exception as error:  # quantized shares may lack the operations of gathering
        raise UnsupportedModelError(f"its weights cannot be gathered ({type(error).__name__})") from error


def profile_path(model: PreTrainedModel) -> Path:
    """The file of the profile of ``model``.

    Raises:
        OSError: the user has no home folder.
    """
    return cache_folder() / "profiles" / f"{fingerprint(model)}-v{_VERSION}.json"


def profile_of(model: PreTrainedModel, num_layers: int) -> ModelProfile | None:
    """The measured profile of ``model``, which has ``num_layers`` full-attention layers; None if there is none.

    A profile that cannot be read or is damaged counts as none, and so does one of a model that cannot be recognised,
    each with one warning: a cache works without a profile.
    """
    try:
        path = profile_path(model)
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except UnsupportedModelError as error:
        warn_once(str(error))
        return None
    except OSError as error:
        warn_once(
            "caches work without a profile, because none can be read (%s): set %s to a folder that can be read",
            error,
            CACHE_VARIABLE,
        )
        return None
    try:
        return _profile(content, num_layers)
    except ValueError as error:
        warn_once("the profile %s is ignored, as it %s: delete it or measure it again", path, error)
        return None


def profile_target(model: PreTrainedModel) -> Path:
    """``profile_path``, checked before a profile is measured; its folder is created.

    Raises:
        InvalidArgumentError: nothing can be written there; the message says what to set.
    """
    try:
        path = profile_path(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        return check_target(path, (path.suffix,))
    except (OSError, InvalidArgumentError) as error:
        raise InvalidArgumentError(
            f"profiles cannot be stored here ({error}): set {CACHE_VARIABLE} to a folder that can be written to"
        ) from error


def save_profile(model: PreTrainedModel, profile: ModelProfile, facts: dict[str, Any]) -> Path:
    """Store ``profile`` for later caches of ``model``, with ``facts`` about its measurement.

    Raises:
        InvalidArgumentError: as ``profile_target``.
        OSError: the disk is full or the like.
    """
    path = profile_target(model)
    record = {"version": _VERSION, **profile_to_json(profile), **facts}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def profile_to_json(profile: ModelProfile) -> dict[str, Any]:
    """The contents of ``profile``, ready for JSON; tensors as base64."""
    tables = {name: getattr(profile, name) for name in _TABLES}
    bases = [
        {"shape": basis.shape, **{name: _text_of(getattr(basis, name)) for name in _DTYPES}} for basis in profile.bases
    ]
    return {**tables, "bases": bases, "digest": profile.digest}


def _text_of(tensor: Tensor) -> str:
    return base64.b64encode(raw_bytes(tensor)).decode()


def _basis(entry: Any) -> ModelBasis:
    """The basis in ``entry``.

    Raises:
        ValueError: there is none.
    """
    try:
        heads, dims = map(int, entry["shape"])
        vectors, row_scales, variances = (
            torch.frombuffer(bytearray(base64.b64decode(entry[name], validate=True)), dtype=dtype)
            for name, dtype in _DTYPES.items()
        )
        return ModelBasis.of(
            vectors.view(heads, dims, dims), row_scales.view(heads, dims, 1), variances.view(heads, dims)
        )
    except (LoadError, KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError("has a damaged basis") from error


# Of the content, so that the file is parsed once however many caches there are.
@lru_cache(maxsize=4)
def _profile(content: bytes, num_layers: int) -> ModelProfile:
    """The profile in ``content``.

    Raises:
        ValueError: there is none of this version; the message continues a sentence after "it".
    """
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("is no JSON") from None
    entries: dict[str, Any] = record if isinstance(record, dict) else {}
    values, *tables = (entries.get(name, []) for name in _TABLES)
    good = entries.get("version") == _VERSION and _are_numbers(values)
    if not good or not all(isinstance(rows, list) and all(map(_are_numbers, rows)) for rows in tables):
        raise ValueError("is no profile of this version")
    keys, variances = (tuple(tuple(map(float, row)) for row in rows) for rows in tables)
    stored = entries.get("bases", [])
    if not isinstance(stored, list):
        raise ValueError("is no profile of this version")
    bases = tuple(map(_basis, stored))
    profile = ModelProfile(tuple(map(float, values)), keys, variances, bases)
    if not profile.is_consistent:
        raise ValueError("is no profile of this version")
    if entries.get("digest") != profile.digest:
        raise ValueError("was altered")
    if len(values) != num_layers:
        raise ValueError(f"is of {len(values)} layers, not {num_layers}")
    return profile


def _are_numbers(values: Any) -> bool:
    """True if ``values`` is a non-empty list of non-negative numbers."""
    return isinstance(values, list) and bool(values) and all(isinstance(x, int | float) and x >= 0 for x in values)
