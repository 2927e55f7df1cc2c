"""Reverse water-filling: how many bits each component is worth (Cover & Thomas, theorem 10.3.3)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.codec.spectral.packing import MAX_NBITS
from unsloth_spectral.fields import Field, Fields

# Mean squared error of a uniform quantizer with the best step on a unit Gaussian, at 0 to 8 bits.
DISTORTION = (1.0, 0.363, 0.119, 0.0374, 0.0115, 0.0035, 0.00104, 0.0003, 0.00009)
GAINS = tuple(DISTORTION[b] - DISTORTION[b + 1] for b in range(8))
# The noise of a quantizer whose scale makes it unbiased, over the signal; and what each bit after the first takes from
# it, over what one bit leaves.
_UNBIASED = np.array([distortion / (1 - distortion) for distortion in DISTORTION[1:]])
_VALUE_GAINS = -np.diff(_UNBIASED) / _UNBIASED[0]
_TINY = 1e-30
_HALVINGS = 36  # of some 50 octaves: to the last bit of a float32


def widths_at(level: float, variances: Tensor, first_bit_cost: float) -> Tensor:
    """Bits for each of ``variances``, 0 to 8, int64: one more as long as it lowers the distortion by ``level``.

    ``first_bit_cost`` is what a component's first bit costs, the component's own metadata included, in bits.
    """
    gains = _gains_per_bit(first_bit_cost).to(variances)
    return (variances[..., None] * gains >= level).sum(-1)


def _gains_per_bit(first_bit_cost: float) -> Tensor:
    """``[8]`` float32, never rising, of a variance of 1."""
    gains = torch.tensor(GAINS, dtype=torch.float32, device="cpu")
    gains[0] /= first_bit_cost
    # A costly first bit may gain less per bit than the second: then both are taken or neither.
    gains[0] = torch.maximum(gains[0], (GAINS[0] + gains[1]) / (first_bit_cost + 1))
    gains[1] = torch.minimum(gains[0], gains[1])
    return gains


def cost(widths: Tensor, first_bit_cost: float) -> float:
    """Bits a token that ``widths`` take, metadata included."""
    return float(widths.sum() + (first_bit_cost - 1) * (widths > 0).sum())


@dataclass(slots=True)
class Budget:
    """One budget for all layers, spent while layer after layer is sealed.

    Under the query metric the variances of all layers' keys are in one unit, so one water level is best for all. With a
    profile they are in nats, and so is the damage of the values' errors: the same level then gives the values their
    widths. It is unknown until the last layer has come; until then each layer is given what is right if the layers
    still to come are as the profile says, or, without one, like those seen. The total never exceeds the budget.

    Attributes:
        bits_per_element: bits, ``fixed_cost`` included, over the number of key elements: for the keys alone or, with a
            profile, for keys and values.
        num_layers: layers that share the budget.
        profile: of the model, or None.
        seen: ``[H, D]`` variances of each layer's keys, as they came; let go with the last layer.
    """

    bits_per_element: float
    num_layers: int
    profile: ModelProfile | None = None
    seen: dict[int, Tensor] = field(default_factory=dict)
    _levels: dict[int, float] = field(default_factory=dict)
    _value_nbits: dict[int, int] = field(default_factory=dict)
    # By layer, its share less what it spent: negative where it took from the others.
    _balances: dict[int, float] = field(default_factory=dict)

    def allocate(
        self, layer: int, variances: Tensor, first_bit_cost: float, fixed_cost: float, value_elements: int = 0
    ) -> Tensor:
        """Widths for ``layer``'s ``variances [H, D]`` in score units; see ``level_of`` for the level they follow from.

        ``fixed_cost`` is what the layer costs whatever its widths, in bits a token; ``value_elements`` are its values
        a token, if the budget is for them too.
        """
        weighted = self.weighted(layer, variances)
        if layer not in self._levels:
            share = self.bits_per_element * variances.numel() - fixed_cost
            left = sum(self._balances.values()) + share
            coming = [other for other in range(self.num_layers) if other not in self._levels and other != layer]
            self.seen[layer] = variances.float()
            demands = [(_Demand(weighted.flatten(), first_bit_cost), 1.0)]
            if coming:
                others = self._expected(coming)
                demands.append((_Demand(others, first_bit_cost), len(coming) * weighted.numel() / others.numel()))
            values = None if self.profile is None else _ValueDemand(self.profile, [layer, *coming], value_elements)
            level = _common_level(left + len(coming) * share, demands, values)
            # Whatever is expected of the layers to come, each of them finds half of its share.
            own_values = None if self.profile is None else _ValueDemand(self.profile, [layer], value_elements)
            level = max(level, _common_level(left + len(coming) * share / 2, demands[:1], own_values))
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
        """``variances`` in the unit of the level: nats where a profile tells what they are worth, else as they are."""
        return variances.float() * (1.0 if self.profile is None else self.profile.key_sensitivities[layer])

    def level_of(self, layer: int) -> float:
        """The water level of a layer that ``allocate`` has seen."""
        return self._levels[layer]

    def value_nbits_of(self, layer: int) -> int:
        """Width of the values of a layer that ``allocate`` has seen, where a profile is known."""
        return self._value_nbits[layer]

    def forget(self, layer: int) -> None:
        """Take back what ``layer`` was given: it is empty again."""
        if self._levels.pop(layer, None) is None:
            return
        self.seen.pop(layer, None)
        self._value_nbits.pop(layer, None)
        del self._balances[layer]

    def to_fields(self) -> dict[str, Field]:
        """What was spent: all that changes."""
        return {
            "seen": {str(layer): variances for layer, variances in self.seen.items()},
            "levels": {str(layer): level for layer, level in self._levels.items()},
            "value_nbits": {str(layer): nbits for layer, nbits in self._value_nbits.items()},
            "balances": {str(layer): balance for layer, balance in self._balances.items()},
        }

    def restore(self, fields: Fields) -> None:
        """Have spent what ``to_fields`` says.

        Raises:
            LoadError: it is not of these layers.
        """
        seen, levels, nbits = (fields.sub(name) for name in ("seen", "levels", "value_nbits"))
        # The first snapshots of this format do not tell which layer left how much.
        balances = fields.sub("balances") if fields.has("balances") else None
        evenly = 0.0 if balances is not None else fields.number("left") / max(1, len(levels.names()))
        for layer in range(self.num_layers):
            self.forget(layer)
        for layer in range(self.num_layers):
            name = str(layer)
            if seen.has(name):
                self.seen[layer] = seen.tensor(name, torch.float32, (None, None))
            if levels.has(name):
                self._levels[layer] = levels.number(name)
                self._balances[layer] = evenly if balances is None else balances.number(name)
            if nbits.has(name):
                self._value_nbits[layer] = nbits.integer(name, 1)

    def _expected(self, layers: Sequence[int]) -> Tensor:
        """Weighted variances that layers still to come are likely to have."""
        if self.profile is None:
            return torch.cat([variances.flatten() for variances in self.seen.values()])
        known = _known(self.profile)
        # This text may be louder or softer than the profile's were, throughout.
        ratios = [float(variances.sum()) / max(known[layer][1], _TINY) for layer, variances in self.seen.items()]
        ratio = math.exp(sum(math.log(max(quotient, _TINY)) for quotient in ratios) / len(ratios))
        return ratio * torch.cat([known[layer][0] for layer in layers])


@lru_cache(maxsize=4)
def _known(profile: ModelProfile) -> list[tuple[Tensor, float]]:
    """Of each layer the variances its keys had, weighted, and their sum without weights."""
    variances = [
        torch.tensor(layer_variances, dtype=torch.float32, device="cpu") for layer_variances in profile.key_variances
    ]
    return [
        (layer_variances * weight, float(layer_variances.sum()))
        for layer_variances, weight in zip(variances, profile.key_sensitivities, strict=True)
    ]


def _common_level(budget: float, demands: Sequence[tuple["_Demand", float]], values: "_ValueDemand | None") -> float:
    """The level at which all ``demands``, each times its share, and the ``values`` cost ``budget`` bits a token."""
    ranges = [span for demand, _ in demands if (span := demand.range()) is not None]
    if not ranges:
        return 1.0
    low, high = math.log2(min(ranges)[0]) - 20, math.log2(max(most for _, most in ranges)) + 2
    if values is not None and values.most > 0:
        high = max(high, math.log2(values.most) + 2)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        level = 2.0**middle
        need = sum(share * demand.at(level) for demand, share in demands)
        if need + (0.0 if values is None else values.at(level)) > budget:
            low = middle
        else:
            high = middle
    return float(2.0**high)


class _Demand:
    """What variances cost at any level: ``cost(widths_at(...))``, by looking up instead of multiplying anew."""

    def __init__(self, variances: Tensor, first_bit_cost: float) -> None:
        gains = _gains_per_bit(first_bit_cost)
        numbers = variances.cpu().numpy()
        self._positive = numbers[numbers > 0]
        self._first = np.sort(numbers * gains[0].numpy())
        self._all = np.sort(np.outer(gains.numpy(), numbers), axis=None)
        self._first_bit_cost = first_bit_cost

    def at(self, level: float) -> float:
        # In float32, as the products are: rounding must not take a bit here and leave it there.
        reached = np.float32(level)
        first = len(self._first) - self._first.searchsorted(reached)
        return float(len(self._all) - self._all.searchsorted(reached) + (self._first_bit_cost - 1) * first)

    def range(self) -> tuple[float, float] | None:
        """The least and the largest positive variance; None where there is none."""
        return (float(self._positive.min()), float(self._positive.max())) if len(self._positive) else None


class _ValueDemand:
    """What the values of some layers cost at any level, in bits a token: one bit each, and more while they gain."""

    def __init__(self, profile: ModelProfile, layers: Sequence[int], elements: int) -> None:
        damages = np.array([profile.value_sensitivities[layer] for layer in layers], dtype=np.float64)
        # Nats for each bit a token that another bit a value costs.
        gains = damages[:, None] * (_VALUE_GAINS / max(1, elements))
        self._ordered, self._count, self._elements = np.sort(gains, axis=None), len(layers), elements
        self.most = float(gains.max())

    def at(self, level: float) -> float:
        return float(self._elements * (self._count + len(self._ordered) - self._ordered.searchsorted(level)))

    def nbits_at(self, level: float) -> int:
        """The width of a single layer's values."""
        return int(self._count + len(self._ordered) - self._ordered.searchsorted(level))


_SCALE_OF_VALUES = 8 / 64  # a byte a token: bits per element at the usual head_dim


def uniform_value_width(bits_per_element: float) -> int:
    """One width for all layers' values, the nearest to half of what keys and values may take together."""
    return min(MAX_NBITS, max(1, round(bits_per_element - _SCALE_OF_VALUES)))
