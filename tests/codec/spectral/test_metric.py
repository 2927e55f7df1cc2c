"""The metric of the queries: their second moments, with a floor for directions that they do not weight."""

import pytest
import torch

from unsloth_spectral.codec.spectral import metric as module
from unsloth_spectral.codec.spectral.metric import query_metric
from unsloth_spectral.codec.spectral.statistics import covariance, principal_basis

BATCH, HEADS = 2, 3


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def floor_of(metric: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """What ``metric`` adds to the plain mean, which must be a multiple of the identity, over the mean weight."""
    plain = queries.mT @ queries / queries.shape[-2]
    added = metric - plain
    floor = added.diagonal(dim1=-2, dim2=-1).mean(-1)
    assert torch.allclose(added, floor[..., None, None] * torch.eye(metric.shape[-1]), atol=1e-5)
    assert torch.equal(metric, metric.mT)
    return floor / plain.diagonal(dim1=-2, dim2=-1).mean(-1)


def test_query_metric() -> None:
    floors = []
    for count in (4, 12, 50, 5000):
        queries = random(BATCH, HEADS, count, 12)
        floor = floor_of(query_metric(queries), queries)
        assert torch.allclose(floor, floor.mean().expand_as(floor), rtol=1e-2)
        floors.append(float(floor.mean()))
    # The floor is high for few queries and nearly zero for many.
    assert floors == sorted(floors, reverse=True)
    assert floors[0] > 0.1
    assert floors[-1] == pytest.approx(module._FLOOR, rel=0.1)


def test_a_head_alone_has_the_metric_that_it_has_among_others() -> None:
    queries = random(BATCH, HEADS, 6, 12)
    metric = query_metric(queries)
    for row in range(BATCH):
        for head in range(HEADS):
            assert torch.allclose(query_metric(queries[row, head]), metric[row, head], atol=1e-6)


def test_the_floor_holds_up_directions_no_query_looked_at() -> None:
    queries = torch.zeros(1, 1, 4000, 8)
    queries[..., 0] = random(1, 1, 4000)
    weights = torch.linalg.eigvalsh(query_metric(queries)[0, 0])
    expected = module._FLOOR * float(queries[..., 0].square().mean()) / 8
    assert float(weights[0]) == pytest.approx(expected, rel=2e-2)
    nothing = query_metric(torch.zeros(1, 1, 4, 8))
    assert nothing.isfinite().all()
    assert principal_basis(covariance(random(1, 1, 20, 8)), nothing).vectors.isfinite().all()
