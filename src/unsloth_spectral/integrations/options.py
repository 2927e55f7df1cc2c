"""The options of a cache, from a ``SpectralConfig`` or from single options."""

from typing import Any

from unsloth_spectral.codec.codec import CodecConfig
from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.codec.registry import is_config
from unsloth_spectral.errors import InvalidArgumentError


def config_of(config: CodecConfig | None, **options: Any) -> CodecConfig:
    """``config``, or a new one from those ``options`` that are not None.

    Raises:
        InvalidArgumentError: both are given, or an option is out of its range.
    """
    chosen = {name: value for name, value in options.items() if value is not None}
    if config is None:
        return SpectralConfig(**chosen)
    if not is_config(config):
        raise InvalidArgumentError(
            f"config must be a SpectralConfig, got {type(config).__name__}: pass SpectralConfig(preset=...), or the "
            "options of a registered codec"
        )
    if chosen:
        raise InvalidArgumentError(f"{', '.join(chosen)} and config both say how to compress: give one of them")
    return config
