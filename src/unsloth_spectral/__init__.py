"""A KV cache that stores keys and values as spectral factors and attends to them in that form."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from unsloth_spectral.log import logger as _logger

__version__ = "0.1.0"

if TYPE_CHECKING:
    from unsloth_spectral.codec.config import SpectralConfig
    from unsloth_spectral.integrations.huggingface import PrefixStore, SpectralCache
    from unsloth_spectral.integrations.scope import spectral
    from unsloth_spectral.integrations.unsloth import patch_unsloth_attention, unpatch_unsloth_attention

# Nothing is printed until the application gives the logger a handler.
_logger.addHandler(logging.NullHandler())

__all__ = [
    "PrefixStore",
    "SpectralCache",
    "SpectralConfig",
    "patch_unsloth_attention",
    "spectral",
    "unpatch_unsloth_attention",
]

_HOME = {
    "PrefixStore": "unsloth_spectral.integrations.huggingface",
    "SpectralCache": "unsloth_spectral.integrations.huggingface",
    "SpectralConfig": "unsloth_spectral.codec.config",
    "patch_unsloth_attention": "unsloth_spectral.integrations.unsloth",
    "spectral": "unsloth_spectral.integrations.scope",
    "unpatch_unsloth_attention": "unsloth_spectral.integrations.unsloth",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: transformers takes seconds to import, and Unsloth must be imported before it.
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
