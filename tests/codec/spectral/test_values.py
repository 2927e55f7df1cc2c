"""Coded values: unbiased tokens, distortion close to the Gaussian figures, slices and joins equal to the whole."""

from collections.abc import Callable

import pytest
import torch

from unsloth_spectral.codec.spectral.allocate import DISTORTION
from unsloth_spectral.codec.spectral.values import ValueCodes, encode, hadamard
from unsloth_spectral.codec.tensors import TokenShape
from unsloth_spectral.errors import LoadError
from unsloth_spectral.fields import Fields, flatten

BATCH, HEADS = 2, 3
widths = pytest.mark.parametrize("nbits", range(1, 9))
# Half a step of the token's scale, 1/20 of an octave.
ROUNDING = 0.35 / 20


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dim", [1, 2, 15, 16, 60, 64, 80, 96, 128, 256])
def test_the_rotation_is_orthogonal_and_spreads(dim: int, assert_close: Callable[..., None]) -> None:
    matrix = hadamard(dim)
    assert_close(matrix @ matrix.T, torch.eye(dim), 1e-5)
    assert matrix is hadamard(dim)
    if dim >= 16 and dim & (dim - 1) == 0:
        assert torch.allclose(matrix.abs(), torch.full_like(matrix, dim**-0.5))
        assert 0.3 < (matrix > 0).float().mean() < 0.7
    elif dim >= 16:
        assert matrix.abs().max() < 0.6


@widths
@pytest.mark.parametrize("head_dim", [60, 64, 80])
def test_distortion_near_the_gaussian_figures(nbits: int, head_dim: int) -> None:
    values = random(BATCH, HEADS, 512, head_dim)
    codes = encode(values, nbits)
    error = float((codes.reconstruct() - values).square().mean() / values.square().mean())
    # Unbiased: D of the least-squares scale becomes D / (1 - D); below, the rounding of the token's scale. Where a step
    # comes from the rms of few numbers it is not quite the best one.
    best = DISTORTION[nbits] / (1 - DISTORTION[nbits])
    assert 0.75 * best < error < 1.07 * best + 2 * ROUNDING**2 / 3
    assert torch.allclose(codes.relative_error.float().square().mean(), torch.tensor(error), rtol=0.02)


@widths
def test_every_token_is_unbiased(nbits: int) -> None:
    values = random(BATCH, HEADS, 136, 64) * torch.logspace(-2, 1, 136)[:, None]
    hat = encode(values, nbits).reconstruct()
    ratio = (hat * values).sum(-1) / values.square().sum(-1)
    assert float((ratio - 1).abs().max()) < ROUNDING + 1e-4
    assert abs(float(ratio.mean()) - 1) < 0.002


@pytest.mark.parametrize("nbits", [1, 3, 8])
@pytest.mark.parametrize(("head_dim", "heads", "tokens"), [(64, 3, 136), (60, 1, 8), (80, 2, 1000)])
def test_combine_is_the_sum_of_the_reconstruction(
    nbits: int, head_dim: int, heads: int, tokens: int, assert_close: Callable[..., None]
) -> None:
    codes = encode(random(BATCH, heads, tokens, head_dim), nbits)
    weights = torch.rand(BATCH, heads, 5, tokens, generator=torch.Generator().manual_seed(1))
    assert codes.reconstruct().shape == (BATCH, heads, tokens, head_dim)
    assert_close(codes.combine(weights), weights @ codes.reconstruct(), 1e-4)
    assert codes.combine(weights.bfloat16()).dtype == torch.bfloat16


def test_noise_averages_out_under_attention() -> None:
    values = random(1, 1, 1024, 64) + random(1, 1, 1, 64, seed=3)
    weights = torch.full((1, 1, 1, 1024), 1 / 1024)
    codes = encode(values, 2)
    relative_error = (codes.reconstruct() - values).norm() / values.norm()
    many = (codes.combine(weights) - weights @ values).norm() / (weights @ values).norm()
    assert many < relative_error / 4


@pytest.mark.parametrize("nbits", [1, 4])
def test_tokens_of_zeros_stay_zero(nbits: int) -> None:
    values = random(BATCH, HEADS, 136, 64)
    values[:, :, ::3] = 0
    hat = encode(values, nbits).reconstruct()
    assert not hat[:, :, ::3].any()
    assert hat[:, :, 1::3].norm(dim=-1).min() > 1
    nothing = encode(torch.zeros(BATCH, HEADS, 8, 64), nbits)
    assert not nothing.reconstruct().any()
    assert not nothing.relative_error.any()


