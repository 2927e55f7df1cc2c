"""The kernel under the address and undefined-behaviour sanitizers, against plain scalar code (sanitized.cpp)."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from unsloth_spectral.native import library

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("sanitized.cpp")
FLAGS = (
    *("-std=c++17", "-O1", "-g1", "-fno-math-errno", "-Wno-psabi"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
)
# Half a minute of compiling each: the first variant of these that runs here is enough for every day.
HERE = [name for name in library.VARIANTS if library.runs_here(name)]
VARIANTS = [pytest.param(name, marks=[pytest.mark.slow] if place else []) for place, name in enumerate(HERE)]


def variant_flags() -> dict[str, tuple[str, ...]]:
    """What ``hatch_build.py`` compiles each variant with. Read and not imported: that needs hatchling."""
    for statement in ast.parse((ROOT / "hatch_build.py").read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "_VARIANTS":
            flags: dict[str, tuple[str, ...]] = ast.literal_eval(statement.value)
            return flags
    raise AssertionError("hatch_build.py has no _VARIANTS")


def run(*command: str, **environment: str) -> tuple[int, str]:
    completed = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **environment},
        timeout=900,
    )
    return completed.returncode, completed.stdout


@pytest.fixture(scope="module")
def compile_command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The compiler, and OpenMP if it has it; skips where it cannot make sanitized programs."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler: c++, g++, clang++, or CXX")
    folder = tmp_path_factory.mktemp("compiler")
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n", encoding="utf-8")
    output = ""
    for extra in (["-fopenmp"], []):
        command = [compiler, *FLAGS, *extra]
        code, output = run(*command, str(probe), "-o", str(folder / "probe"))
        if code == 0 and run(str(folder / "probe"), ASAN_OPTIONS="detect_leaks=0")[0] == 0:
            return command
    pytest.skip(f"{compiler} makes no programs with sanitizers that run here: {output.strip()[:200]}")


@pytest.mark.skipif(sys.platform == "win32", reason="the kernel is not built there")
@pytest.mark.parametrize("variant", VARIANTS)
def test_kernel_under_sanitizers(variant: str, compile_command: list[str], tmp_path: Path) -> None:
    program = tmp_path / "sanitized"
    flags = variant_flags()[variant]
    code, output = run(*compile_command, *flags, f"-I{library.FOLDER}", str(SOURCE), "-o", str(program))
    assert code == 0, output
    code, output = run(
        str(program),
        ASAN_OPTIONS="detect_leaks=0:abort_on_error=0",
        UBSAN_OPTIONS="print_stacktrace=1",
        OMP_NUM_THREADS="1",
    )
    assert code == 0, output
    print(output)


@pytest.mark.slow
def test_kernel_on_an_emulated_arm_processor(tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs Debian's g++-aarch64-linux-gnu and qemu-user")
    program = str(tmp_path / "arm")
    flags = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-static")
    code, output = run(compiler, *flags, f"-I{library.FOLDER}", str(SOURCE), "-o", program)
    assert code == 0, output
    code, output = run(emulator, program)
    assert code == 0, output
