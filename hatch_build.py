"""Compiles the kernel while the package is built. Where that fails the package still works, in torch alone."""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_FOLDER = Path("src/unsloth_spectral/native")
_SOURCES = ("attend.cpp", "encode.cpp", "abi.cpp")
_COMMON = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-Wno-psabi")
_VARIANTS = {
    "avx512": (
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mavx512vnni",
        "-mavx512vbmi",
        "-mgfni",
        "-mfma",
        "-mf16c",
    ),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "portable": (),
}


class NativeBuildHook(BuildHookInterface):  # type: ignore[misc]
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        folder = Path(self.root) / _FOLDER
        reason = _build(folder)
        note = folder / "not_built.txt"
        note.unlink(missing_ok=True)
        if reason is not None:
            note.write_text(reason + "\n", encoding="utf-8")
            print(f"unsloth-spectral is built without its kernel: {reason}", file=sys.stderr)
        else:
            build_data["pure_python"] = False
            # Called through ctypes, so any Python will do.
            build_data["tag"] = f"py3-none-{re.sub('[-.]', '_', sysconfig.get_platform())}"


def _build(folder: Path) -> str | None:
    """Compile every variant that suits this kind of processor; why not, where that fails."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        return "no C++ compiler was found when the package was installed (c++, g++, clang++, or CXX)"
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    running = {}
    for variant, flags in _VARIANTS.items():
        if variant != "portable" and not is_x86:
            continue
        target = folder / f"kernel_{variant}.so"
        if _is_current(target):
            continue
        # Beside the target and then over it: a process may have the old one loaded, and others may build it too.
        command = [compiler, *_COMMON, *flags, "-fopenmp", *(str(folder / name) for name in _SOURCES)]
        running[target] = [*command, "-o", str(_beside(target))]
    started = {target: _start(command) for target, command in running.items()}
    for target, process in started.items():
        output = process.communicate()[1]
        if process.returncode:
            # A compiler without OpenMP: one thread is better than none.
            alone = [flag for flag in running[target] if flag != "-fopenmp"]
            process = _start(alone)
            output = process.communicate()[1]
        if process.returncode:
            lines = [line for line in output.splitlines() if "error" in line] or output.splitlines() or ["no message"]
            return f"{compiler} failed: {lines[0][:200]}"
        _beside(target).replace(target)
    return None


def _is_current(target: Path) -> bool:
    """Whether another environment of this checkout has compiled ``target`` since its sources changed."""
    if "CXX" in os.environ or not target.exists():
        return False
    sources = [Path(__file__), *target.parent.glob("*.cpp"), *target.parent.glob("*.h")]
    return target.stat().st_mtime > max(source.stat().st_mtime for source in sources)


def _beside(target: Path) -> Path:
    return target.with_name(f"{target.name}.{os.getpid()}.new")


def _start(command: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
