"""The real Unsloth, every case in a process of its own: it replaces parts of transformers for good.

``make test-unsloth`` makes the environment: Unsloth in its newest release, and the last before its per-module gate in a
folder that is put before it. The GPU stack is run on the CPU behind the shims of ``shims.py``.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

OLDER = os.environ.get("OLDER_UNSLOTH")
if find_spec("unsloth") is None or OLDER is None:
    pytest.skip("the real Unsloth has an environment of its own: make test-unsloth", allow_module_level=True)

SCRIPT = Path(__file__).with_name("case.py")
ALL = (
    *("tokens, updates", "left padding", "bytes", "ranks", "streaming", "unpatch", "own caches", "fast_generate"),
    *("training", "adapter"),
)
# For families that share their code with one that has all checks.
FEW = ("tokens, updates", "left padding", "bytes")
# FlexAttention, which these train with, has no backward pass on a CPU.
NO_TRAINING = tuple(name for name in ALL if name != "training")
FAST = ("llama", "gemma2", "qwen3", "mistral", "gemma", "qwen2", "llama, scaled RoPE")
# Without bfloat16, which it does not believe a CPU to have, Unsloth loads Gemma 3 in float16 with its own attention in
# float32, and leaves the casts of transformers' attention to CUDA's autocast.
HALF = pytest.mark.xfail(strict=True, reason="Gemma 3 under FastModel needs CUDA's autocast")
SWITCHES = ("UNSLOTH_DISABLE_FAST_GENERATION", "UNSLOTH_DISABLE_STATIC_GENERATION", "UNSLOTH_COMPILE_DISABLE")


def cases() -> Iterator[Any]:
    for version in ("newest", "older"):
        for family in FAST:
            checks = ("bypass", *(ALL if family == "llama" else FEW))
            yield pytest.param(version, "gpu", family, {}, checks, id=f"{version}, fast path: {family}")
        for family, checks, marks in (("phi", ALL, ()), ("gemma3", NO_TRAINING, HALF)):
            case_id = f"{version}, FastModel: {family}"
            yield pytest.param(version, "gpu", family, {}, checks, id=case_id, marks=marks)
    # The one-token experts of gpt-oss under FastModel want CUDA's autocast.
    for family, checks in (("llama", ALL), ("gpt-oss", FEW), ("gemma3", FEW)):
        yield pytest.param("newest", "cpu", family, {}, checks, id=f"newest, CPU backend: {family}")
    for switch in SWITCHES:
        for family in ("llama", "phi"):
            checks = ("tokens, updates", "unpatch")
            yield pytest.param("newest", "gpu", family, {switch: "1"}, checks, id=f"newest, {switch}: {family}")


FOUND: dict[str, Any] = {}


@pytest.fixture
def record() -> Iterator[dict[str, Any]]:
    """What the cases came to, written after each to the file that UNSLOTH_RESULTS names."""
    yield FOUND
    path = os.environ.get("UNSLOTH_RESULTS")
    if path:
        from real_unsloth.results import write

        write(Path(path), FOUND)


@pytest.mark.parametrize(("version", "backend", "family", "switches", "checks"), list(cases()))
def test_case(
    version: str,
    backend: str,
    family: str,
    switches: dict[str, str],
    checks: tuple[str, ...],
    tmp_path: Path,
    record: dict[str, Any],
    request: pytest.FixtureRequest,
) -> None:
    environment = {
        **os.environ,
        **switches,
        "CHECKS": "|".join(checks),
        "UNSLOTH_COMPILE_LOCATION": str(tmp_path / "c"),
    }
    if version == "older":
        environment["PYTHONPATH"] = os.pathsep.join([str(OLDER), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(SCRIPT), backend, family, str(tmp_path / "model")]
    run = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=3600, check=False
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, run.stdout[-2000:] + run.stderr[-4000:]
    result = json.loads(lines[0].removeprefix("RESULT "))
    record[request.node.callspec.id] = {
        "unsloth": result["unsloth"],
        "passed": result["passed"],
        "failed": sorted(result["failed"]),
    }
    assert not result["failed"], "\n\n".join(f"{name}:\n{trace}" for name, trace in result["failed"].items())
    assert sorted(result["passed"]) == sorted(checks)
