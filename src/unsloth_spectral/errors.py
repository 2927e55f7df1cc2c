"""The errors this package raises, all under one base class."""


class SpectralError(Exception):
    """Base of every error raised on purpose by unsloth-spectral."""


class InvalidArgumentError(SpectralError, ValueError):
    """An argument breaks a rule; the message names the rule, the value received and the fix."""


class UnsupportedModelError(SpectralError):
    """A model cannot carry a spectral cache; the message names the model and what is supported."""


class LoadError(SpectralError):
    """A model, document or file could not be loaded."""


class CacheBypassedError(SpectralError):
    """A step of ``generate`` did not reach its spectral cache; the message names the path it took and what to do."""
