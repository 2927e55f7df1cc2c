"""Profiles as fields of a snapshot."""

import math
from dataclasses import replace
from typing import Any

import pytest
from known_model import known_profile

from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.errors import LoadError
from unsloth_spectral.fields import Fields, flatten

PROFILE = known_profile(2, 2, 8)


def read(profile: ModelProfile, without: str | None = None) -> ModelProfile:
    """``profile`` as a snapshot gives it back, one field left out."""
    values, tensors = flatten({name: field for name, field in profile.to_fields().items() if name != without})
    return ModelProfile.from_fields(Fields(values, lambda number, device: tensors[number]), profile.num_layers)


def test_a_profile_comes_back_from_its_fields() -> None:
    assert read(PROFILE) == PROFILE
    assert read(PROFILE).digest == PROFILE.digest


def test_the_long_tables_are_compared_and_not_hashed() -> None:
    for name in ("key_variances", "key_means"):
        other: ModelProfile = replace(PROFILE, **{name: ((2.0,) * 16,) * 2})
        assert other != PROFILE
        assert hash(other) == hash(PROFILE)


def test_means_count_in_the_digest() -> None:
    assert replace(PROFILE, key_means=PROFILE.key_means[::-1]).digest != PROFILE.digest


def test_steps_count_in_the_digest() -> None:
    assert replace(PROFILE, rope_steps=(1.0, 0.5)).digest != PROFILE.digest


@pytest.mark.parametrize("means", [(), PROFILE.key_means[:1], ((1.0,),) * 2])
def test_means_must_be_those_of_the_bases(means: tuple[tuple[float, ...], ...]) -> None:
    with pytest.raises(LoadError, match="heads of 2 layers"):
        read(replace(PROFILE, key_means=means))


@pytest.mark.parametrize("name", ["key_variances", "key_means", "rope_steps"])
def test_every_field_is_needed(name: str) -> None:
    with pytest.raises(LoadError):
        read(PROFILE, without=name)


@pytest.mark.parametrize(
    "change",
    [
        {"value_sensitivities": (1.0, -1.0)},
        {"value_sensitivities": (math.nan, 1.0)},
        {"key_sensitivities": ((1.0, math.inf),) * 2},
        {"key_variances": ((1.0, -1e-9),) * 2},
        {"key_means": ((math.nan,) * 16,) * 2},
        {"rope_steps": (1.0, math.inf)},
        # The bases have two heads.
        {"key_sensitivities": ((1.0,),) * 2},
        {"key_sensitivities": ((1.0,) * 4,) * 2},
    ],
)
def test_numbers_that_nothing_can_be_computed_with_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(LoadError, match="heads of 2 layers"):
        read(replace(PROFILE, **change))


def test_more_pairs_than_a_head_has_room_for_are_refused() -> None:
    with pytest.raises(LoadError, match="heads of 2 layers"):
        read(replace(PROFILE, rope_steps=(0.5,) * 5))
