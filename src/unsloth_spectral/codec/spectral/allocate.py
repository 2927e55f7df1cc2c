"""Reverse water-filling: the number of bits for each component (Cover & Thomas, theorem 10.3.3)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.codec.spectral.packing import MAX_NBITS
from unsloth_spectral.codec.spectral.trellis import tables
from unsloth_spectral.fields import Field, Fields

# Mean squared error on a unit Gaussian at 0 to 8 bits.
DISTORTION = (1.0, *tables().distortions)
GAINS = tuple(DISTORTION[b] - DISTORTION[b + 1] for b in range(8))
# Noise over signal of a quantizer whose scale makes it unbiased; and how much each bit after the first lowers the
# noise, relative to the noise at one bit.
_UNBIASED = np.array([distortion / (1 - distortion) for distortion in DISTORTION[1:]])
VALUE_GAINS = -np.diff(_UNBIASED) / _UNBIASED[0]
_TINY = 1e-30
_HALVINGS = 24  # narrows some 50 octaves to millionths of one


def widths_at(level: float, variances: Tensor, first_bit_cost: float) -> Tensor:
    """Bits for each of ``variances``, 0 to 8, int64: one more as long as it lowers the distortion by ``level``.

    ``first_bit_cost`` is what a component's first bit costs, the component's own metadata included, in bits.
    """
    least = torch.from_numpy(least_variances(level, first_bit_cost)).to(variances)
    return (variances[..., None] >= least).sum(-1)


def least_variances(level: float, first_bit_cost: float) -> np.ndarray:
    """The least variances that get one bit, two, up to eight at ``level``, ``[8]`` float32, never falling."""
    # Infinity, for what no variance reaches.
    with np.errstate(over="ignore"):
        return np.float32(level) * _variances_per_level(first_bit_cost)


@lru_cache(maxsize=64)
def _variances_per_level(first_bit_cost: float) -> np.ndarray:
    gains = np.array(GAINS)
    # A costly first bit may gain less per bit than the second: then a component gets both or neither.
    gains[0] = max(GAINS[0] / first_bit_cost, (GAINS[0] + GAINS[1]) / (first_bit_cost + 1))
    gains[1] = min(gains[0], gains[1])
    return (1 / gains).astype(np.float32)


def cost(widths: Tensor, first_bit_cost: float) -> float:
    """Bits per token that ``widths`` take, metadata included."""
    return int(widths.sum()) + (first_bit_cost - 1) * int((widths > 0).sum())


@dataclass(slots=True)
class Budget:
    """One budget for all layers, spent as they are sealed one after another.

    Under the query metric the variances of all layers' keys have one unit, so one water level is best for all. With a
    profile the unit is nats, as for the damage of the values' errors, and the same level decides the values' widths.
    The level is unknown until the last layer is sealed. Until then each layer gets the level that would be right if the
    layers still to come were as the profile says or, without one, like those seen. The total never exceeds the budget.

    Attributes:
        bits_per_element: bits, ``fixed_cost`` included, per key element: for the keys alone or, with a profile, for
            keys and values.
        num_layers: layers that share the budget.
        profile: of the model, or None.
        seen: ``[H, D]`` variances of each layer's keys, unweighted; dropped after the last layer.
    """

    bits_per_element: float
    num_layers: int
    profile: ModelProfile | None = None
    seen: dict[int, Tensor] = field(default_factory=dict)
    _levels: dict[int, float] = field(default_factory=dict)
    _value_nbits: dict[int, int] = field(default_factory=dict)
    # By layer, its share minus its spending: negative if it used some of the others' share.
    _balances: dict[int, float] = field(default_factory=dict)

    def allocate(
        self, layer: int, variances: Tensor, first_bit_cost: float, fixed_cost: float, value_elements: int = 0
    ) -> Tensor:
        """Widths for ``layer``'s ``variances [H, D]`` in score units; ``level_of`` has the level that they follow from.

        ``fixed_cost`` is the layer's cost besides its widths, in bits per token; ``value_elements`` are its value
        elements per token, if the budget covers values too.
        """
        weighted = self.weighted(layer, variances)
        if layer not in self._levels:
            share = self.bits_per_element * variances.numel() - fixed_cost
            available = sum(self._balances.values()) + share
            coming = [other for other in range(self.num_layers) if other not in self._levels and other != layer]
            self.seen[layer] = variances.float()
            demands = [(_Demand(weighted.flatten().cpu().numpy(), first_bit_cost), 1.0)]
            if coming:
                others = self._expected(coming)
                demands.append((_Demand(others, first_bit_cost), len(coming) * weighted.numel() / len(others)))
            values = None if self.profile is None else _ValueDemand(self.profile, [layer, *coming], value_elements)
            level = _common_level(available + len(coming) * share, demands, values)
            # Each layer to come keeps at least half of its share, whatever is expected of it.
            own_values = None if self.profile is None else _ValueDemand(self.profile, [layer], value_elements)
            level = max(level, _common_level(available + len(coming) * share / 2, demands[:1], own_values))
            self._levels[layer] = level
            spent = cost(widths_at(level, weighted, first_bit_cost), first_bit_cost)
            if own_values is not None:
                nbits = own_values.nbits_at(level)
                self._value_nbits[layer] = nbits
                spent += nbits * value_elements
            self._balances[layer] = share - spent
            if not coming:
                self.seen.clear()
        return widths_at(self._levels[layer], weighted, first_bit_cost)

    def weighted(self, layer: int, variances: Tensor) -> Tensor:
        """``variances`` in the unit of the level: nats if there is a profile, else unchanged."""
        if self.profile is None:
            return variances.float()
        return _weighted_by_head(variances.float(), self.profile.key_sensitivities[layer])

    def level_of(self, layer: int) -> float:
        """The water level of a layer that ``allocate`` has seen."""
        return self._levels[layer]

    def value_nbits_of(self, layer: int) -> int:
        """Width of the values of a layer that ``allocate`` has seen, if there is a profile."""
        return self._value_nbits[layer]

    def forget(self, layer: int) -> None:
        """Undo the allocation of ``layer``, which is empty again."""
        # An interrupted allocation has left only some of these.
        for kept in (self._levels, self.seen, self._value_nbits, self._balances):
            kept.pop(layer, None)

    def to_fields(self) -> dict[str, Field]:
        """The state of the budget."""
        return {
            "seen": {str(layer): variances for layer, variances in self.seen.items()},
            "levels": {str(layer): level for layer, level in self._levels.items()},
            "value_nbits": {str(layer): nbits for layer, nbits in self._value_nbits.items()},
            "balances": {str(layer): balance for layer, balance in self._balances.items()},
        }

    def restore(self, fields: Fields) -> None:
        """Restore the state that ``to_fields`` returned.

        Raises:
            LoadError: the state belongs to other layers.
        """
        seen, levels, nbits, balances = (fields.sub(name) for name in ("seen", "levels", "value_nbits", "balances"))
        for layer in range(self.num_layers):
            self.forget(layer)
        for layer in range(self.num_layers):
            name = str(layer)
            if seen.has(name):
                self.seen[layer] = seen.tensor(name, torch.float32, (None, None))
            if levels.has(name):
                self._levels[layer] = levels.number(name)
                self._balances[layer] = balances.number(name)
            if nbits.has(name):
                self._value_nbits[layer] = nbits.integer(name, 1)

    def _expected(self, layers: Sequence[int]) -> np.ndarray:
        """Expected weighted variances of the layers still to come, float32."""
        if self.profile is None:
            return torch.cat([variances.flatten() for variances in self.seen.values()]).cpu().numpy()
        by_layer = _profile_variances(self.profile)
        # This text's variances may all be larger or smaller than those of the profile's texts.
        ratios = [float(variances.sum()) / max(by_layer[layer][1], _TINY) for layer, variances in self.seen.items()]
        ratio = math.exp(sum(math.log(max(quotient, _TINY)) for quotient in ratios) / len(ratios))
        return np.float32(ratio) * np.concatenate([by_layer[layer][0] for layer in layers])


def _weighted_by_head(variances: Tensor, sensitivities: Sequence[float]) -> Tensor:
    """``variances [H, D]`` float32 times their heads' ``sensitivities``, or times the mean of another number of them.

    With tensor parallelism the profile is of all heads, and each process has some of them.
    """
    by_head = torch.tensor(sensitivities, dtype=torch.float32, device="cpu")
    if len(by_head) != len(variances):
        by_head = by_head.mean(0, keepdim=True)
    return variances * by_head.to(variances.device)[:, None]


@lru_cache(maxsize=4)
def _profile_variances(profile: ModelProfile) -> list[tuple[np.ndarray, float]]:
    """For each layer, the profile's key variances, weighted, and their unweighted sum."""
    by_layer = []
    for sensitivities, numbers in zip(profile.key_sensitivities, profile.key_variances, strict=True):
        variances = torch.tensor(numbers, dtype=torch.float32, device="cpu").view(len(sensitivities), -1)
        weighted = _weighted_by_head(variances, sensitivities).flatten().numpy()
        by_layer.append((weighted, float(variances.sum())))
    return by_layer


