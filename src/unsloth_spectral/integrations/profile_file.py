"""The file of a model's profile: JSON, with tensors as base64."""

import base64
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unsloth_spectral.codec.model_basis import ModelBasis
from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.codec.tensors import raw_bytes
from unsloth_spectral.errors import InvalidArgumentError, LoadError

VERSION = 5
_DTYPES = {"vectors": torch.int8, "row_scales": torch.float32, "variances": torch.float32}
_TABLES = ("value_sensitivities", "key_sensitivities", "key_variances")
_MEANS, _STEPS = "key_means", "rope_steps"
_LARGEST = torch.finfo(torch.float32).max  # tables are used in float32


def profile_to_json(profile: ModelProfile) -> dict[str, Any]:
    """The contents of ``profile``, ready for JSON; tensors as base64."""
    tables = {name: getattr(profile, name) for name in (*_TABLES, _MEANS, _STEPS)}
    bases = [
        {"shape": basis.shape, **{name: _text_of(getattr(basis, name)) for name in _DTYPES}} for basis in profile.bases
    ]
    return {"version": VERSION, **tables, "bases": bases, "digest": profile.digest}


# Of the content, so that the file is parsed once however many caches there are.
@lru_cache(maxsize=4)
def profile_from_json(content: bytes) -> ModelProfile:
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
    means, steps, stored = (entries.get(name, []) for name in (_MEANS, _STEPS, "bases"))
    good = entries.get("version") == VERSION and _are_numbers(values)
    good = good and all(isinstance(rows, list) and all(map(_are_numbers, rows)) for rows in (*tables, means))
    good = good and (steps == [] or _are_numbers(steps))
    if not good or not isinstance(stored, list):
        raise ValueError("is no profile of this version")
    keys, variances, means = (tuple(tuple(map(float, row)) for row in rows) for rows in (*tables, means))
    bases = tuple(map(_basis, stored))
    profile = ModelProfile(tuple(map(float, values)), keys, variances, bases, means, tuple(map(float, steps)))
    if not profile.is_consistent:
        raise ValueError("is no profile of this version")
    if entries.get("digest") != profile.digest:
        raise ValueError("was altered")
    return profile


def read_profile(path: str | Path) -> ModelProfile:
    """The profile in the file at ``path``, which ``unsloth-spectral profile`` wrote.

    Raises:
        InvalidArgumentError: there is no such file, or it is no profile of this version; the message has the fix.
    """
    measure = "write one with `unsloth-spectral profile MODEL --json FILE`"
    try:
        content = Path(path).expanduser().read_bytes()
    # An unknown user's home folder, and a path with zero bytes.
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidArgumentError(f"the profile {path} cannot be read ({reason}): {measure}") from error
    try:
        return profile_from_json(content)
    except ValueError as error:
        raise InvalidArgumentError(f"the profile {path} cannot be used, as it {error}: {measure}") from error


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


def _are_numbers(values: Any) -> bool:
    """True if ``values`` is a non-empty list of numbers that float32 can hold."""
    if not isinstance(values, list) or not values:
        return False
    return all(isinstance(x, int | float) and abs(x) <= _LARGEST for x in values)
