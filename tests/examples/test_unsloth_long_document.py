"""The script for a GPU, run on the embedded model."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from unsloth_spectral.integrations.models import EMBEDDED_PACKAGE

SCRIPT = Path(__file__).parents[2] / "examples" / "unsloth_long_document.py"


@pytest.mark.skipif(find_spec(EMBEDDED_PACKAGE) is None, reason="the embedded model is not installed")
def test_the_tiny_run_prints_what_the_cache_takes() -> None:
    command = [sys.executable, str(SCRIPT), "--tiny"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert run.returncode == 0, run.stderr
    assert "600 tokens read of 600" in run.stdout
    stored, dense = map(float, re.search(r"spectral: ([\d.]+) MB stored, dense ([\d.]+) MB", run.stdout).groups())
    assert stored < dense / 2
    dense_text, spectral_text = re.findall(r"^(?:dense|spectral): ['\"](.*)['\"]$", run.stdout, re.MULTILINE)
    assert dense_text
    assert spectral_text