def _common_level(budget: float, demands: Sequence[tuple["_Demand", float]], values: "_ValueDemand | None") -> float:
    """The level at which all ``demands``, each times its weight, and the ``values`` cost ``budget`` bits per token."""
    ranges = [span for demand, _ in demands if (span := demand.range()) is not None]
    if not ranges:
        return 1.0
    low, high = math.log2(min(ranges)[0]) - 20, math.log2(max(most for _, most in ranges)) + 2
    if values is not None and values.most > 0:
        high = max(high, math.log2(values.most) + 2)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        level = 2.0**middle
        bits = sum(weight * demand.at(level) for demand, weight in demands)
        if bits + (0.0 if values is None else values.at(level)) > budget:
            low = middle
        else:
            high = middle
    return float(2.0**high)


class _Demand:
    """The cost of variances at any level, ``cost(widths_at(...))``, by lookup in their order."""

    def __init__(self, variances: np.ndarray, first_bit_cost: float) -> None:
        self._ordered, self._first_bit_cost = np.sort(variances), first_bit_cost

    def at(self, level: float) -> float:
        counts = len(self._ordered) - self._ordered.searchsorted(least_variances(level, self._first_bit_cost))
        return float(counts.sum() + (self._first_bit_cost - 1) * counts[0])

    def range(self) -> tuple[float, float] | None:
        """The smallest and the largest positive variance; None if there is none."""
        positive = self._ordered[self._ordered.searchsorted(0.0, side="right") :]
        return (float(positive[0]), float(positive[-1])) if len(positive) else None


class _ValueDemand:
    """The cost of some layers' values at any level, in bits per token: one bit each, and further bits while they
    gain."""

    def __init__(self, profile: ModelProfile, layers: Sequence[int], elements: int) -> None:
        damages = np.array([profile.value_sensitivities[layer] for layer in layers], dtype=np.float64)
        # Nats gained by one more bit per value, per bit of its cost per token.
        gains = damages[:, None] * (VALUE_GAINS / max(1, elements))
        self._ordered, self._count, self._elements = np.sort(gains, axis=None), len(layers), elements
        self.most = float(gains.max())

    def at(self, level: float) -> float:
        return float(self._elements * (self._count + len(self._ordered) - self._ordered.searchsorted(level)))

    def nbits_at(self, level: float) -> int:
        """The width of a single layer's values."""
        return int(self._count + len(self._ordered) - self._ordered.searchsorted(level))


_SCALE_OF_VALUES = 8 / 64  # a byte per token: bits per element at the usual head_dim


def uniform_value_width(bits_per_element: float) -> int:
    """One width for all layers' values, the nearest to half of the bits of keys and values together."""
    return min(MAX_NBITS, max(1, round(bits_per_element - _SCALE_OF_VALUES)))
