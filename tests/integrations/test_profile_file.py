"""A profile's file, read without a model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unsloth_spectral.codec.model_basis import ModelBasis
from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.integrations.profile_file import VERSION, profile_to_json, read_profile

BASIS = ModelBasis.rounded(torch.eye(4).expand(2, 4, 4).contiguous(), torch.ones(2, 4))
PROFILE = ModelProfile(
    (0.5, 0.001), ((0.02, 0.03), (0.01, 0.01)), ((3.0, 1.0), (2.0, 0.5)), (BASIS,) * 2, ((0.1, -0.2) * 4,) * 2
)


def test_a_profile_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({**profile_to_json(PROFILE), "model": "mine"}))
    for given in (path, str(path)):
        read = read_profile(given)
        assert read == PROFILE
        assert read.digest == PROFILE.digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read \\(No such file or directory\\)"),
        ("{", "is no JSON"),
        ("[]", "is no profile of this version"),
        (json.dumps({**profile_to_json(PROFILE), "version": VERSION - 1}), "is no profile of this version"),
        (json.dumps({**profile_to_json(PROFILE), "key_means": [[0.1] * 8] * 2}), "was altered"),
        # Integers of JSON may be larger than any float, and floats larger than those that the tables are used in.
        (
            json.dumps({**profile_to_json(PROFILE), "value_sensitivities": [10**400]}),
            "is no profile of this version",
        ),
        (
            json.dumps({**profile_to_json(PROFILE), "key_variances": [[1e300] * 2] * 2}),
            "is no profile of this version",
        ),
        (json.dumps({**profile_to_json(PROFILE), "rope_steps": [-(10**400)]}), "is no profile of this version"),
    ],
)
def test_files_that_are_no_profile_are_named_with_the_fix(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InvalidArgumentError, match=message) as raised:
        read_profile(path)
    assert str(path) in str(raised.value)
    assert "unsloth-spectral profile MODEL --json FILE" in str(raised.value)


@pytest.mark.parametrize("path", ["~no-user-of-this-name/profile.json", "profile\0.json"])
def test_paths_that_name_no_file_are_refused(path: str) -> None:
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        read_profile(path)


def test_reading_loads_no_transformers() -> None:
    """A cache server need not have it."""
    code = (
        "import sys, unsloth_spectral.integrations.engine_options, unsloth_spectral.integrations.profile_file\n"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
