"""The cache for transformers, its attention function, and the switch that gives this function to a model."""

from unsloth_spectral.integrations.huggingface.cache import SpectralCache
from unsloth_spectral.integrations.huggingface.store import PrefixStore

__all__ = ["PrefixStore", "SpectralCache"]
