"""transformers: the cache, the attention function it needs, and the switch that gives it to a model."""

from unsloth_spectral.integrations.huggingface.cache import SpectralCache
from unsloth_spectral.integrations.huggingface.store import PrefixStore

__all__ = ["PrefixStore", "SpectralCache"]
