"""What `info` collects."""

import json

import pytest

import unsloth_spectral
from unsloth_spectral.errors import LoadError
from unsloth_spectral.eval import info


def test_versions_and_paths() -> None:
    collected = info.collect_info()
    assert collected["environment"]["unsloth_spectral"] == unsloth_spectral.__version__
    assert collected["environment"]["threads"] >= 1
    paths = {path["name"]: path for path in collected["attention_paths"]}
    assert paths["direct"]["available"]
    assert all(path["available"] == (path["obstacle"] is None) for path in paths.values())
    assert not all(path["available"] for path in paths.values())
    json.dumps(collected)


def test_a_missing_model_is_said_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise LoadError("not installed: pip install it")

    monkeypatch.setattr(info, "embedded_file", missing)
    assert info.collect_info()["embedded_model"] == {"available": False, "obstacle": "not installed: pip install it"}
