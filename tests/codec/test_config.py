"""SpectralConfig: frozen, and every bad option is refused by name."""

import dataclasses

import pytest

from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.errors import InvalidArgumentError, SpectralError

OPTIONS = ("rank_keys", "rank_values", "block_size", "num_sink_tokens", "residual_length")
LEAST = {"rank_keys": 1, "rank_values": 1, "block_size": 1, "num_sink_tokens": 0, "residual_length": 0}


def refusal(**options: object) -> str:
    with pytest.raises(InvalidArgumentError) as caught:
        SpectralConfig(**options)
    assert isinstance(caught.value, SpectralError)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


def test_defaults_are_the_documented_ones() -> None:
    assert dataclasses.asdict(SpectralConfig()) == {
        "rank_keys": None,
        "rank_values": None,
        "block_size": 512,
        "num_sink_tokens": 4,
        "residual_length": 64,
        "preset": None,
        "bits_per_element": None,
        "compression_factor": None,
        "error_limit": None,
    }
    assert SpectralConfig().codec == "spectral"
    assert SpectralConfig().target_bits == SpectralConfig(preset="balanced").target_bits == 2.12


@pytest.mark.parametrize(("options", "ranks"), [({"rank_keys": 8}, (8, 32)), ({"rank_values": 8}, (16, 8))])
def test_a_rank_chooses_the_rank_codec(options: dict[str, int], ranks: tuple[int, int]) -> None:
    config = SpectralConfig(**options)
    assert (config.codec, config.rank_keys, config.rank_values) == ("rank", *ranks)


def test_amounts() -> None:
    assert SpectralConfig(bits_per_element=2.5).target_bits == 2.5
    assert SpectralConfig(compression_factor=8).target_bits == 2
    bits = [SpectralConfig(preset=preset).target_bits for preset in ("quality", "balanced", "small")]
    assert bits == sorted(bits, reverse=True)
    assert dataclasses.replace(SpectralConfig(), bits_per_element=3).target_bits == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "huge"}, "preset must be one of quality, balanced, small, tiny, got 'huge'"),
        ({"bits_per_element": 0.9}, "bits_per_element must be 1 to 8, got 0.9"),
        ({"bits_per_element": 9}, "bits_per_element must be 1 to 8, got 9"),
        ({"bits_per_element": float("nan")}, "bits_per_element must be a number, got nan"),
        ({"bits_per_element": "2"}, "bits_per_element must be a number, got '2'"),
        ({"compression_factor": 1}, "compression_factor must be 2 to 16, got 1"),
        ({"preset": "small", "bits_per_element": 2}, "preset and bits_per_element say the same thing"),
        ({"rank_keys": 4, "preset": "small"}, "ranks choose the rank codec, preset belongs to the spectral one"),
        ({"rank_keys": 4, "error_limit": 0.1}, "ranks choose the rank codec, error_limit belongs"),
        ({"error_limit": 0}, None),
        ({"error_limit": 1.5}, "error_limit must be 0 to 1, got 1.5"),
        ({"block_size": 200}, "block_size must be a multiple of 128 for the spectral codec, got 200: take 256"),
        ({"block_size": 1}, "got 1: take 128"),
    ],
)
def test_bad_amounts_are_refused(options: dict[str, object], message: str | None) -> None:
    if message is None:
        SpectralConfig(**options)
    else:
        assert message in refusal(**options)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("value", [True, False, 16.0, "16", [16], float("nan")])
def test_wrong_types_are_refused(name: str, value: object) -> None:
    message = refusal(**{name: value})
    assert message.startswith(f"{name} must be an integer")
    assert repr(value) in message
    assert type(value).__name__ in message


@pytest.mark.parametrize("name", OPTIONS)
def test_values_out_of_range_are_refused(name: str) -> None:
    for value in (LEAST[name] - 1, -(10**9)):
        assert refusal(**{name: value}) == f"{name} must be at least {LEAST[name]}, got {value}"


@pytest.mark.parametrize("name", OPTIONS)
def test_the_least_value_is_accepted(name: str) -> None:
    ranks = {"rank_keys": 1, "rank_values": 1}
    assert getattr(SpectralConfig(**{**ranks, name: LEAST[name]}), name) == LEAST[name]


@pytest.mark.parametrize("name", ["rank_keys", "rank_values"])
def test_a_rank_above_the_block_size_is_refused(name: str) -> None:
    ranks = {"rank_keys": 8, "rank_values": 8}
    assert getattr(SpectralConfig(**{**ranks, name: 64}, block_size=64), name) == 64
    message = refusal(**{**ranks, name: 65}, block_size=64)
    assert f"{name} must be at most block_size" in message
    assert f"{name}=65" in message
    assert "block_size=64" in message


@pytest.mark.parametrize("name", ["rank_keys", "rank_values"])
def test_a_rank_above_the_head_dim_is_refused(name: str) -> None:
    config = SpectralConfig(**{"rank_keys": 8, "rank_values": 8, name: 33})
    config.check_head_dim(33)
    with pytest.raises(InvalidArgumentError) as caught:
        config.check_head_dim(32)
    message = str(caught.value)
    assert message.startswith(f"{name} must be at most the model's head_dim, 32")
    assert "33" in message


def test_it_is_frozen_and_takes_no_other_attribute() -> None:
    config = SpectralConfig()
    for name in OPTIONS:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, name, 1)
    assert not hasattr(config, "__dict__")
    with pytest.raises(TypeError, match="rank_key"):
        SpectralConfig(rank_key=16)
    assert config == SpectralConfig()
    assert hash(config) == hash(SpectralConfig())
    assert dataclasses.replace(config, block_size=128) == SpectralConfig(block_size=128)


def test_replacing_an_option_checks_it_again() -> None:
    with pytest.raises(InvalidArgumentError, match="rank_values must be at most block_size"):
        dataclasses.replace(SpectralConfig(16, 32), block_size=31)
