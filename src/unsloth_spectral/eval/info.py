"""Installed packages, and the attention paths and the embedded model that they make available."""

from typing import Any

from unsloth_spectral.attention.dispatch import available_paths
from unsloth_spectral.errors import LoadError
from unsloth_spectral.eval.environment import environment, version_of
from unsloth_spectral.integrations.embedded import embedded_file

_PACKAGES = ("safetensors", "matplotlib", "gguf", "accelerate", "unsloth", "peft")


def collect_info() -> dict[str, Any]:
    """Environment, packages, attention paths and the embedded model, ready for JSON."""
    obstacle = None
    try:
        embedded_file()
    except LoadError as error:
        obstacle = str(error)
    return {
        "environment": environment(),
        "packages": {name: version_of(name) for name in _PACKAGES},
        "attention_paths": [
            {"name": path.name, "serves": path.serves, "available": path.obstacle is None, "obstacle": path.obstacle}
            for path in available_paths()
        ],
        "embedded_model": {"available": obstacle is None, "obstacle": obstacle},
    }
