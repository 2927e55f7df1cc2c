"""The truncated SVDs against torch.linalg.svd, their fallbacks and errors, and the error bound against observation."""

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.rsvd import SVDResult, batched_gram_svd, batched_randomized_svd, svd_error_bound

Solver = Callable[..., SVDResult]
SOLVERS = pytest.mark.parametrize("solve", [batched_randomized_svd, batched_gram_svd])
# Of the compute dtype, and of rounding the factors to the returned one.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_spectrum(singular_values: Tensor, m: int, n: int, batch: tuple[int, ...] = (), seed: int = 0) -> Tensor:
    """Float64 matrices with these singular values and random singular vectors."""
    generator = seeded(seed)
    r = len(singular_values)
    left = torch.linalg.qr(torch.randn(*batch, m, r, dtype=torch.float64, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(*batch, n, r, dtype=torch.float64, generator=generator)).Q
    return (left * singular_values.double()) @ right.mT


def decay(count: int, power: float = 0.8) -> Tensor:
    return torch.arange(1, count + 1, dtype=torch.float64) ** -power


def dense(factors: SVDResult) -> Tensor:
    U, S, Vh = (factor.double() for factor in factors)
    return (U * S[..., None, :]) @ Vh


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def assert_orthonormal(factors: SVDResult, tolerance: float) -> None:
    U, S, Vh = (factor.double() for factor in factors)
    eye = torch.eye(S.shape[-1], dtype=torch.float64)
    for gram in (U.mT @ U, Vh @ Vh.mT):
        error = float((gram - eye).abs().max())
        assert error <= tolerance, f"off orthonormal by {error:.2e}"
    assert bool((S >= 0).all())
    assert bool((S.diff(dim=-1) <= 0).all())


def optimal_error(singular_values: Tensor, k: int) -> float:
    return float(singular_values[k:].square().sum().sqrt())


# --- shapes and dtypes


@SOLVERS
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 7), (7, 1), (500, 63), (63, 500), (60, 80), (64, 64)])
def test_a_matrix_of_rank_k_is_recovered(solve: Solver, batch: tuple[int, ...], m: int, n: int) -> None:
    k = min(5, m, n)
    M = with_spectrum(decay(k), m, n, batch).float()
    factors = solve(M, k)
    U, S, Vh = factors
    assert (U.shape, S.shape, Vh.shape) == ((*batch, m, k), (*batch, k), (*batch, k, n))
    assert_orthonormal(factors, 5e-6)
    assert relative_difference(dense(factors), M) < 5e-6
    assert relative_difference(S, decay(k).expand_as(S)) < 5e-6


@SOLVERS
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("m", "n"), [(90, 40), (40, 90)])
def test_every_dtype_comes_back_at_its_own_accuracy(solve: Solver, dtype: torch.dtype, m: int, n: int) -> None:
    M = with_spectrum(decay(6), m, n, (2,)).to(dtype)
    factors = solve(M, 6)
    assert {factor.dtype for factor in factors} == {dtype}
    assert_orthonormal(factors, TOLERANCE[dtype])
    assert relative_difference(dense(factors), M) < TOLERANCE[dtype]
    exact = torch.linalg.svdvals(M.double())[..., :6]
    assert relative_difference(factors.S, exact) < TOLERANCE[dtype]


@SOLVERS
@pytest.mark.parametrize("batch", [(0,), (2, 0)])
def test_an_empty_batch_gives_empty_factors(solve: Solver, batch: tuple[int, ...]) -> None:
    U, S, Vh = factors = solve(torch.empty(*batch, 9, 7, dtype=torch.float16), 3)
    assert (U.shape, S.shape, Vh.shape) == ((*batch, 9, 3), (*batch, 3), (*batch, 3, 7))
    assert {factor.dtype for factor in factors} == {torch.float16}
    assert factors.num_fallbacks == 0


