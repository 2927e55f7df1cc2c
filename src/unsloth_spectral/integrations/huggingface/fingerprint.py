"""Knowing a model again, and the profile that was measured of it."""

import hashlib
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import platformdirs
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.errors import LoadError, UnsupportedModelError
from unsloth_spectral.files import replacing
from unsloth_spectral.integrations.huggingface.weights import plain_tensors, sample
from unsloth_spectral.log import warn_once

_known: "WeakKeyDictionary[PreTrainedModel, str]" = WeakKeyDictionary()
_SAMPLES = 4096
_VERSION = 2


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
            parts = plain_tensors(_whole(weight))
        except UnsupportedModelError as error:
            reason = str(error)
            continue
        for part in parts:
            # Signs alone: a copy in half precision is the same model.
            digest.update((sample(part, _SAMPLES) > 0).cpu().numpy().tobytes())
        sampled = True
    if not sampled:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be known again, so it has no profile: {reason}")
    known = digest.hexdigest()[:16]
    _known[model] = known
    return known


def _whole(weight: Tensor) -> Tensor:
    """All of ``weight``, of which this process may have a share: all processes make their caches at the same time."""
    if not isinstance(weight, DTensor) or weight.is_meta:
        return weight
    try:
        return weight.full_tensor()
    except Exception as error:  # quantized shares may lack what gathering asks of them
        raise UnsupportedModelError(f"its weights cannot be gathered ({type(error).__name__})") from error


def profile_path(model: PreTrainedModel) -> Path:
    """Where the profile of ``model`` is kept."""
    return Path(platformdirs.user_cache_dir("unsloth-spectral")) / "profiles" / f"{fingerprint(model)}-v{_VERSION}.json"


def profile_of(model: PreTrainedModel, num_layers: int) -> ModelProfile | None:
    """The profile measured of ``model``, None if there is none or ``model`` cannot be known again.

    Raises:
        LoadError: the file is not a profile, or not one of ``num_layers`` full-attention layers.
    """
    try:
        path = profile_path(model)
    except UnsupportedModelError as error:
        warn_once(str(error))
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise LoadError(f"the profile {str(path)!r} cannot be read ({error}): delete it or measure it again") from error
    profile = _profile(record, path)
    held = profile.num_layers
    if held != num_layers:
        raise LoadError(
            f"the profile {str(path)!r} is of {held} layers, not {num_layers}: delete it or measure it again"
        )
    return profile


def save_profile(model: PreTrainedModel, profile: ModelProfile, facts: dict[str, Any]) -> Path:
    """Keep ``profile`` for later caches of ``model``; ``facts`` say how it was measured."""
    path = profile_path(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"version": _VERSION, **asdict(profile), **facts}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def _profile(record: Any, path: Path) -> ModelProfile:
    held: dict[str, Any] = record if isinstance(record, dict) else {}
    values, keys, variances = (held.get(field.name, []) for field in fields(ModelProfile))
    good = held.get("version") == _VERSION and _are_numbers(values) and _are_numbers(keys)
    good = good and isinstance(variances, list) and len(values) == len(keys) == len(variances)
    if not good or not all(map(_are_numbers, variances)):
        raise LoadError(f"{str(path)!r} is not a profile of this version: delete it or measure it again")
    by_layer = tuple(tuple(map(float, own)) for own in variances)
    return ModelProfile(tuple(map(float, values)), tuple(map(float, keys)), by_layer)


def _are_numbers(values: Any) -> bool:
    """Whether ``values`` is a list of numbers, none of them negative, and not empty."""
    return isinstance(values, list) and bool(values) and all(isinstance(x, int | float) and x >= 0 for x in values)
