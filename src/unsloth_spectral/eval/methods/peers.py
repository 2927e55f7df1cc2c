"""Peers to compare with, by their names in results."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

from unsloth_spectral.eval.methods.base import Footprint, Method
from unsloth_spectral.eval.methods.kivi import Kivi
from unsloth_spectral.eval.methods.lloyd_max import LloydMax
from unsloth_spectral.eval.methods.tiny_turboquant import FAMILY as TINY_TURBOQUANT
from unsloth_spectral.eval.methods.tiny_turboquant import tiny_turboquant

# Bits offered by the backends of the library's own quantized cache.
_QUANTIZED = {"quanto": (4, 2), "hqq": (8, 4, 3, 2, 1)}
# Families that need a package: the module they import and the package that contains it.
_NEEDS = {
    "quanto": ("optimum.quanto", "optimum-quanto"),
    "hqq": ("hqq", "hqq"),
    TINY_TURBOQUANT: ("tiny_turboquant", "tiny-turboquant"),
}


def peers() -> dict[str, Method]:
    """The peers that run here, by name."""
    return {method.name: method for method in _all() if not _missing(method.family)}


def unavailable() -> dict[str, str]:
    """Reasons why peers cannot run here, by name, each with the fix."""
    return {
        method.name: f"needs the package {package}, which is not installed: pip install {package}"
        for method in _all()
        if (package := _missing(method.family))
    }


def _all() -> list[Method]:
    """The library's own quantized caches, the reference implementations, then packages."""
    codecs: dict[str, Callable[[int], Any]] = {"kivi": Kivi, "lloyd-max": LloydMax}
    return [
        *(
            Method(f"{family} {nbits}", family, partial(_quantized_cache, family, nbits), Footprint.counted)
            for family, offered in _QUANTIZED.items()
            for nbits in offered
        ),
        *(
            Method(f"{family} {nbits}", family, partial(_round_trip_cache, codecs[family](nbits)), Footprint.counted)
            for family, offered in (("kivi", (4, 3, 2)), ("lloyd-max", (4, 3, 2, 1)))
            for nbits in offered
        ),
        *tiny_turboquant(),
    ]


def _missing(family: str) -> str | None:
    """The missing package that a family needs, or None."""
    if family not in _NEEDS:
        return None
    module, package = _NEEDS[family]
    return None if _is_installed(module) else package


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package around the module is missing too
        return False


def _quantized_cache(backend: str, nbits: int, model: Any) -> Any:
    # Imported here: the module imports transformers, which listing names should not load.
    from unsloth_spectral.integrations.huggingface.quantized import CountedQuantizedCache

    return CountedQuantizedCache(model, backend, nbits)


def _round_trip_cache(codec: Any, model: Any) -> Any:
    from unsloth_spectral.integrations.huggingface.roundtrip import RoundTripCache

    return RoundTripCache(model, codec)
