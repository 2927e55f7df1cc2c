"""Widths of the codes of all layers' keys and values that fill a record."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from unsloth_spectral.codec.spectral.allocate import VALUE_GAINS, least_variances, widths_at

_OCTAVES = 100  # the range of levels, below the largest gain
_HALVINGS = 26


@dataclass(frozen=True, slots=True)
class Costs:
    """Bytes that codes take.

    Attributes:
        bit: one more bit of all tokens, of one component or of one dimension of a head's values.
        component: a component of the keys, besides its bits.
        value_elements: dimensions of a layer's values, all heads together.
    """

    bit: int
    component: int
    value_elements: int


def widths_within(
    nbytes: int, variances: Tensor, sensitivities: Sequence[float], costs: Costs
) -> tuple[Tensor, tuple[int, ...]]:
    """Widths of keys ``[L, H, D]`` int64, 0 to 8, and of each layer's values, 1 to 8, that take at most ``nbytes``
    together; the values' first bits are not counted.

    One water level serves all: a bit is spent where it saves at least so many nats per bit.

    Args:
        nbytes: to be filled.
        variances: ``[L, H, D]`` float32 of the keys' components, in nats.
        sensitivities: for each layer, the damage of its values at one bit, in nats.
        costs: what the codes take.
    """
    first_bit = 1 + costs.component / costs.bit
    ordered = np.sort(variances.flatten().numpy())
    gains = np.array(sensitivities)[:, None] * (VALUE_GAINS / costs.value_elements)
    high = math.log2(max(float(ordered[-1]), float(gains.max()), 1e-30)) + 2

    def bytes_of_keys(level: float) -> int:
        counts = len(ordered) - ordered.searchsorted(least_variances(level, first_bit))
        return int(counts.sum()) * costs.bit + int(counts[0]) * costs.component

    def bytes_of_all(level: float) -> int:
        return bytes_of_keys(level) + int((gains >= level).sum()) * costs.value_elements * costs.bit

    value_widths = 1 + (gains >= _least_level(bytes_of_all, nbytes, high)).sum(1)
    # A layer's values take much more at once than is left over: the rest goes to the keys.
    rest = nbytes - int((value_widths - 1).sum()) * costs.value_elements * costs.bit
    level = _least_level(bytes_of_keys, rest, high)
    return widths_at(level, variances, first_bit), tuple(value_widths.tolist())


def _least_level(bytes_at: Callable[[float], int], nbytes: int, high: float) -> float:
    """The least level at which at most ``nbytes`` are taken, between ``high`` and ``_OCTAVES`` octaves below."""
    low = high - _OCTAVES
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if bytes_at(2.0**middle) > nbytes else (low, middle)
    return 2.0**high
