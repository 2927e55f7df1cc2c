"""The name under which transformers passes a cache: ``cache`` since 5.24, ``past_key_values`` before.

Since 5.24 the old name still works wherever a user passes it, with a FutureWarning, so both are looked for.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import GenerationMixin

CACHE_NAMES = ("cache", "past_key_values")

_PARAMETERS = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
# The name that the installed transformers passes on by itself.
CACHE_NAME = next(name for name in CACHE_NAMES if name in _PARAMETERS)


def cache_argument(cache: Any) -> dict[str, Any]:
    """``cache`` as a keyword argument of a model's ``forward`` or of ``generate``."""
    return {CACHE_NAME: cache}


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache among keyword ``arguments`` under either name; None where there is none."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def cache_of(output: Any) -> Any:
    """The cache in the ``output`` of a model or of ``generate``; None where it has none."""
    return getattr(output, CACHE_NAME, None)