@SOLVERS
def test_any_strides_are_read_and_the_input_is_left_alone(solve: Solver) -> None:
    stored = with_spectrum(decay(4), 4 * 50, 30).float().reshape(4, 50, 30)
    M = stored.movedim(0, 1)[..., ::2]  # [50, 4, 15]
    before = M.clone()
    strided, packed = solve(M, 3), solve(M.contiguous(), 3)
    assert relative_difference(dense(strided), dense(packed)) < 5e-6
    assert torch.equal(M, before)
    expanded = solve(stored[:1].expand(3, -1, -1), 3)
    assert relative_difference(dense(expanded)[2], dense(solve(stored[0], 3))) < 2e-2


@SOLVERS
def test_autocast_does_not_lower_the_accuracy(solve: Solver) -> None:
    M = with_spectrum(decay(5), 60, 40, (2,)).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        factors = solve(M, 5)
    assert {factor.dtype for factor in factors} == {torch.float32}
    assert relative_difference(dense(factors), M) < 5e-6


@SOLVERS
def test_no_gradient_flows_through(solve: Solver) -> None:
    M = with_spectrum(decay(5), 60, 40).float()
    assert not any(factor.requires_grad for factor in solve(M.requires_grad_(), 5))


def test_the_result_carries_its_fallbacks_beside_three_factors() -> None:
    factors = batched_randomized_svd(with_spectrum(decay(30), 50, 30, (2,)), 3)
    U, S, Vh = factors
    assert factors.U is U
    assert factors.S is S
    assert factors.Vh is Vh
    assert (factors.num_fallbacks, factors.fallback_reason) == (0, None)


# --- accuracy of the randomized SVD


def test_slow_decay_is_within_half_a_percent_of_the_optimum() -> None:
    spectrum = decay(128)
    M = with_spectrum(spectrum, 512, 128, (8,)).float()
    for seed in range(3):
        factors = batched_randomized_svd(M, 16, generator=seeded(seed))
        error = torch.linalg.matrix_norm(M.double() - dense(factors))
        assert 1 - 1e-6 <= float(error.mean()) / optimal_error(spectrum, 16) < 1.005
        assert_orthonormal(factors, 5e-6)
        assert factors.num_fallbacks == 0


@pytest.mark.parametrize("k", [16, 32])
def test_numerical_rank_k_is_exact_to_float32(k: int) -> None:
    M = with_spectrum(decay(k), 512, 128, (4,)).float()
    factors = batched_randomized_svd(M, k)
    assert relative_difference(dense(factors), M) < 1e-5
    assert float((factors.S / decay(k) - 1).abs().max()) < 1e-4
    assert_orthonormal(factors, 5e-6)
    assert factors.num_fallbacks == 0


@pytest.mark.parametrize(("digits", "tolerance"), [(3, 1e-4), (4, 1e-3), (5, 5e-3)])
def test_small_singular_values_survive_float32(digits: int, tolerance: float) -> None:
    # Squaring the condition number anywhere in float32 would lose all values below 3e-4 of the first.
    spectrum = torch.logspace(0, -3 * digits, 3 * 16, dtype=torch.float64)  # the sixteenth is 10^-digits, about
    M = with_spectrum(spectrum, 300, 100, (3,)).float()
    factors = batched_randomized_svd(M, 16)
    assert 0.5 < float(spectrum[15]) * 10**digits < 2
    errors = (factors.S.double() / spectrum[:16] - 1).abs()
    assert float(errors.max()) < tolerance
    assert float(errors[:, :4].max()) < 1e-6
    assert_orthonormal(factors, 5e-6)
    assert relative_difference(dense(factors), M) < 1e-6 + 1.02 * optimal_error(spectrum, 16) / float(spectrum.norm())


def test_a_spectrum_down_to_float32_rounding_keeps_its_leading_values() -> None:
    spectrum = torch.logspace(0, -5, 80, dtype=torch.float64)
    factors = batched_randomized_svd(with_spectrum(spectrum, 200, 80, (3,)).float(), 40)
    assert float((factors.S.double() / spectrum[:40] - 1).abs()[:, :30].max()) < 1e-4
    assert_orthonormal(factors, 5e-6)


