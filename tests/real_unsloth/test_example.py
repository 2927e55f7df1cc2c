"""The script for a GPU user, with the real package: on its CPU backend, in 4 bits as the script asks."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("unsloth") is None:
    pytest.skip("the real Unsloth has an environment of its own: make test-unsloth", allow_module_level=True)

from real_unsloth.checkpoints import save

SCRIPT = Path(__file__).parents[2] / "examples" / "unsloth_long_document.py"


def test_a_document_through_a_model_in_4_bits(tmp_path: Path) -> None:
    save("llama", tmp_path / "model")
    command = [sys.executable, str(SCRIPT), "--model", str(tmp_path / "model"), "--tokens", "2000", "--new-tokens", "8"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert "4-bit = True" in run.stdout + run.stderr
    assert "2,000 tokens read of 2,000" in run.stdout
    stored, dense = map(float, re.search(r"spectral: ([\d.]+) MB stored, dense ([\d.]+) MB", run.stdout).groups())
    assert stored < dense / 2
