"""One-byte scales: the error bound, zeros, a given top."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unsloth_spectral.codec.spectral.scales import decode_scales, encode_scales, squared_errors, unbiased_scales


def decoded(scales: torch.Tensor, steps: int, top: torch.Tensor | None = None) -> torch.Tensor:
    codes, largest = encode_scales(scales, steps, top)
    assert codes.dtype == torch.uint8
    assert codes.shape == scales.shape
    assert largest.shape == (*scales.shape[:-1], 1)
    return decode_scales(codes, steps) * largest


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    steps=st.sampled_from([20, 32]),
    exponent=st.integers(-25, 25),
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    seed=st.integers(0, 10**6),
)
def test_the_error_is_at_most_half_a_step(steps: int, exponent: int, shape: list[int], seed: int) -> None:
    octaves = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * (250 / steps)
    scales = 10.0**exponent * torch.exp2(-octaves)
    relative = (decoded(scales, steps) / scales - 1).abs()
    assert float(relative.max()) <= 0.35 / steps
    # The largest of each row is exact: it is the top.
    assert torch.equal(decoded(scales, steps).amax(-1), scales.amax(-1))


def test_zeros_stay_zeros() -> None:
    scales = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 0.0], [0.0, 1e-30, 1e-31]])
    assert torch.equal(decoded(scales, 20) == 0, scales == 0)
    assert decoded(scales, 20).isfinite().all()


@pytest.mark.parametrize("steps", [20, 32])
def test_far_smaller_scales_are_raised_to_the_smallest(steps: int) -> None:
    scales = torch.tensor([1.0, 1e-12])
    assert float(decoded(scales, steps)[1]) == pytest.approx(2.0 ** (-254 / steps), rel=1e-5)


def test_a_given_top() -> None:
    scales, top = torch.tensor([[4.0, 1.0, 0.3], [16.0, 8.0, 1.0]]), torch.tensor([[8.0], [8.0]])
    codes, largest = encode_scales(scales, 32, top)
    assert largest is top
    assert codes[:, 0].tolist() == [32, 0]
    assert codes[1, 1] == 0
    back = decode_scales(codes, 32) * top
    assert (back / scales.clamp_max(8.0) - 1).abs().max() <= 0.35 / 32


def test_half_precision_rows_are_not_needed_to_decode() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    relative = decode_scales(codes, 20)
    assert relative.dtype == torch.float32
    assert relative[0] == 1
    assert relative[255] == 0
    assert (relative[:-1].diff() < 0).all()
    assert torch.allclose(relative[20:41:20], torch.tensor([0.5, 0.25]))


def test_an_unbiased_scale_projects_onto_what_is_coded() -> None:
    x = torch.randn(40, 128, generator=torch.Generator().manual_seed(0))
    codes = x.sign()
    sums = x.square().sum(-1), (x * codes).sum(-1), codes.square().sum(-1)
    scales = unbiased_scales(*sums)
    torch.testing.assert_close((scales * sums[1]), sums[0])
    errors = (scales[:, None] * codes - x).square().sum(-1)
    torch.testing.assert_close(squared_errors(*sums, scales), errors)


def test_numbers_that_their_codes_hardly_meet_get_no_huge_scale() -> None:
    x = torch.tensor([[3.0, -4.0], [3.0, -4.0], [0.0, 0.0]])
    codes = torch.tensor([[2.0, 1.4], [-2.0, 1.0], [1.0, 1.0]])
    sums = x.square().sum(-1), (x * codes).sum(-1), codes.square().sum(-1)
    assert unbiased_scales(*sums).tolist() == pytest.approx([2 * 0.4 / 5.96, 0.0, 0.0])
