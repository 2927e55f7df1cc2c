"""The basis under a metric: exact, decorrelated, and least-squares coefficients against a plain solve."""

from collections.abc import Callable

import pytest
import torch

from unsloth_spectral.codec.spectral.metric import query_metric
from unsloth_spectral.codec.spectral.statistics import covariance, principal_basis, projection

BATCH, HEADS, TOKENS = 2, 3, 200
head_dims = pytest.mark.parametrize("head_dim", [16, 60, 80])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def keys_and_metric(head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated keys, and the metric of correlated queries."""
    mix = random(BATCH, HEADS, head_dim, head_dim, seed=1) / head_dim**0.5
    x = random(BATCH, HEADS, TOKENS, head_dim) * torch.logspace(0, -2, head_dim) @ mix
    queries = random(BATCH, HEADS, 300, head_dim, seed=2) * torch.logspace(-1, 1, head_dim)
    return x, query_metric(queries)


@head_dims
def test_coefficients_times_vectors_are_the_keys(head_dim: int, assert_close: Callable[..., None]) -> None:
    x, metric = keys_and_metric(head_dim)
    basis = principal_basis(covariance(x), metric)
    coefficients = x @ torch.linalg.inv(basis.vectors.double()).float()
    assert_close(coefficients @ basis.vectors, x, 1e-4)
    # The projection onto all axes is the same thing.
    assert_close(x @ projection(basis.vectors, metric) @ basis.vectors, x, 1e-3)


@head_dims
def test_axes_are_decorrelated_and_orthonormal_under_the_metric(
    head_dim: int, assert_close: Callable[..., None]
) -> None:
    x, metric = keys_and_metric(head_dim)
    basis = principal_basis(covariance(x), metric)
    assert_close(basis.vectors @ metric @ basis.vectors.mT, torch.eye(head_dim).expand_as(metric), 5e-3)
    coefficients = (x.double() @ torch.linalg.inv(basis.vectors.double())).float()
    assert_close(coefficients.mT @ coefficients / TOKENS, torch.diag_embed(basis.variances), 5e-3)
    assert (basis.variances.diff(dim=-1) <= 0).all()
    assert (basis.variances >= 0).all()
    # Together they are the variance of the scores.
    assert_close(basis.variances.sum(-1), ((x @ metric) * x).sum((-2, -1)) / TOKENS, 1e-4)


def test_no_other_axes_hold_more(assert_close: Callable[..., None]) -> None:
    x, metric = keys_and_metric(16)
    basis = principal_basis(covariance(x), metric)
    for count in (1, 4, 9):
        leading = basis.vectors[..., :count, :]
        error = x - x @ projection(leading, metric) @ leading
        lost = ((error @ metric) * error).sum((-2, -1)) / TOKENS
        assert_close(lost, basis.variances[..., count:].sum(-1), 1e-2)
        others = random(BATCH, HEADS, count, 16, seed=count)
        worse = x - x @ projection(others, metric) @ others
        assert (((worse @ metric) * worse).sum((-2, -1)) / TOKENS > lost).all()


@pytest.mark.parametrize("count", [1, 5, 16])
def test_projection_is_the_plain_least_squares_solution(count: int, assert_close: Callable[..., None]) -> None:
    x, metric = keys_and_metric(16)
    vectors = random(BATCH, HEADS, count, 16, seed=3) * torch.logspace(0, -3, count)[:, None]
    coefficients = x @ projection(vectors, metric)
    root = torch.linalg.cholesky(metric.double())
    plain = torch.linalg.lstsq(root.mT @ vectors.double().mT, root.mT @ x.double().mT).solution.mT
    assert_close(coefficients * vectors.norm(dim=-1)[..., None, :], plain * vectors.norm(dim=-1)[..., None, :], 5e-3)
    # No change of the coefficients lowers the error: it is orthogonal to the span under the metric.
    error = x - coefficients @ vectors
    across = error @ metric @ vectors.mT / vectors.norm(dim=-1)[..., None, :]
    assert across.abs().max() < 1e-3 * (x @ metric).abs().max()


def test_rows_of_zeros_get_zeros_and_change_nothing(assert_close: Callable[..., None]) -> None:
    x, metric = keys_and_metric(16)
    vectors = random(BATCH, HEADS, 6, 16, seed=3)
    padded = torch.zeros(BATCH, HEADS, 9, 16)
    padded[..., [0, 2, 3, 5, 6, 8], :] = vectors
    coefficients = x @ projection(padded, metric)
    assert not coefficients[..., [1, 4, 7]].any()
    assert_close(coefficients[..., [0, 2, 3, 5, 6, 8]], x @ projection(vectors, metric), 1e-4)
    assert not projection(torch.zeros(1, 1, 3, 16), metric[:1, :1]).any()


def test_one_metric_for_all_rows(assert_close: Callable[..., None]) -> None:
    x, metric = keys_and_metric(16)
    first_metric = metric[:1]
    vectors = random(BATCH, HEADS, 6, 16, seed=3)
    assert_close(projection(vectors, first_metric), projection(vectors, first_metric.expand(BATCH, -1, -1, -1)), 1e-5)
    assert principal_basis(covariance(x), first_metric).vectors.shape == (BATCH, HEADS, 16, 16)
