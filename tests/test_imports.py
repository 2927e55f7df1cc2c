"""Imports point one way, only integrations know transformers, and importing changes nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import unsloth_spectral

PACKAGE = "unsloth_spectral"
SOURCE = Path(unsloth_spectral.__file__).parent
# cli -> eval -> integrations -> {cache, attention} -> codec -> {rsvd, rope} -> errors, where X may import all behind X.
LEVEL = {"errors": 0, "rsvd": 2, "rope": 2, "codec": 3, "cache": 4, "attention": 4, "integrations": 5, "eval": 6}
LEVEL |= {"log": 0, "autocast": 0, "native": 1, "files": 1, "fields": 1, "reports": 7, "plots": 7, "cli": 8}
MODULES = sorted(SOURCE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = [PACKAGE, *path.relative_to(SOURCE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str, name: str, is_package: bool) -> set[str]:
    """Full names of all that ``source`` imports anywhere: at the top, in functions and under TYPE_CHECKING."""
    imported: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                home = name.split(".") if is_package else name.split(".")[:-1]
                base = ".".join([*home[: len(home) - node.level + 1], *([base] if base else [])])
            imported.add(base)
            imported.update(f"{base}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", None)) in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            imported.add(str(node.args[0].value))
    return imported


def part_of(name: str) -> str:
    """``codec`` of ``unsloth_spectral.codec.rank``; empty for the package itself."""
    return name.split(".")[1] if "." in name else ""


def breaches(name: str, imported: set[str]) -> list[str]:
    """What is wrong with one module's imports."""
    part, wrong = part_of(name), []
    for target in imported:
        top = target.split(".")[0]
        if top in ("transformers", "unsloth", "peft", "huggingface_hub") and part != "integrations":
            wrong.append(f"{name} imports {target}: only integrations may")
        # The names of the package itself (`__version__`) are for everyone; modules are not.
        if top != PACKAGE or not part or part_of(target) in ("", part, "__version__"):
            continue
        other = part_of(target)
        if other not in LEVEL:
            wrong.append(f"{name} imports {target}, which has no place in the order: add it to LEVEL")
        elif LEVEL[other] >= LEVEL[part]:
            wrong.append(f"{name} imports {target}: {part} may not import {other}")
        if other == "plots" and part != "cli":
            wrong.append(f"{name} imports {target}: only cli may")
    return sorted(wrong)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: module_name(path))
def test_imports_point_one_way(path: Path) -> None:
    name = module_name(path)
    assert part_of(name) in {"", *LEVEL}, f"{name} has no place in the order: add it to LEVEL"
    imported = imports_of(path.read_text(encoding="utf-8"), name, path.name == "__init__.py")
    assert breaches(name, imported) == []


def test_the_check_itself_sees_breaches() -> None:
    assert len(MODULES) > 20
    cases = {
        "from unsloth_spectral.attention import direct": "unsloth_spectral.cache.layer",
        "from unsloth_spectral.cache.layer import SpectralLayer": "unsloth_spectral.attention.naive",
        "import transformers.cache_utils": "unsloth_spectral.cache.layer",
        "def f():\n    from transformers import Cache": "unsloth_spectral.eval.agreement",
        "from unsloth_spectral import cli": "unsloth_spectral.eval.agreement",
        "from ..cache import layer": "unsloth_spectral.codec.rank",
        "from ..attention.naive import attend": "unsloth_spectral.cache.layer",
        "from unsloth_spectral.codec import rank": "unsloth_spectral.rsvd",
        "from unsloth_spectral import rsvd": "unsloth_spectral.errors",
        "from unsloth_spectral.plots import draw": "unsloth_spectral.eval.agreement",
        "import_module('unsloth_spectral.integrations')": "unsloth_spectral.codec.rank",
        "import unsloth_spectral.unheard_of": "unsloth_spectral.cli",
    }
    for source, name in cases.items():
        assert breaches(name, imports_of(source, name, is_package=False)), source
    for source, name in {
        "from .rank import encode": "unsloth_spectral.codec.block",
        "from ..errors import SpectralError": "unsloth_spectral.codec.block",
        "from unsloth_spectral import __version__": "unsloth_spectral.eval.agreement",
        "import torch, json": "unsloth_spectral.errors",
    }.items():
        assert not breaches(name, imports_of(source, name, is_package=False)), source


def test_no_two_parts_import_each_other_in_a_circle() -> None:
    graph = {module_name(path): set() for path in MODULES}
    for path in MODULES:
        name = module_name(path)
        imported = imports_of(path.read_text(encoding="utf-8"), name, path.name == "__init__.py")
        graph[name] = {target for target in imported if target in graph and target not in (name, PACKAGE)}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for target in graph[name]:
                visit(target, (*above, name))
            done.add(name)

    for name in graph:
        if name != PACKAGE:  # its imports are for type checkers and first use only
            visit(name, ())


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout.strip()


def test_importing_loads_no_transformers_and_changes_nothing() -> None:
    code = """
import logging, random, sys
import torch
state, threads, root = torch.get_rng_state(), torch.get_num_threads(), logging.getLogger().handlers[:]
numbers, default = random.getstate(), torch.get_default_dtype()
import unsloth_spectral
import unsloth_spectral.rsvd
from unsloth_spectral import SpectralConfig
SpectralConfig()
import unsloth_spectral.cache.layer, unsloth_spectral.attention.dispatch, unsloth_spectral.attention.naive
heavy = [name for name in ("transformers", "matplotlib", "typer", "rich", "unsloth", "peft") if name in sys.modules]
assert not heavy, heavy
assert torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads()
assert root == logging.getLogger().handlers and numbers == random.getstate() and default == torch.get_default_dtype()
assert [type(one) for one in logging.getLogger("unsloth_spectral").handlers] == [logging.NullHandler]
"""
    assert run(code) == ""


def test_importing_even_the_integrations_registers_nothing() -> None:
    code = """
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING
before = (sorted(AttentionInterface().keys()), sorted(AttentionMaskInterface().keys()))
layers, generation = dict(DYNAMIC_LAYER_TYPE_MAPPING), LlamaForCausalLM._prepare_cache_for_generation
from unsloth_spectral import SpectralCache, patch_unsloth_attention, unpatch_unsloth_attention
assert before == (sorted(AttentionInterface().keys()), sorted(AttentionMaskInterface().keys()))
assert not [name for name in before[0] if "spectral" in name], before
assert layers == DYNAMIC_LAYER_TYPE_MAPPING and generation is LlamaForCausalLM._prepare_cache_for_generation
"""
    assert run(code) == ""


def test_public_names() -> None:
    for name in unsloth_spectral.__all__:
        assert getattr(unsloth_spectral, name).__name__ == name
        assert name in dir(unsloth_spectral)
    with pytest.raises(AttributeError, match="no attribute 'SpectralCash'"):
        _ = unsloth_spectral.SpectralCash
    with pytest.raises(ImportError, match="SpectralCash"):
        exec("from unsloth_spectral import SpectralCash")
