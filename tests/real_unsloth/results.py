"""The result file of ``make test-unsloth``."""

import json
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from unsloth_spectral.files import replacing

PACKAGES = ("unsloth", "unsloth_zoo", "transformers", "torch", "peft", "triton")


def write(path: Path, cases: dict[str, Any]) -> None:
    """Cases with the versions they ran with."""
    record = {
        "command": "make test-unsloth",
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "cases": cases,
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
