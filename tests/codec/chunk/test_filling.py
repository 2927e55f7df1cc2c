"""Widths that fill a record."""

import pytest
import torch

from unsloth_spectral.codec.chunk.filling import Costs, widths_within

COSTS = Costs(bit=32, component=3, value_elements=64)


def taken(widths: torch.Tensor, value_widths: tuple[int, ...]) -> int:
    keys = int(widths.sum()) * COSTS.bit + int((widths > 0).sum()) * COSTS.component
    return keys + sum(width - 1 for width in value_widths) * COSTS.value_elements * COSTS.bit


def variances(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 2, 32, generator=torch.Generator().manual_seed(seed)).mul(4).exp2()


@pytest.mark.parametrize("nbytes", [0, 100, 5_000, 20_000, 40_000])
@pytest.mark.parametrize("sensitivity", [0.0, 1e-3, 1.0, 100.0])
def test_the_bytes_are_kept_and_nearly_used_up(nbytes: int, sensitivity: float) -> None:
    widths, value_widths = widths_within(nbytes, variances(), (sensitivity,) * 4, COSTS)
    assert widths.shape == (4, 2, 32)
    assert 0 <= int(widths.min()) <= int(widths.max()) <= 8
    assert all(1 <= width <= 8 for width in value_widths)
    left = nbytes - taken(widths, value_widths)
    assert left >= 0
    assert left < 3 * (COSTS.bit + COSTS.component) or int(widths.min()) == 8


def test_what_matters_more_gets_more_bits() -> None:
    given = variances()
    widths, value_widths = widths_within(20_000, given, (100.0, 10.0, 1e4, 1e-9), COSTS)
    order = given.flatten().argsort()
    assert widths.flatten()[order].diff().min() >= 0
    assert value_widths[3] < value_widths[0] < value_widths[2]


def test_no_variance_takes_no_bits() -> None:
    widths, value_widths = widths_within(10_000, torch.zeros(4, 2, 32), (0.0,) * 4, COSTS)
    assert int(widths.sum()) == 0
    assert value_widths == (1, 1, 1, 1)
