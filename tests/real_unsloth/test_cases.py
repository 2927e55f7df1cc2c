"""The real Unsloth, every case in a process of its own: it replaces parts of transformers for good.

``make test-unsloth`` makes the environment: Unsloth in its newest release, and the last before its per-module gate in a
folder that is put before it. The GPU stack is run on the CPU behind the shims of ``shims.py``.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
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
# Triton's interpreter knows no bfloat16, and no fast path its 4 bits: they are held against transformers' code.
BFLOAT16 = ("logits as dense", "bytes")
FOUR_BITS = ("tokens as dense", "bytes")
FAST = ("llama", "gemma2", "qwen3", "mistral", "gemma", "qwen2", "llama, scaled RoPE")
SWITCHES = ("UNSLOTH_DISABLE_FAST_GENERATION", "UNSLOTH_DISABLE_STATIC_GENERATION", "UNSLOTH_COMPILE_DISABLE")


def cases() -> Iterator[Any]:
    for version in ("newest", "older"):
        for family in FAST:
            yield case(version, "fast path", family, ("bypass", *(ALL if family == "llama" else FEW)))
        for family, checks in (("phi", ALL), ("gemma3", NO_TRAINING), ("gpt-oss", NO_TRAINING)):
            yield case(version, "FastModel", family, checks)
    yield case("newest", "fast path", "llama", FEW, "float16")
    for family in ("gemma3", "gpt-oss"):
        yield case("newest", "FastModel", family, FEW, "float16")
    for family in ("llama", "gemma2", "qwen3"):
        yield case("newest", "fast path", family, BFLOAT16, "bfloat16")
    for family in ("gemma3", "gpt-oss, all experts"):
        yield case("newest", "FastModel", family, BFLOAT16, "bfloat16")
    yield case("newest", "fast path", "llama", FOUR_BITS, "4 bit")
    yield case("newest", "FastModel", "phi", FEW, "4 bit")
    for family, checks in (("llama", ALL), ("gpt-oss", FEW), ("gemma3", FEW)):
        yield case("newest", "CPU backend", family, checks)
    yield case("newest", "CPU backend", "llama", FEW, "4 bit")
    for switch in SWITCHES:
        for family in ("llama", "phi"):
            way = "fast path" if family == "llama" else "FastModel"
            yield case("newest", way, family, ("tokens, updates", "unpatch"), switch=switch)


def case(
    version: str, way: str, family: str, checks: tuple[str, ...], precision: str = "float32", switch: str | None = None
) -> Any:
    said = ", ".join([f"{version}, {way}: {family}", *([precision] if precision != "float32" else [])])
    said += f" ({switch})" if switch else ""
    return pytest.param(version, "cpu" if way == "CPU backend" else "gpu", family, precision, checks, switch, id=said)


@pytest.mark.parametrize(("version", "backend", "family", "precision", "checks", "switch"), list(cases()))
def test_case(
    version: str,
    backend: str,
    family: str,
    precision: str,
    checks: tuple[str, ...],
    switch: str | None,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    request: pytest.FixtureRequest,
) -> None:
    environment = {**os.environ, "UNSLOTH_COMPILE_LOCATION": str(tmp_path / "c"), "HF_HUB_OFFLINE": "1"}
    if switch is not None:
        environment[switch] = "1"
    # Nothing compiles behind the shims and all falls back; trying takes half a minute, so a few cases do.
    if not (backend == "gpu" and (version, precision, switch) == ("newest", "float32", None)):
        environment["TORCHDYNAMO_DISABLE"] = "1"
    if version == "older":
        environment["PYTHONPATH"] = os.pathsep.join([str(OLDER), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(SCRIPT), backend, family, precision, str(tmp_path / "model"), *checks]
    run = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=3600, check=False
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, run.stdout[-2000:] + run.stderr[-4000:]
    result = json.loads(lines[0].removeprefix("RESULT "))
    found = {**result, "failed": sorted(result["failed"])}
    record_property("case", (request.node.callspec.id, found))
    assert not result["failed"], "\n\n".join(f"{name}:\n{trace}" for name, trace in result["failed"].items())
    assert sorted(result["passed"]) == sorted(checks)
