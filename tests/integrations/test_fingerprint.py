"""Knowing a model again by its weights, and the profile kept for it."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import platformdirs
import pytest
import torch
from transformers import LlamaForCausalLM

from unsloth_spectral import SpectralCache, SpectralConfig
from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.errors import LoadError
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument
from unsloth_spectral.integrations.huggingface.fingerprint import fingerprint, profile_of, profile_path, save_profile

PROFILE = ModelProfile((0.5, 0.001), (0.02, 0.01), ((3.0, 1.0), (2.0, 0.5)))
OTHER = ModelProfile((1.0, 2.0), (1.0, 1.0), ((1.0,), (1.0,)))
Build = Callable[..., LlamaForCausalLM]


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *_, **__: str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_equal_weights_equal_fingerprints(tiny_llama: Build) -> None:
    found = fingerprint(tiny_llama())
    assert len(found) == 16
    assert set(found) <= set("0123456789abcdef")
    assert fingerprint(tiny_llama()) == found
    assert fingerprint(copy.deepcopy(tiny_llama())) == found
    model = tiny_llama()
    assert fingerprint(model) == fingerprint(model) == found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_copy_in_half_precision_is_the_same_model(tiny_llama: Build, dtype: torch.dtype) -> None:
    assert fingerprint(tiny_llama().to(dtype)) == fingerprint(tiny_llama())


def test_other_weights_and_other_sizes_differ(tiny_llama: Build) -> None:
    models = [
        tiny_llama(),
        tiny_llama(seed=1),
        tiny_llama(num_hidden_layers=3),
        tiny_llama(vocab_size=130),
        tiny_llama(hidden_size=128),
    ]
    tuned = tiny_llama()
    parameters = list(tuned.parameters())
    parameters[len(parameters) // 2].data.add_(0.05)
    assert len({fingerprint(model) for model in [*models, tuned]}) == 6


def test_a_profile_comes_back(tiny_llama: Build, cache_folder: Path) -> None:
    model = tiny_llama()
    assert profile_of(model, 2) is None
    path = save_profile(model, PROFILE, {"texts": 3})
    assert path == profile_path(model)
    assert cache_folder in path.parents
    assert fingerprint(model) in path.name
    assert profile_of(model, 2) == PROFILE
    assert profile_of(tiny_llama(), 2) == PROFILE
    assert profile_of(tiny_llama(seed=1), 2) is None
    assert json.loads(path.read_text())["texts"] == 3
    save_profile(model, OTHER, {})
    assert profile_of(model, 2) == OTHER
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def _malformed(**changes: object) -> str:
    good = {"version": 2, "value_sensitivities": [1, 1], "key_sensitivities": [1, 1], "key_variances": [[1], [1]]}
    return json.dumps({**good, **changes})


MALFORMED = {
    "no JSON": "{",
    "empty": "",
    "not an object": "[1, 2]",
    "no sensitivities": '{"version": 2}',
    "none": _malformed(value_sensitivities=[]),
    "no numbers": _malformed(value_sensitivities=["a", 1]),
    "negative": _malformed(key_sensitivities=[1, -1]),
    "another version": _malformed(version=99),
    "no version": _malformed(version=None),
    "NaN": _malformed(value_sensitivities=[math.nan, 1]),
    "one layer short": _malformed(key_sensitivities=[1]),
    "no variances": _malformed(key_variances=[[1], []]),
    "variances of no list": _malformed(key_variances=3),
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_file_says_so(tiny_llama: Build, text: str) -> None:
    model = tiny_llama()
    path = save_profile(model, PROFILE, {})
    path.write_text(text)
    with pytest.raises(LoadError, match="delete it or measure it again") as caught:
        profile_of(model, 2)
    assert str(path) in str(caught.value)


def test_a_file_that_cannot_be_read(tiny_llama: Build) -> None:
    path = profile_path(tiny_llama())
    path.mkdir(parents=True)
    with pytest.raises(LoadError, match="cannot be read"):
        profile_of(tiny_llama(), 2)
    path.rmdir()
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LoadError):
        profile_of(tiny_llama(), 2)


def test_a_cache_follows_the_profile(tiny_llama: Build) -> None:
    model, config = tiny_llama(), SpectralConfig(bits_per_element=3.5)
    save_profile(model, PROFILE, {})

    def widths(**options: bool) -> list[float | None]:
        cache = SpectralCache(model, config=config, **options)
        model(input_ids=torch.randint(0, 99, (1, 800)), **cache_argument(cache))
        return [layer.bits_values for layer in cache.stats().layers]

    assert widths()[0] > widths()[1]
    assert len(set(widths(use_profile=False))) == 1


def test_a_profile_of_another_number_of_layers_says_so(tiny_llama: Build) -> None:
    model = tiny_llama()
    save_profile(model, ModelProfile((1.0,), (1.0,), ((1.0,),)), {})
    with pytest.raises(LoadError):
        SpectralCache(model, config=SpectralConfig(bits_per_element=3.5))
