"""The rank codec: how near the best rank-k approximation it comes, what it stores, and that it is repeatable."""

from collections.abc import Callable

import pytest
import torch

from unsloth_spectral.codec.rank import factors as rank_codec
from unsloth_spectral.codec.rank.factors import RankFactors, encode
from unsloth_spectral.errors import InvalidArgumentError

FIELDS = ("codes", "scale", "basis", "relative_error")


def matrices(*shape: int, decay: float = 0.8, seed: int = 0) -> torch.Tensor:
    """Random matrices ``[..., tokens, head_dim]`` with singular values ``decay ** j``, as keys have them."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(*shape[:-2], shape[-1], shape[-1], generator=generator, dtype=torch.float64))[0]
    return ((left * decay ** torch.arange(left.shape[-1])) @ right[..., : left.shape[-1], :]).float() * shape[-2] ** 0.5


def relative_errors(factors: RankFactors, block: torch.Tensor) -> torch.Tensor:
    difference = factors.reconstruct().double() - block.double()
    return difference.square().sum((-2, -1)).sqrt() / block.double().square().sum((-2, -1)).sqrt()


def exact_errors(block: torch.Tensor, rank: int) -> torch.Tensor:
    """Relative Frobenius error of the best approximation of that rank (Eckart-Young)."""
    squares = torch.linalg.svdvals(block.double()).square()
    return (squares[..., rank:].sum(-1) / squares.sum(-1)).sqrt()


@pytest.mark.parametrize("head_dim", [8, 60, 64, 80])
@pytest.mark.parametrize("tokens", [63, 500])
@pytest.mark.parametrize("rank", [1, 5, 16])
def test_the_error_is_near_that_of_the_exact_truncated_svd(head_dim: int, tokens: int, rank: int) -> None:
    rank = min(rank, head_dim)
    block = matrices(2, 3, tokens, head_dim)
    error, best = relative_errors(encode(block, rank), block), exact_errors(block, rank)
    assert error.shape == (2, 3)
    assert (error >= best * 0.999).all()
    # int8 rounding adds in quadrature: U's entries within about 5 sigma, in 127 steps, are about 1.3 % noise.
    assert (error <= (best.square() + 0.015**2).sqrt() * 1.02).all()


@pytest.mark.parametrize("decay", [0.7, 0.95, 1.0])
def test_full_rank_is_nearly_lossless(decay: float) -> None:
    block = matrices(2, 2, 200, 16, decay=decay)
    assert relative_errors(encode(block, 16), block).max() < 0.013


@pytest.mark.parametrize("decay", [0.6, 0.9, 0.98])
@pytest.mark.parametrize("rank", [1, 8, 20, 64])
def test_the_error_estimate_is_near_the_true_error(decay: float, rank: int) -> None:
    block = matrices(2, 3, 256, 64, decay=decay)
    factors = encode(block, rank)
    ratio = factors.relative_error.double() / relative_errors(factors, block)
    assert ((ratio - 1).abs() < 0.1).all(), ratio


def test_what_is_stored() -> None:
    factors = encode(matrices(2, 3, 100, 32), 8)
    assert {name: (getattr(factors, name).dtype, tuple(getattr(factors, name).shape)) for name in FIELDS} == {
        "codes": (torch.int8, (2, 3, 8, 100)),
        "scale": (torch.float32, (2, 3, 1, 1)),
        "basis": (torch.float16, (2, 3, 8, 32)),
        "relative_error": (torch.float32, (2, 3)),
    }
    assert (factors.rank, factors.num_tokens, factors.num_fallbacks) == (8, 100, 0)
    assert factors.nbytes == 2 * 3 * (8 * 100 + 4 + 2 * 8 * 32 + 4)
    assert factors.nbytes == sum(getattr(factors, name).untyped_storage().nbytes() for name in FIELDS)
    assert factors.codes.is_contiguous()
    assert factors.codes.abs().amax((-2, -1)).eq(127).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_dtype_is_encoded_as_float32(dtype: torch.dtype) -> None:
    block = matrices(2, 100, 16).to(dtype)
    factors, expected = encode(block, 8), encode(block.float(), 8)
    for name in FIELDS:
        assert torch.equal(getattr(factors, name), getattr(expected, name)), name


def test_the_same_tokens_give_the_same_block_and_no_global_state_is_touched() -> None:
    block = matrices(2, 3, 120, 40)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = encode(block, 6)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    torch.randn(7)
    second = encode(block.clone(), 6)
    for name in FIELDS:
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_the_input_is_left_alone() -> None:
    block = matrices(2, 64, 16)
    before = block.clone()
    encode(block, 4)
    assert torch.equal(block, before)


def test_a_strided_view_is_encoded_like_its_copy(assert_close: Callable[..., None]) -> None:
    view = matrices(2, 3, 100, 16).transpose(1, 2).contiguous().transpose(1, 2)
    assert not view.is_contiguous()
    factors = encode(view, 5)
    assert factors.codes.is_contiguous()
    assert_close(factors.reconstruct(), encode(view.contiguous(), 5).reconstruct(), 1e-3)


def test_scores_and_combine_are_the_products_with_the_reconstruction(assert_close: Callable[..., None]) -> None:
    generator = torch.Generator().manual_seed(3)
    factors = encode(matrices(2, 3, 90, 24), 7)
    dense = factors.reconstruct()
    query = torch.randn(2, 3, 5, 24, generator=generator)
    weights = torch.rand(2, 3, 5, 90, generator=generator)
    assert_close(factors.scores(query), query @ dense.mT, 1e-4)
    assert_close(factors.combine(weights), weights @ dense, 1e-4)
    assert factors.scores(query.double()).dtype == torch.float64
    assert_close(factors.combine(weights.double()), weights.double() @ dense.double(), 1e-5)


@pytest.mark.parametrize("count", [1, 7, 89, 90])
def test_first_tokens_are_those_of_the_whole(count: int, assert_close: Callable[..., None]) -> None:
    factors = encode(matrices(2, 3, 90, 24), 7)
    cut = factors.first_tokens(count)
    assert cut.num_tokens == count
    assert torch.equal(cut.codes, factors.codes[..., :count])
    assert_close(cut.reconstruct(), factors.reconstruct()[..., :count, :], 1e-6)
    assert cut.codes.untyped_storage().nbytes() == 2 * 3 * 7 * count
    assert cut.nbytes == factors.nbytes - 2 * 3 * 7 * (90 - count)


def test_concatenate_and_map_move_codes_without_encoding() -> None:
    blocks = matrices(2, 3, 4, 50, 16)
    whole = encode(blocks, 5)
    left, right = whole.map(lambda tensor: tensor[:, :, :1]), whole.map(lambda tensor: tensor[:, :, 1:])
    joined = left.concatenate(right, dim=2)
    for name in FIELDS:
        assert torch.equal(getattr(joined, name), getattr(whole, name)), name
    rows = whole.map(lambda tensor: tensor[torch.tensor([1, 1, 0])])
    assert torch.equal(rows.reconstruct(), whole.reconstruct()[[1, 1, 0]])
    assert joined.nbytes == whole.nbytes


def test_fallbacks_are_told_once_by_what_encode_returns() -> None:
    # Rank 3 of 8 goes to the randomized route, whose oversampling then asks for all 8.
    encoded = encode(matrices(5, 30, 8), 3)
    assert encoded.num_fallbacks == 5
    assert encoded.map(torch.clone).num_fallbacks == 0
    assert encoded.first_tokens(3).num_fallbacks == 0
    assert encoded.concatenate(encoded, dim=0).num_fallbacks == 0


def test_blocks_of_one_batch_are_independent(assert_close: Callable[..., None]) -> None:
    blocks = matrices(3, 80, 16)
    blocks[1] *= 1e6
    alone = encode(blocks[:1], 6).reconstruct()
    assert_close(encode(blocks, 6).reconstruct()[:1], alone, 1e-3)


def test_zeros_are_kept_as_zeros() -> None:
    blocks = matrices(3, 80, 16)
    blocks[1] = 0
    factors = encode(blocks, 6)
    assert factors.is_finite
    assert torch.equal(factors.reconstruct()[1], torch.zeros(80, 16))
    assert factors.relative_error[1].item() == 0
    assert relative_errors(factors, blocks)[[0, 2]].max() < 0.3


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e6, 1e15])
def test_the_error_does_not_depend_on_the_magnitude(size: float) -> None:
    block = matrices(2, 100, 16)
    assert relative_errors(encode(block * size, 8), block * size).max() < exact_errors(block, 8).max() * 1.05


def test_identical_tokens_and_single_tokens_are_exact_to_int8() -> None:
    same = torch.randn(16, generator=torch.Generator().manual_seed(0)).expand(2, 40, 16)
    assert relative_errors(encode(same, 1), same).max() < 0.002
    single = matrices(3, 1, 16)
    assert relative_errors(encode(single, 1), single).max() < 0.002


def test_overflow_of_the_squares_is_seen() -> None:
    block = matrices(2, 60, 16)
    block[1, 5] = 1e30
    factors = encode(block, 4)
    assert not factors.is_finite
    assert encode(block[:1], 4).is_finite


def test_ranks_and_values_that_cannot_be_encoded_are_refused() -> None:
    block = matrices(2, 30, 16)
    for rank in (17, 0):
        with pytest.raises(InvalidArgumentError):
            encode(block, rank)
    with pytest.raises(InvalidArgumentError):
        encode(block[:, :3], 4)
    for bad in (float("nan"), float("inf")):
        spoilt = block.clone()
        spoilt[1, 3, 2] = bad
        with pytest.raises(InvalidArgumentError, match="finite"):
            encode(spoilt, 4)


def test_the_seed_is_fixed_in_the_module() -> None:
    # Sealing must not draw from the stream that sampling draws from.
    assert isinstance(rank_codec._SEED, int)
