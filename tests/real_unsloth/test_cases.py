"""The real Unsloth, every case in a process of its own, since it replaces parts of transformers for good.

``make test-unsloth`` makes the environment: Unsloth in its newest release, and the last before its per-module gate in a
folder that is put before it. Without a GPU, its GPU stack is run on the CPU behind the shims of ``shims.py``.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from real_unsloth.conftest import CASE
from real_unsloth.process import Current

OLDER = os.environ.get("OLDER_UNSLOTH")
if find_spec("unsloth") is None or OLDER is None:
    pytest.skip("the real Unsloth has an environment of its own: make test-unsloth", allow_module_level=True)

ON_GPU = torch.cuda.device_count() > 0
ALL = (
    *("tokens, updates", "left padding", "bytes", "ranks", "streaming", "unpatch", "own caches", "fast_generate"),
    *("training", "adapter"),
)
# For families that share their code with one that has all checks.
FEW = ("tokens, updates", "left padding", "bytes")
FEWEST = ("tokens, updates", "bytes")
# FlexAttention, which these train with, has no backward pass on a CPU.
NO_TRAINING = ALL if ON_GPU else tuple(name for name in ALL if name != "training")
# Triton's interpreter knows no bfloat16, and no fast path its 4 bits: they are held against transformers' code.
BFLOAT16 = ("logits as dense", *(["logits as unpatched"] if ON_GPU else []), "bytes")
FOUR_BITS = FEW if ON_GPU else ("tokens as dense", "bytes")
FAST = ("llama", "gemma2", "qwen3", "mistral", "gemma", "qwen2", "llama, scaled RoPE")
SWITCHES = ("UNSLOTH_DISABLE_FAST_GENERATION", "UNSLOTH_DISABLE_STATIC_GENERATION", "UNSLOTH_COMPILE_DISABLE")


def cases() -> Iterator[Any]:
    for version in ("newest", "older"):
        for family in FAST:
            few = FEW if version == "newest" else FEWEST
            yield case(version, "fast path", family, ("bypass", *(ALL if family == "llama" else few)))
        for family, checks in (("phi", ALL), ("gemma3", NO_TRAINING), ("gpt-oss", NO_TRAINING)):
            yield case(version, "FastModel", family, checks if version == "newest" else (*FEW, "unpatch"))
        yield case(version, "FastModel", "gemma3 with images", (*FEW, "image", "unpatch"))
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
    # Fast paths look at none of them.
    yield case("newest", "fast path", "llama", ("tokens, updates", "unpatch"), switches=SWITCHES)
    for switches in (SWITCHES[:1], SWITCHES[1:]):
        yield case("newest", "FastModel", "phi", ("tokens, updates", "unpatch"), switches=switches)


def case(
    version: str,
    way: str,
    family: str,
    checks: tuple[str, ...],
    precision: str = "float32",
    switches: tuple[str, ...] = (),
) -> Any:
    label = ", ".join([f"{version}, {way}: {family}", *([precision] if precision != "float32" else [])])
    label += f" ({', '.join(switches)})" if switches else ""
    environment = {"HF_HUB_OFFLINE": "1"}
    if version == "older":
        environment["PYTHONPATH"] = os.pathsep.join([str(OLDER), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment |= dict.fromkeys(switches, "1")
    if way == "CPU backend":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    # Nothing compiles behind the shims and all falls back; trying takes half a minute, so a few cases do.
    is_tried = (version, way, precision, switches) == ("newest", "FastModel", "float32", ())
    if not ON_GPU and (not is_tried or family.startswith("gemma3")):
        environment["TORCHDYNAMO_DISABLE"] = "1"
    group = pytest.mark.xdist_group(f"{way} {environment}")
    return pytest.param(way, environment, family, precision, checks, id=label, marks=group)


@pytest.fixture(scope="session")
def processes() -> Iterator[Current]:
    with contextlib.closing(Current()) as current_process:
        yield current_process


@pytest.mark.parametrize(("way", "environment", "family", "precision", "checks"), list(cases()))
def test_case(
    way: str,
    environment: dict[str, str],
    family: str,
    precision: str,
    checks: tuple[str, ...],
    processes: Current,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    request: pytest.FixtureRequest,
) -> None:
    result = processes.get(way, environment, tmp_path).run(tmp_path, family=family, precision=precision, checks=checks)
    record_property(CASE, (request.node.callspec.id, {**result, "failed": sorted(result["failed"])}))
    assert not result["failed"], "\n\n".join(f"{name}:\n{trace}" for name, trace in result["failed"].items())
    assert sorted(result["passed"]) == sorted(checks)
