"""The Ray Data example, with two actors."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_batch.py"
PATIENCE = 1800


def test_two_actors_answer_all_documents(results: dict[str, Any]) -> None:
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, str(EXAMPLE), "--documents", "6", "--actors", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row["document"] for row in rows] == list(range(6))
    assert len({row["actor"] for row in rows}) == 2
    assert all(row["answer"].strip() for row in rows)
    assert len({row["answer"] for row in rows}) > 1
    assert all(row["compression_factor"] > 1.5 for row in rows)
    results["ray_batch"] = {"actors": 2, "documents": 6, "least_factor": min(row["compression_factor"] for row in rows)}