def test_float64_reaches_float64_accuracy() -> None:
    spectrum = 10.0 ** -torch.arange(30, dtype=torch.float64)
    M = with_spectrum(spectrum, 100, 30, (2,))
    factors = batched_randomized_svd(M, 8)
    assert float((factors.S / spectrum[:8] - 1).abs().max()) < 1e-8
    assert float(torch.linalg.matrix_norm(M - dense(factors), 2).max()) < 1.0001 * float(spectrum[8])
    assert_orthonormal(factors, 1e-12)
    assert factors.num_fallbacks == 0


def test_power_iterations_and_oversampling_lower_the_error() -> None:
    M = with_spectrum(decay(64, 0.5), 200, 64, (8,)).float()

    def error(**options: int) -> float:
        return relative_difference(dense(batched_randomized_svd(M, 33, generator=seeded(), **options)), M)

    by_iterations = [error(n_iter=q, oversampling=2) for q in range(4)]
    by_oversampling = [error(n_iter=0, oversampling=p) for p in (0, 5, 10, 20)]
    assert by_iterations == sorted(by_iterations, reverse=True)
    assert by_oversampling == sorted(by_oversampling, reverse=True)
    assert by_iterations[0] > 1.02 * by_iterations[2]
    assert by_oversampling[0] > 1.02 * by_oversampling[3]


@pytest.mark.parametrize("scale", [1e35, 1e26, 1e-26, 1e-35, 1e-42])
@SOLVERS
def test_extreme_scales_neither_overflow_nor_vanish(
    solve: Solver, scale: float, caplog: pytest.LogCaptureFixture
) -> None:
    M = (with_spectrum(decay(5), 60, 40, (2,)) * scale).float()
    factors = solve(M, 5)
    if solve is batched_randomized_svd:
        assert factors.num_fallbacks == (0 if 1e-28 < scale < 1e28 else 2)
        assert not caplog.records
    tolerance = 5e-6 if scale > 1e-38 else 5e-2  # subnormal entries have few digits themselves
    assert relative_difference(dense(factors) / scale, M.double() / scale) < tolerance
    assert_orthonormal(factors, 5e-6)


# --- degenerate matrices


def degenerate() -> dict[str, Tensor]:
    one_entry = torch.zeros(50, 40)
    one_entry[17, 5] = 3.0
    two_blocks = torch.zeros(50, 40)
    two_blocks[:3, :2] = 1.0
    two_blocks[40:, 20:30] = 2.0
    row = torch.randn(40, generator=seeded())
    return {
        "one entry": one_entry,
        "rank 1": torch.outer(torch.arange(1.0, 51), row),
        "repeated rows": row.expand(50, 40),
        "two rows in turn": torch.stack([row, row.flip(0)]).repeat(25, 1),
        "rank 2, sparse": two_blocks,
        "zero columns": torch.cat([torch.randn(50, 5, generator=seeded()), torch.zeros(50, 35)], 1),
        "diagonal": torch.eye(50, 40),
    }


@SOLVERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 8])
@pytest.mark.parametrize("name", degenerate())
def test_rank_deficient_matrices_give_orthonormal_factors(solve: Solver, dtype: torch.dtype, k: int, name: str) -> None:
    M = degenerate()[name].to(dtype)
    expected = torch.linalg.svdvals(M.double())[:k]
    randomized_float32 = solve is batched_randomized_svd and dtype == torch.float32
    # Rounding decides whether such a matrix passes for a regular one, and the test matrix decides the rounding.
    for _ in range(20 if randomized_float32 else 1):
        for matrix in (M, M.mT):
            factors = solve(matrix, k)
            assert float((factors.S.double() - expected).abs().max()) < 5e-6 * float(expected[0])
            assert_orthonormal(factors, 5e-6)


@SOLVERS
def test_a_degenerate_matrix_leaves_its_neighbours_alone(solve: Solver, caplog: pytest.LogCaptureFixture) -> None:
    healthy = with_spectrum(decay(40), 50, 40, (2,)).float()
    M = torch.stack([healthy[0], torch.zeros(50, 40), degenerate()["one entry"], healthy[1]])
    options: dict[str, Any] = {"n_iter": 6} if solve is batched_randomized_svd else {}
    factors = solve(M, 6, **options)
    assert relative_difference(factors.S[[0, 3]], decay(6).expand(2, 6)) < 1e-3
    assert float(factors.S[1].abs().max()) == 0
    assert_orthonormal(factors, 5e-6)
    # A planned fallback is no news.
    assert not caplog.records


