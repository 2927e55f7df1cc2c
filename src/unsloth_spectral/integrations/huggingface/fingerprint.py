"""Recognising a model, and storing the profile measured for it."""

import hashlib
import json
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.errors import InvalidArgumentError, UnsupportedModelError
from unsloth_spectral.files import check_target, replacing
from unsloth_spectral.integrations.cache_folder import CACHE_VARIABLE, cache_folder
from unsloth_spectral.integrations.huggingface.weights import plain_tensors, sample
from unsloth_spectral.integrations.profile_file import VERSION, profile_from_json, profile_to_json
from unsloth_spectral.log import warn_once

_known: "WeakKeyDictionary[PreTrainedModel, str]" = WeakKeyDictionary()
_SAMPLES = 4096


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
    return cache_folder() / "profiles" / f"{fingerprint(model)}-v{VERSION}.json"


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
        profile = profile_from_json(content)
        if profile.num_layers != num_layers:
            raise ValueError(f"is of {profile.num_layers} layers, not {num_layers}")
        return profile
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
    record = {**profile_to_json(profile), **facts}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path
