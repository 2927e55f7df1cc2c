"""int8 quantization: the error bound, symmetry, and one broadcast operation instead of a loop over heads."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unsloth_spectral.codec.rank.int8 import dequantize_int8, quantize_int8


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check_round_trip(x: torch.Tensor, dims: tuple[int, ...]) -> None:
    codes, scale = quantize_int8(x, dims)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert codes.shape == x.shape
    error = (dequantize_int8(codes, scale).double() - x.double()).abs()
    # The scale, the division and the product are rounded to float32 each; 127 steps make that 127 * 2^-23 at most.
    assert (error <= scale.double() * (0.5 + 127 * 2**-22)).all()


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    exponent=st.integers(-30, 37),
    outlier=st.sampled_from([1.0, 1e3]),
    seed=st.integers(0, 10**6),
)
def test_the_error_is_at_most_half_a_step(shape: list[int], exponent: int, outlier: float, seed: int) -> None:
    x = random(*shape, seed=seed).clamp(-3, 3)
    x.flatten()[0] *= outlier
    x = (x.double() * 10.0**exponent / outlier).float()
    check_round_trip(x, (-1,))
    check_round_trip(x, tuple(range(-len(shape), 0)))


def test_the_largest_value_takes_the_largest_code() -> None:
    x = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.0, -3.0]])
    codes, scale = quantize_int8(x, (-1,))
    assert codes.tolist() == [[64, -127, 32], [127, 0, -127]]
    assert torch.equal(scale, torch.tensor([[2.0 / 127], [3.0 / 127]]))


def test_it_is_symmetric() -> None:
    x = random(2, 3, 50, 8)
    codes, scale = quantize_int8(x, (-2, -1))
    negated, same = quantize_int8(-x, (-2, -1))
    assert torch.equal(negated, -codes)
    assert torch.equal(same, scale)
    assert codes.min() >= -127
    assert codes.abs().amax((-2, -1)).eq(127).all()


def test_zeros_stay_zeros() -> None:
    x = random(2, 3, 5)
    x[1] = 0
    codes, scale = quantize_int8(x, (-2, -1))
    assert torch.equal(codes[1], torch.zeros(3, 5, dtype=torch.int8))
    assert 0 <= scale[1].item() < 1e-37
    assert torch.equal(dequantize_int8(codes, scale)[1], torch.zeros(3, 5))
    assert scale[0].item() > 0


def test_one_operation_equals_a_loop_over_heads() -> None:
    x = random(2, 3, 40, 16) * torch.tensor([1e-3, 1.0, 1e4])[:, None, None]
    codes, scale = quantize_int8(x, (-2, -1))
    assert scale.shape == (2, 3, 1, 1)
    for batch in range(2):
        for head in range(3):
            one_codes, one_scale = quantize_int8(x[batch, head], (0, 1))
            assert torch.equal(codes[batch, head], one_codes)
            assert torch.equal(scale[batch, head], one_scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_quantized_in_float32(dtype: torch.dtype) -> None:
    x = random(3, 20, 8).to(dtype)
    codes, scale = quantize_int8(x, (-2, -1))
    expected_codes, expected_scale = quantize_int8(x.float(), (-2, -1))
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scale, expected_scale)
    check_round_trip(x, (-2, -1))


def test_values_near_the_end_of_each_range() -> None:
    # Not float32's very last value: 127 * scale may round past it.
    for dtype, largest in ((torch.float16, 65504.0), (torch.bfloat16, 3.3e38), (torch.float32, 3.4e38)):
        x = torch.tensor([[largest, -largest, largest / 2, 0.0]], dtype=dtype)
        codes, scale = quantize_int8(x, (-1,))
        assert codes[0, :2].tolist() == [127, -127]
        assert torch.isfinite(scale).all()
        check_round_trip(x, (-1,))


def test_the_input_is_left_alone(assert_close: Callable[..., None]) -> None:
    x = random(2, 10, 4)
    before = x.clone()
    codes, scale = quantize_int8(x, (-2, -1))
    assert torch.equal(x, before)
    assert_close(dequantize_int8(codes, scale), x, 1 / 127)