# --- fallbacks of the randomized SVD


def test_too_few_dimensions_left_means_exact_for_all() -> None:
    M = with_spectrum(decay(20, 0.1), 40, 20, (3,)).float()
    randomized = batched_randomized_svd(M, 14)
    exact = batched_randomized_svd(M, 15)
    assert (randomized.num_fallbacks, randomized.fallback_reason) == (0, None)
    assert exact.num_fallbacks == 3
    assert "k + oversampling, 20, is not below min(m, n), 20" in str(exact.fallback_reason)
    assert relative_difference(exact.S, decay(20, 0.1)[:15].expand(3, 15)) < 1e-6


def test_zero_matrices_are_recorded_and_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    M = torch.randn(4, 50, 40, generator=seeded())
    M[1] = 0
    M[3] = 0
    factors = batched_randomized_svd(M, 5)
    assert factors.num_fallbacks == 2
    assert "2 are zero" in str(factors.fallback_reason)
    assert factors.S[[1, 3]].abs().max() == 0
    assert factors.S[[0, 2]].min() > 1
    assert_orthonormal(factors, 5e-6)
    assert not caplog.records


@pytest.mark.parametrize("transposed", [False, True])
def test_a_failed_cholesky_redoes_that_matrix_only(
    transposed: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spectrum = decay(40, 0.3)
    M = with_spectrum(spectrum, 60, 40, (4,)).float()
    M = M.mT if transposed else M
    healthy = batched_randomized_svd(M, 6, n_iter=1, generator=seeded())
    cholesky, svd, exact_shapes = torch.linalg.cholesky_ex, torch.linalg.svd, []

    def failing(matrix: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        L, info = cholesky(matrix, **options)
        L, info = L.clone(), info.clone()
        L[2], info[2] = float("nan"), 3
        return L, info

    def counting(matrix: Tensor, **options: Any) -> Any:
        exact_shapes.append(tuple(matrix.shape))
        return svd(matrix, **options)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing)
    monkeypatch.setattr(torch.linalg, "svd", counting)
    with caplog.at_level(logging.WARNING, logger="unsloth_spectral"):
        factors = batched_randomized_svd(M, 6, n_iter=1, generator=seeded())
    assert factors.num_fallbacks == 1
    assert "1 failed to factorize by Cholesky" in str(factors.fallback_reason)
    assert [(record.name, record.levelname) for record in caplog.records] == [("unsloth_spectral", "WARNING")]
    assert "1 failed to factorize by Cholesky" in caplog.text
    assert exact_shapes == [(1, 60, 40)]
    assert relative_difference(factors.S[2], spectrum[:6]) < 1e-6
    assert relative_difference(healthy.S[2], spectrum[:6]) > 1e-4  # so the exact values do come from the fallback
    assert_orthonormal(factors, 5e-6)
    for redone, before in zip(factors, healthy, strict=True):
        assert relative_difference(redone[[0, 1, 3]], before[[0, 1, 3]]) < 1e-5


def test_steep_spectra_need_no_fallback() -> None:
    flat, steep = with_spectrum(decay(40), 60, 40).float(), with_spectrum(10.0 ** -torch.arange(40), 60, 40).float()
    factors = batched_randomized_svd(torch.stack([flat, steep]), 8, n_iter=4)
    assert factors.num_fallbacks == 0
    assert relative_difference(factors.S[0], decay(8)) < 1e-2
    assert float((factors.S[1, :4] * 10.0 ** torch.arange(4) - 1).abs().max()) < 1e-3
    assert_orthonormal(factors, 5e-6)


# --- randomness


def test_a_generator_reproduces_and_leaves_the_global_one_alone() -> None:
    M = with_spectrum(decay(64, 0.3), 100, 64, (2,)).float()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = batched_randomized_svd(M, 20, generator=seeded(5))
    second = batched_randomized_svd(M, 20, generator=seeded(5))
    other = batched_randomized_svd(M, 20, generator=seeded(6))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert 1e-6 < relative_difference(other.S, first.S) < 1e-1
    default = batched_randomized_svd(M, 20)
    assert not torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(batched_randomized_svd(M, 20).S, default.S)


def test_a_result_does_not_depend_on_the_rest_of_the_batch() -> None:
    M = with_spectrum(decay(64), 100, 64, (5,)).float()
    together, alone = (batched_randomized_svd(x, 8, generator=seeded()) for x in (M, M[3:4]))
    assert relative_difference(together.S[3], alone.S[0]) < 1e-6


# --- the Gram route


@pytest.mark.parametrize(("m", "n"), [(500, 63), (63, 500), (60, 80), (40, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_equals_the_exact_svd(m: int, n: int, dtype: torch.dtype) -> None:
    M = torch.randn(2, m, n, generator=seeded(), dtype=dtype)
    factors = batched_gram_svd(M)
    exact = torch.linalg.svdvals(M.double())
    assert factors.S.shape == (2, min(m, n))
    assert float((factors.S.double() / exact - 1)[:, : min(m, n) // 2].abs().max()) < TOLERANCE[dtype]
    assert relative_difference(dense(factors), M) < TOLERANCE[dtype]
    assert_orthonormal(factors, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("dtype", "digits", "tolerance", "num_exact"),
    [
        (torch.float32, 2, 1e-4, 0),  # the float32 Gram matrix resolves it
        (torch.float32, 5, 5e-3, 0),  # only the float64 one does
        (torch.float32, 9, None, 2),  # below the rounding of float32 itself
        (torch.float64, 5, 1e-9, 0),
        (torch.float64, 12, 1e-3, 2),
    ],
)
def test_gram_takes_the_precision_that_the_spectrum_needs(
    dtype: torch.dtype, digits: int, tolerance: float | None, num_exact: int
) -> None:
    spectrum = torch.logspace(0, -digits, 40, dtype=torch.float64)
    M = with_spectrum(spectrum, 90, 40, (2,)).to(dtype)
    factors = batched_gram_svd(M)
    assert_orthonormal(factors, TOLERANCE[dtype])
    assert relative_difference(dense(factors), M) < TOLERANCE[dtype]
    if tolerance is not None:
        assert float((factors.S.double() / spectrum - 1).abs().max()) < tolerance
    assert factors.num_fallbacks == num_exact
    assert (factors.fallback_reason is not None) == (num_exact > 0)


def test_gram_falls_back_for_single_matrices() -> None:
    spectra = (decay(20), 10.0 ** -torch.arange(20, dtype=torch.float64))
    M = torch.stack([with_spectrum(spectrum, 50, 20) for spectrum in spectra])
    factors = batched_gram_svd(M, 12)
    assert factors.num_fallbacks == 1
    assert "ill-conditioned" in str(factors.fallback_reason)
    for values, spectrum in zip(factors.S, spectra, strict=True):
        assert float((values / spectrum[:12] - 1).abs().max()) < 1e-4
    assert batched_gram_svd(M, 6).num_fallbacks == 0


# --- errors


GOOD = torch.ones(3, 8, 6)
BAD_MATRICES = {
    "M must be a torch.Tensor, got list: use torch.as_tensor": [[1.0]],
    "M must be real and floating, got torch.int64: convert it": GOOD.long(),
    "M must be real and floating, got torch.complex64": GOOD.to(torch.complex64),
    r"M must have 2 dimensions or more, got \(6,\)": GOOD[0, 0],
    r"M must have rows and columns, got \(3, 0, 6\): leave": GOOD[:, :0],
    r"M must have rows and columns, got \(3, 8, 0\): leave": GOOD[..., :0],
    "M must be finite, got 1 NaN or infinite entries: mask": torch.where(torch.arange(6) == 2, torch.nan, GOOD[0, :1]),
    "M must be finite, got 2 NaN": torch.tensor([[1.0, torch.inf], [-torch.inf, 2.0]]),
}


@SOLVERS
@pytest.mark.parametrize("message", BAD_MATRICES)
def test_a_bad_matrix_is_refused(solve: Solver, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        solve(BAD_MATRICES[message], 1)


@SOLVERS
@pytest.mark.parametrize(
    ("k", "message"),
    [
        (7, r"k must be at most min\(m, n\), here 6; got 7: lower it"),
        (0, "k must be at least 1, got 0: raise it"),
        (-1, "k must be at least 1, got -1"),
        (2.0, r"k must be an integer, got 2.0 \(float\)"),
        (True, r"k must be an integer, got True \(bool\)"),
        ("3", r"k must be an integer, got '3' \(str\)"),
    ],
)
def test_a_bad_rank_is_refused(solve: Solver, k: Any, message: str) -> None:
    for M in (GOOD, GOOD.mT):
        with pytest.raises(InvalidArgumentError, match=message):
            solve(M, k)


@pytest.mark.parametrize("name", ["n_iter", "oversampling"])
@pytest.mark.parametrize(
    ("value", "message"),
    [(-1, "must be at least 0, got -1: raise it"), (1.5, r"must be an integer, got 1.5 \(float\)")],
)
def test_bad_options_are_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{name} {message}"):
        batched_randomized_svd(GOOD, 2, **{name: value})


@SOLVERS
def test_finite_entries_whose_sum_overflows_are_no_error(solve: Solver) -> None:
    M = torch.full((20, 12), 2e37)
    assert not M.sum().isfinite()
    factors = solve(M, 1)
    assert float(factors.S[0]) == pytest.approx(2e37 * math.sqrt(240), rel=1e-5)


@SOLVERS
@pytest.mark.parametrize(
    ("dtype", "entry"), [(torch.float16, 6e4), (torch.bfloat16, 3e38), (torch.float32, 3e38), (torch.float64, 1e308)]
)
def test_singular_values_beyond_the_dtype_are_refused(solve: Solver, dtype: torch.dtype, entry: float) -> None:
    signs = torch.ones(40, 30)
    signs[::2] = -1  # so that the sum does not overflow
    with pytest.raises(InvalidArgumentError, match=rf"S must fit the dtype of M, {dtype}, .* use a wider dtype"):
        solve((signs.double() * entry).to(dtype), 2)


# --- the error bound


def naive_bound(S: list[float], k: int, p: int, q: int) -> float:
    """Corollary 10.10 as printed."""
    r = 2 * q + 1
    tail = sum(s ** (2 * r) for s in S[k:]) ** 0.5
    return ((1 + (k / (p - 1)) ** 0.5) * S[k] ** r + math.e * (k + p) ** 0.5 / p * tail) ** (1 / r)


@pytest.mark.parametrize(("k", "p", "q"), [(4, 3, 0), (4, 3, 1), (1, 2, 2), (10, 5, 3)])
def test_the_bound_is_the_printed_formula(k: int, p: int, q: int) -> None:
    S = torch.stack([decay(20), decay(20, 2.0), torch.ones(20, dtype=torch.float64)])
    bound = svd_error_bound(S, k, p, q)
    expected = torch.tensor([naive_bound(row.tolist(), k, p, q) for row in S], dtype=torch.float64)
    assert bound.shape == (3,)
    assert relative_difference(bound, expected) < 1e-12


def test_the_bound_by_hand() -> None:
    # Nine singular values of 1 beyond k = 4: without iterations (1 + sqrt 2) + e sqrt 7 / 3 * 3, theorem 10.6.
    S = torch.tensor([8.0, 4, 2, 2] + [1.0] * 9, dtype=torch.float64)
    by_hand = 1 + 2**0.5 + math.e * 7**0.5
    assert float(svd_error_bound(S, 4, 3, 0)) == pytest.approx(by_hand, rel=1e-12)
    assert float(svd_error_bound(S, 4, 3, 1)) == pytest.approx(by_hand ** (1 / 3), rel=1e-12)
    assert float(svd_error_bound(S, 4, 3, 2)) == pytest.approx(by_hand ** (1 / 5), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_bound_scales_without_overflow(scale: float) -> None:
    S = decay(40).float()
    for q in (0, 2, 50):
        scaled = svd_error_bound(S * scale, 8, 4, q) / scale
        assert relative_difference(scaled, svd_error_bound(S.double(), 8, 4, q)) < 1e-5
    assert float(svd_error_bound(torch.tensor([1.0, 0.0, 0.0]), 1, 2, 2)) == 0
    assert svd_error_bound(torch.tensor([1e-3, 1e-4, 1e-4], dtype=torch.float16), 1, 2, 2).dtype == torch.float16


@pytest.mark.parametrize("q", [0, 1, 2])
def test_the_bound_holds_on_average_and_is_not_vacuous(q: int) -> None:
    k, p, spectrum = 10, 6, decay(60)
    M = with_spectrum(spectrum, 90, 60)

    def projection_error(seed: int) -> float:
        # All k + p vectors kept: what is left is the projection alone, without the truncation.
        factors = batched_randomized_svd(M, k + p, n_iter=q, oversampling=0, generator=seeded(seed))
        return float(torch.linalg.matrix_norm(M - dense(factors), 2))

    observed = sum(projection_error(seed) for seed in range(20)) / 20
    bound = float(svd_error_bound(spectrum, k, p, q))
    assert observed < bound < 10 * observed
    # With the exponent of another number of iterations the figure would be far off.
    r = 2 * q + 1
    if q:
        assert (bound / float(spectrum[k])) ** (r / (q + 1)) * float(spectrum[k]) > 1.2 * bound
    truncated = batched_randomized_svd(M, k, n_iter=q, oversampling=p, generator=seeded())
    assert float(torch.linalg.matrix_norm(M - dense(truncated), 2)) < bound + float(spectrum[k])


@pytest.mark.parametrize(
    ("S", "k", "p", "q", "message"),
    [
        (decay(9), 0, 3, 1, "k must be at least 1, got 0"),
        (decay(9), 9, 3, 1, "k must be at most the number of singular values less one, here 8; got 9: lower it"),
        (decay(9), 2, 1, 1, "p must be at least 2, got 1"),
        (decay(9), 2, 3, -1, "q must be at least 0, got -1"),
        (decay(9), 2.5, 3, 1, "k must be an integer, got 2.5"),
        (decay(9).flip(0), 2, 3, 1, "S must be finite, non-negative and descending"),
        (-decay(9).flip(0), 2, 3, 1, "S must be finite, non-negative and descending"),
        (decay(9) * torch.inf, 2, 3, 1, "S must be finite, non-negative and descending"),
        (decay(9).long(), 2, 3, 1, "S must be real and floating, got torch.int64"),
        (torch.tensor(1.0), 2, 3, 1, r"S must have 1 dimensions or more, got \(\)"),
        ([3.0, 1.0], 1, 3, 1, "S must be a torch.Tensor, got list"),
    ],
)
def test_bad_arguments_of_the_bound_are_refused(S: Any, k: Any, p: int, q: int, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        svd_error_bound(S, k, p, q)


# --- any shape


@settings(max_examples=40, deadline=None)
@given(data=st.data(), m=st.integers(1, 32), n=st.integers(1, 32), batch=st.integers(1, 3), seed=st.integers(0, 999))
def test_any_shape_agrees_with_the_exact_svd(data: st.DataObject, m: int, n: int, batch: int, seed: int) -> None:
    k = data.draw(st.integers(1, min(m, n)), label="k")
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]), label="dtype")
    M = torch.randn(batch, m, n, generator=seeded(seed), dtype=dtype)
    exact = torch.linalg.svdvals(M.double())
    largest = float(exact.max())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    optimum = exact[:, k:].square().sum(-1).sqrt()

    gram = batched_gram_svd(M, k)
    assert_orthonormal(gram, 10 * tolerance)
    assert float((gram.S.double() - exact[:, :k]).abs().max()) < tolerance * largest

    # A random matrix is the hard case, its spectrum hardly decays; and many iterations settle what can be told apart.
    factors = batched_randomized_svd(M, k, n_iter=8, generator=seeded(seed))
    assert_orthonormal(factors, 10 * tolerance)
    assert bool((factors.S.double() < exact[:, :k] + tolerance * largest).all()), "a projection cannot raise them"
    error = torch.linalg.matrix_norm(M.double() - dense(factors))
    assert bool((error < 1.02 * optimum + tolerance * largest).all())
    assert bool((error > (1 - 1e-9) * optimum - tolerance * largest).all())
