"""What a spectral layer hands to the model in place of keys and values."""

from typing import NoReturn

from unsloth_spectral.cache.layer import SpectralLayer
from unsloth_spectral.errors import SpectralError


class CompressedStates:
    """A handle on a spectral layer, returned by its ``update`` where a tensor is expected.

    An attention function made for tensors that gets one is told what to do, whatever it asks the handle for.

    Attributes:
        layer: the layer, the newest tokens already in it.
        seal_after: whether to seal once those tokens have been attended to.
        was_read: whether attention has read it. In some models several layers share one layer's keys: only the first,
            which made them, says where they stand.
    """

    __slots__ = ("layer", "seal_after", "was_read")

    def __init__(self, layer: SpectralLayer, seal_after: bool) -> None:
        self.layer = layer
        self.seal_after = seal_after
        self.was_read = False

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # copy, pickle and torch probe for these and expect an AttributeError
            raise AttributeError(name)
        raise SpectralError(
            f"keys and values are compressed here and have no `.{name}`: the model's attention function is not the "
            "spectral one; make the cache with SpectralCache(model), after any model.set_attn_implementation(...)"
        )