def test_each_token_has_its_own_scale() -> None:
    values = random(BATCH, HEADS, 64, 64) * 10.0 ** torch.linspace(-3, 0, 64)[:, None]
    hat = encode(values, 6).reconstruct()
    assert ((hat - values).norm(dim=-1) / values.norm(dim=-1) < 0.15).all()  # an outlier of a token is clipped


def test_huge_and_tiny_values() -> None:
    values = random(BATCH, HEADS, 64, 64)
    for size in (1e-20, 1e-6, 1e4, 1e15):
        codes = encode(size * values, 8)
        assert float(codes.relative_error.max()) < 0.03
        assert ((codes.reconstruct() / size - values).norm() / values.norm()) < 0.03


@pytest.mark.parametrize(("start", "stop"), [(0, 400), (0, 3), (128, 400), (256, 321)])
def test_a_slice_is_that_part(start: int, stop: int, assert_close: Callable[..., None]) -> None:
    codes = encode(random(BATCH, HEADS, 400, 60), 3)
    part = codes.slice(start, stop)
    assert part.num_tokens == stop - start
    assert_close(part.reconstruct(), codes.reconstruct()[..., start:stop, :], 1e-6)
    assert part.streams.untyped_storage().data_ptr() == codes.streams.untyped_storage().data_ptr()


@pytest.mark.parametrize("nbits", [1, 3, 5])
@pytest.mark.parametrize("size", [1.0, 0.01, 1.6])
def test_later_values_follow_under_the_first_ones_scale(
    size: float, nbits: int, assert_close: Callable[..., None]
) -> None:
    first = encode(random(BATCH, HEADS, 128, 60), nbits)
    later = size * random(BATCH, HEADS, 64, 60, seed=1)
    second = encode(later, nbits, first.largest, first.carries_at(128))
    assert second.largest is first.largest
    # The first of the later tokens have few paths to choose from, so their errors are larger.
    unbiased = (DISTORTION[nbits] / (1 - DISTORTION[nbits])) ** 0.5
    assert (second.reconstruct() - later).norm() / later.norm() < 1.25 * unbiased
    joined = first.append(second)
    assert joined.num_tokens == 192
    assert_close(joined.reconstruct(), torch.cat([first.reconstruct(), second.reconstruct()], -2), 1e-6)
    shares = first.relative_error.float().square() * 128 + second.relative_error.float().square() * 64
    assert_close(joined.relative_error, (shares / 192).sqrt(), 1e-2)
    weights = torch.rand(BATCH, HEADS, 2, 192, generator=torch.Generator().manual_seed(1))
    assert_close(joined.combine(weights), weights @ joined.reconstruct(), 1e-4)


def test_map_acts_on_rows(assert_close: Callable[..., None]) -> None:
    codes = encode(random(BATCH, HEADS, 24, 64), 3)
    assert_close(codes.map(lambda t: t[[1, 0, 1]]).reconstruct(), codes.reconstruct()[[1, 0, 1]], 1e-6)


def test_nbytes_are_those_of_the_storages() -> None:
    codes = encode(random(BATCH, HEADS, 200, 60), 3)
    # 200 tokens in two tiles of 16 bytes a bit; a carry for each dimension.
    assert codes.nbytes == BATCH * HEADS * (60 * 3 * 32 + 60 + 256 + 4 + 2)
    assert codes.slice(0, 8).nbytes == codes.nbytes
    assert codes.slice(0, 8).map(torch.clone).nbytes == BATCH * HEADS * (60 * 3 * 16 + 60 + 128 + 4 + 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    values = random(BATCH, HEADS, 64, 64).to(dtype)
    assert (encode(values, 8).reconstruct() - values.float()).norm() / values.float().norm() < 0.03


@pytest.mark.parametrize("count", [1, 128, 300])
def test_stored_values_come_back(count: int) -> None:
    codes = encode(random(BATCH, HEADS, count, 40), 5)
    tree, tensors = flatten(codes.to_fields())
    shape = TokenShape(BATCH, HEADS, 40, 40, torch.float32, torch.float32)
    found = ValueCodes.from_fields(Fields(tree, lambda number, _: tensors[number]), shape)
    assert torch.equal(found.reconstruct(), codes.reconstruct())
    assert torch.equal(found.relative_error, codes.relative_error)
    with pytest.raises(LoadError, match="must have a tensor"):
        ValueCodes.from_fields(Fields({**tree, "num_tokens": count + 128}, lambda number, _: tensors[number]), shape)
