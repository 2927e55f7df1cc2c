"""Versions and hardware, recorded beside results."""

import contextlib
import importlib.metadata
import platform
from datetime import datetime, timezone
from pathlib import Path

import torch


def environment() -> dict[str, str | int]:
    """Versions, processor, threads and time, ready for JSON."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "unsloth_spectral": version_of("unsloth-spectral") or "not installed",
        "torch": torch.__version__,
        "transformers": version_of("transformers") or "not installed",
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def version_of(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's name, and the widest vector instructions torch uses on it."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # other systems and some sandboxes have no /proc
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.lower().startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
