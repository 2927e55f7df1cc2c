"""The compiled kernel: the build that suits this processor, or the reason why there is none."""

import ctypes
import platform
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from unsloth_spectral.log import warn_once
from unsloth_spectral.native import abi

FOLDER = Path(__file__).parent
# The build (hatch_build.py) writes this file if it fails.
REASON = FOLDER / "not_built.txt"
# Best first.
VARIANTS = ("avx512", "avx2", "portable")
# Instructions besides those that torch requires for AVX-512: Intel since Ice Lake, AMD since Zen 4.
_AVX512 = {"avx512_vnni", "avx512vbmi", "gfni"}


def path_of(variant: str) -> Path:
    """The file of a variant."""
    return FOLDER / f"kernel_{variant}.so"


def runs_here(variant: str) -> bool:
    """True if this processor has the instructions that a variant was compiled for."""
    capability = torch.backends.cpu.get_cpu_capability()
    if variant == "avx512":
        return capability == "AVX512" and _cpu_flags() >= _AVX512
    return variant == "portable" or capability in ("AVX2", "AVX512")


@lru_cache
def load(variant: str | None = None) -> ctypes.CDLL | None:
    """The best variant that was built from these sources and runs here, or the given variant; None if there is none."""
    name = chosen() if variant is None else variant
    loaded = None if name is None else _opened(name)
    return None if loaded is None or abi.differences(loaded) else loaded


@lru_cache
def _opened(variant: str) -> ctypes.CDLL | None:
    """A variant's library, whatever its layouts; None if it was not built, cannot be loaded or does not run here."""
    if not path_of(variant).exists() or not runs_here(variant):
        return None
    try:
        # This module imports torch first, so that both share its OpenMP threads.
        return ctypes.CDLL(str(path_of(variant)))
    except OSError:
        return None


@lru_cache
def function(name: str, variant: str | None = None) -> Any:
    """A function of the library that ``load`` finds, which must exist; it takes a pointer and returns nothing."""
    loaded = load(variant)
    assert loaded is not None, f"no kernel {variant or ''} here: {obstacle()}"
    entry = getattr(loaded, name)
    entry.restype, entry.argtypes = None, [ctypes.c_void_p]
    return entry


@lru_cache
def obstacle() -> str | None:
    """Why there is no kernel here, as a message; None if there is one."""
    if load() is not None:
        return None
    if REASON.exists():
        return REASON.read_text(encoding="utf-8").strip()
    built = [name for name in VARIANTS if path_of(name).exists()]
    if not built:
        return "the kernel was not built: install from source with a C++ compiler at hand, or from a wheel"
    if any(_opened(name) is not None for name in built):
        message = "the kernel was compiled from another version's sources: install unsloth-spectral again"
        warn_once("decoding runs in torch, which is slower: %s", message)
        return message
    try:
        ctypes.CDLL(str(path_of(built[-1])))
    except OSError as error:
        return f"the kernel cannot be loaded: {error}"
    return f"this processor lacks the instructions of the kernels that were built ({', '.join(built)})"


def chosen() -> str | None:
    """The variant that ``load`` chooses."""
    return next((name for name in VARIANTS if load(name) is not None), None)


@lru_cache
def _cpu_flags() -> frozenset[str]:
    if platform.system() != "Linux":
        return frozenset()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # some sandboxes have no /proc
        return frozenset()
    for line in lines:
        if line.startswith("flags"):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()
