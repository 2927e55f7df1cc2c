"""Reverse water-filling: how many bits each component of the keys is worth (Cover & Thomas, theorem 10.3.3)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unsloth_spectral.codec.packing import MAX_NBITS
from unsloth_spectral.codec.profile import ModelProfile

# Mean squared error of a uniform quantizer with the best step on a unit Gaussian, at 0 to 8 bits.
DISTORTION = (1.0, 0.363, 0.119, 0.0374, 0.0115, 0.0035, 0.00104, 0.0003, 0.00009)
GAINS = tuple(DISTORTION[b] - DISTORTION[b + 1] for b in range(8))
_HALVINGS = 50


def widths_at(level: float, variances: Tensor, first_bit_cost: float) -> Tensor:
    """Bits for each of ``variances``, 0 to 8, int64: one more as long as it lowers the distortion by ``level``.

    ``first_bit_cost`` is what a component's first bit costs, the component's own metadata included, in bits.
    """
    gains = torch.tensor(GAINS, dtype=variances.dtype, device=variances.device)
    gains[0] /= first_bit_cost
    # A costly first bit may gain less per bit than the second: then both are taken or neither.
    gains[0] = torch.maximum(gains[0], (GAINS[0] + gains[1]) / (first_bit_cost + 1))
    gains[1] = torch.minimum(gains[0], gains[1])
    return (variances[..., None] * gains >= level).sum(-1)


def cost(widths: Tensor, first_bit_cost: float) -> float:
    """Bits a token that ``widths`` take, metadata included."""
    return float(widths.sum() + (first_bit_cost - 1) * (widths > 0).sum())


@dataclass(slots=True)
class KeyBudget:
    """One budget for the keys of all layers, spent while layer after layer is sealed.

    Under the query metric the variances of all layers and heads are in one unit, so one water level is best for all.
    It is unknown until the last layer has come; until then each layer is given what is right if the layers still to
    come are like those seen, or like ``expected`` where a profile knows them. The total never exceeds the budget.

    Attributes:
        bits_per_element: bits for the keys, ``fixed_cost`` included, over the number of key elements.
        num_layers: layers that share the budget.
        expected: ``[num_layers, components]`` variances from a profile, or None.
    """

    bits_per_element: float
    num_layers: int
    expected: Tensor | None = None
    _seen: list[Tensor] = field(default_factory=list)
    _levels: dict[int, float] = field(default_factory=dict)
    _left: float = 0.0

    def allocate(self, layer: int, variances: Tensor, first_bit_cost: float, fixed_cost: float) -> Tensor:
        """Widths for ``layer``'s ``variances [H, D]`` in score units; see ``level_of`` for the level they follow from.

        ``fixed_cost`` is what the layer's keys cost whatever their widths, in bits a token.
        """
        if layer not in self._levels:
            share = self.bits_per_element * variances.numel() - fixed_cost
            self._left += share
            ahead = self.num_layers - len(self._levels) - 1
            flat = variances.flatten().float()
            self._seen.append(flat)
            others = torch.cat(self._seen) if self.expected is None or not ahead else self.expected[-ahead:].flatten()
            level = _common_level(self._left + ahead * share, flat, others, ahead, first_bit_cost)
            self._levels[layer] = level
            self._left -= cost(widths_at(level, flat, first_bit_cost), first_bit_cost)
            if not ahead:
                self._seen.clear()
        return widths_at(self._levels[layer], variances.float(), first_bit_cost)

    def level_of(self, layer: int) -> float:
        """The water level of a layer that ``allocate`` has seen."""
        return self._levels[layer]

    def reset(self) -> None:
        """Forget what was spent."""
        self._seen.clear()
        self._levels.clear()
        self._left = 0.0


def _common_level(budget: float, own: Tensor, others: Tensor, ahead: int, first_bit_cost: float) -> float:
    """The level at which ``own`` and ``ahead`` layers like ``others`` cost ``budget`` bits a token together."""
    share = ahead * own.numel() / others.numel()
    both = torch.cat([own, others])
    positive = both[both > 0]
    if not len(positive):
        return 1.0
    low, high = float(positive.min().log2()) - 20, float(positive.max().log2()) + 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        level = 2.0**middle
        need = cost(widths_at(level, own, first_bit_cost), first_bit_cost)
        if share:
            need += share * cost(widths_at(level, others, first_bit_cost), first_bit_cost)
        if need > budget:
            low = middle
        else:
            high = middle
    return float(2.0**high)


_SCALE_OF_VALUES = 8 / 64  # a byte a token: bits per element at the usual head_dim


def value_widths(bits_per_element: float, num_layers: int, profile: ModelProfile | None = None) -> list[int]:
    """Width of each layer's values, such that values take about half of ``bits_per_element`` on average over both.

    Without a profile one width serves all layers, the nearest; with one, widths follow the layers' sensitivities.
    """
    wanted = bits_per_element - _SCALE_OF_VALUES
    if profile is None or len(profile.value_sensitivities) != num_layers:
        return [min(MAX_NBITS, max(1, round(wanted)))] * num_layers
    return _by_sensitivity(profile.value_sensitivities, max(1.0, wanted))


def _by_sensitivity(sensitivities: Sequence[float], mean_width: float) -> list[int]:
    """Widths of the given mean at most that lower the summed damage most, one bit after another."""
    widths = [1] * len(sensitivities)
    for _ in range(int(len(widths) * mean_width) - len(widths)):
        gains = [
            damage * GAINS[width] if width < MAX_NBITS else -1.0
            for damage, width in zip(sensitivities, widths, strict=True)
        ]
        widths[gains.index(max(gains))] += 1
    return widths
