"""Knowing a model again by its weights, and the profile kept for it."""

import copy
import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from unsloth_spectral import SpectralCache, SpectralConfig, patch_unsloth_attention
from unsloth_spectral.codec.model_basis import ModelBasis
from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.integrations import cache_folder as cache_folder_module
from unsloth_spectral.integrations.cache_folder import CACHE_VARIABLE
from unsloth_spectral.integrations.huggingface.cache_argument import cache_argument
from unsloth_spectral.integrations.huggingface.fingerprint import (
    fingerprint,
    profile_of,
    profile_path,
    profile_target,
    save_profile,
)

PROFILE = ModelProfile((0.5, 0.001), ((0.02, 0.03), (0.01, 0.01)), ((3.0, 1.0), (2.0, 0.5)))
MEANS = ((0.5, -1.0, 2.0, 0.0), (1.0, 1.0, -3.5, 0.25))
OTHER = ModelProfile((1.0, 2.0), ((1.0,), (1.0,)), ((1.0,), (1.0,)))
Build = Callable[..., LlamaForCausalLM]


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_equal_weights_equal_fingerprints(tiny_llama: Build) -> None:
    digits = fingerprint(tiny_llama())
    assert len(digits) == 16
    assert set(digits) <= set("0123456789abcdef")
    assert fingerprint(tiny_llama()) == digits
    assert fingerprint(copy.deepcopy(tiny_llama())) == digits
    model = tiny_llama()
    assert fingerprint(model) == fingerprint(model) == digits


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
    good = {"version": 5, "value_sensitivities": [1, 1], "key_sensitivities": [[1], [1]], "key_variances": [[1], [1]]}
    return json.dumps({**good, **changes})


MALFORMED = {
    "no JSON": "{",
    "empty": "",
    "not an object": "[1, 2]",
    "no sensitivities": '{"version": 5}',
    "none": _malformed(value_sensitivities=[]),
    "no numbers": _malformed(value_sensitivities=["a", 1]),
    "negative": _malformed(key_sensitivities=[[1], [-1]]),
    "another version": _malformed(version=99),
    "the version before": _malformed(version=4),
    "no version": _malformed(version=None),
    "NaN": _malformed(value_sensitivities=[math.nan, 1]),
    "one layer short": _malformed(key_sensitivities=[[1]]),
    "no heads": _malformed(key_sensitivities=[[1], []]),
    "no lists of heads": _malformed(key_sensitivities=[1, 1]),
    "variances of other heads": _malformed(key_sensitivities=[[1, 1], [1, 1]]),
    "no variances": _malformed(key_variances=[[1], []]),
    "means of no list": _malformed(key_means=3),
    "means without bases": _malformed(key_means=[[1], [1]]),
    "variances of no list": _malformed(key_variances=3),
}


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_file_is_ignored_with_one_warning(
    tiny_llama: Build, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    path = save_profile(model, PROFILE, {})
    path.write_text(text)
    with caplog.at_level(logging.WARNING, "unsloth_spectral"):
        assert profile_of(model, 2) is None
        assert SpectralCache(model).profile is None
    (warning,) = warnings_of(caplog)
    assert str(path) in warning
    assert "was altered" not in warning, "its digest would be wrong even if nothing else were"
    assert "delete it or measure it again" in warning


def test_bytes_that_are_no_text_are_ignored(tiny_llama: Build, caplog: pytest.LogCaptureFixture) -> None:
    save_profile(tiny_llama(), PROFILE, {}).write_bytes(b"\xff\xfe\x00")
    with caplog.at_level(logging.WARNING, "unsloth_spectral"):
        assert profile_of(tiny_llama(), 2) is None
    assert "is no JSON" in caplog.text


def test_a_profile_of_another_number_of_layers_is_ignored(tiny_llama: Build, caplog: pytest.LogCaptureFixture) -> None:
    save_profile(tiny_llama(), ModelProfile((1.0,), ((1.0,),), ((1.0,),)), {})
    with caplog.at_level(logging.WARNING, "unsloth_spectral"):
        assert SpectralCache(tiny_llama()).profile is None
    assert "is of 1 layers, not 2" in caplog.text


@pytest.fixture(params=["a file in the path", "a folder in its place", "no permission", "no home"])
def unreadable(
    request: pytest.FixtureRequest, tiny_llama: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache folder in which no profile can be looked for."""
    if request.param == "a file in the path":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    elif request.param == "a folder in its place":
        profile_path(tiny_llama()).mkdir(parents=True)
    elif request.param == "no permission":

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        # Not by chmod, which stops no root.
        monkeypatch.setattr(Path, "read_bytes", refuse)
        monkeypatch.setattr(Path, "mkdir", refuse)
    else:

        def no_home(*_: object) -> Path:
            raise RuntimeError("no home folder")

        monkeypatch.delenv(CACHE_VARIABLE)
        monkeypatch.setattr(cache_folder_module, "user_cache_path", no_home)


@pytest.mark.usefixtures("unreadable")
def test_a_home_that_cannot_be_read_costs_no_run(tiny_llama: Build, caplog: pytest.LogCaptureFixture) -> None:
    model, ids = tiny_llama(), torch.randint(3, 128, (1, 300), generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING, "unsloth_spectral"):
        for _ in range(2):
            cache = SpectralCache(model)
            assert cache.profile is None
        patch_unsloth_attention(model)
        assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] > 300
    (warning,) = warnings_of(caplog)
    assert f"set {CACHE_VARIABLE} to a folder that can be read" in warning


@pytest.mark.usefixtures("unreadable")
def test_a_profile_that_cannot_be_kept_is_refused_before_it_is_measured(tiny_llama: Build) -> None:
    with pytest.raises(InvalidArgumentError, match=f"set {CACHE_VARIABLE} to a folder that can be written to"):
        profile_target(tiny_llama())


def test_a_home_that_an_older_platformdirs_does_not_find(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setattr(cache_folder_module, "user_cache_path", lambda _: Path("~nobody-here/.cache"))
    with pytest.raises(NotADirectoryError):
        cache_folder_module.cache_folder()


def test_a_cache_follows_the_profile(tiny_llama: Build) -> None:
    model, config = tiny_llama(), SpectralConfig(bits_per_element=3.5)
    save_profile(model, PROFILE, {})

    def widths(**options: bool) -> list[float | None]:
        cache = SpectralCache(model, config=config, **options)
        model(input_ids=torch.randint(0, 99, (1, 800)), **cache_argument(cache))
        return [layer.bits_values for layer in cache.stats().layers]

    assert widths()[0] > widths()[1]
    assert len(set(widths(use_profile=False))) == 1


def with_bases() -> ModelProfile:
    vectors = torch.eye(2).expand(2, 2, 2).contiguous()
    return replace(PROFILE, bases=(ModelBasis.rounded(vectors, torch.ones(2, 2)),) * 2, key_means=MEANS)


def test_bases_come_back_as_the_same_objects(tiny_llama: Build) -> None:
    model, profile = tiny_llama(), with_bases()
    save_profile(model, profile, {})
    read = profile_of(model, 2)
    assert read == profile
    assert read is not None
    assert read.digest == profile.digest != PROFILE.digest
    assert all(basis is profile.bases[0] for basis in read.bases)


@pytest.mark.parametrize(
    "change",
    [
        {"bases": None},
        {"bases": 5},
        {"bases": [None, None]},
        {"bases": []},
        {"bases": [{"shape": [float("inf"), 2], "vectors": "", "row_scales": "", "variances": ""}] * 2},
        {"bases": [{"shape": [2, 2], "vectors": "é", "row_scales": "", "variances": ""}] * 2},
        {"digest": "0"},
        {"key_means": [[0.5, -1.0, 2.0, 0.0], [1.0, 1.0, -3.5, 0.5]]},
        {"key_means": [[0.5, -1.0, 2.0, 0.0]]},
        {"key_means": [[0.5, -1.0, 2.0, float("nan")], [1.0, 1.0, -3.5, 0.25]]},
        {"value_sensitivities": [0.5, 0.5]},
    ],
)
def test_a_profile_with_altered_bases_is_ignored(
    change: dict[str, Any], tiny_llama: Build, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    path = save_profile(model, with_bases(), {})
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with caplog.at_level(logging.WARNING, "unsloth_spectral"):
        assert profile_of(model, 2) is None
    assert "is ignored, as it " in caplog.text
    assert caplog.text.count("delete it or measure it again") == 1
