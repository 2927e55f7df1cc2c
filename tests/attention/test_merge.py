"""Partial softmax results: merging is the softmax over everything, in any order and grouping."""

from collections.abc import Callable
from functools import reduce
from itertools import permutations

import pytest
import torch

from unsloth_spectral.attention.merge import Partial, exponentiate

ROWS, HEAD_DIM = 6, 5


def partial(scores: torch.Tensor, values: torch.Tensor) -> Partial:
    weights, maximum, total = exponentiate(scores)
    return Partial(weights @ values, maximum, total)


def pieces(sizes: tuple[int, ...], spread: float = 1.0, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(2, ROWS, n, generator=generator) * spread, torch.randn(2, n, HEAD_DIM, generator=generator))
        for n in sizes
    ]


def softmax(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    scores = torch.cat([scores for scores, _ in parts], -1).double()
    return scores.softmax(-1) @ torch.cat([values for _, values in parts], -2).double()


@pytest.mark.parametrize("sizes", [(1,), (63,), (1, 1), (500, 1), (3, 40, 1, 7)])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_merging_gives_the_softmax_over_all(
    sizes: tuple[int, ...], spread: float, assert_close: Callable[..., None]
) -> None:
    parts = pieces(sizes, spread)
    merged = reduce(Partial.merge, [partial(*part) for part in parts])
    assert_close(merged.finish(), softmax(parts), 1e-5)


def test_any_order_and_any_grouping_agree(assert_close: Callable[..., None]) -> None:
    parts = pieces((5, 9, 2, 30), spread=5.0)
    partials = [partial(*part) for part in parts]
    expected = softmax(parts)
    for order in permutations(partials):
        assert_close(reduce(Partial.merge, order).finish(), expected, 1e-5)
    a, b, c, d = partials
    for merged in (a.merge(b).merge(c.merge(d)), a.merge(b.merge(c.merge(d))), a.merge(b.merge(c)).merge(d)):
        assert_close(merged.finish(), expected, 1e-5)
    for forward, backward in ((a.merge(b), b.merge(a)), (c.merge(d), d.merge(c))):
        assert torch.equal(forward.maximum, backward.maximum)
        assert torch.equal(forward.total, backward.total)
        assert torch.equal(forward.output, backward.output)


@pytest.mark.parametrize("level", [-1e4, -200.0, 0.0, 200.0, 1e4])
def test_an_empty_side_changes_nothing(level: float) -> None:
    scores, values = pieces((7,))[0]
    full = partial(scores + level, values)
    empty = partial(torch.full((2, ROWS, 4), -torch.inf), torch.randn(2, 4, HEAD_DIM))
    assert (empty.total == 0).all()
    for merged in (full.merge(empty), empty.merge(full)):
        assert torch.equal(merged.output, full.output)
        assert torch.equal(merged.total, full.total)
        assert torch.equal(merged.maximum, full.maximum)


def test_nothing_merged_with_nothing_is_zero() -> None:
    empty = partial(torch.full((2, ROWS, 4), -torch.inf), torch.ones(2, 4, HEAD_DIM))
    assert torch.equal(empty.finish(), torch.zeros(2, ROWS, HEAD_DIM))
    assert torch.equal(empty.merge(empty).finish(), torch.zeros(2, ROWS, HEAD_DIM))


def test_rows_are_independent(assert_close: Callable[..., None]) -> None:
    (scores, values), (other_scores, other_values) = pieces((7, 9))
    scores[:, 0] = -torch.inf
    other_scores[:, 1] = -torch.inf
    scores[:, 2], other_scores[:, 2] = -torch.inf, -torch.inf
    scores[:, 3, :6] = -torch.inf
    merged = partial(scores, values).merge(partial(other_scores, other_values)).finish()
    expected = softmax([(scores, values), (other_scores, other_values)])
    assert torch.equal(merged[:, 2], torch.zeros(2, HEAD_DIM))
    keep = [0, 1, 3, 4, 5]
    assert_close(merged[:, keep], expected[:, keep], 1e-5)
    assert_close(merged[:, 0], softmax([(other_scores, other_values)])[:, 0], 1e-5)


@pytest.mark.parametrize("gap", [1e4, 1e30])
def test_extreme_scores_stay_finite(gap: float, assert_close: Callable[..., None]) -> None:
    (scores, values), (other_scores, other_values) = pieces((7, 9))
    high, low = partial(scores + gap, values), partial(other_scores - gap, other_values)
    alone = high.finish()
    for merged in (high.merge(low), low.merge(high)):
        assert torch.isfinite(merged.output).all()
        assert (merged.total >= 1).all()
        assert torch.equal(merged.finish(), alone)


def test_equal_maxima_add_up() -> None:
    single = Partial(torch.ones(1, 1, 2), torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    both = single.merge(single)
    assert both.total.item() == 2
    assert torch.equal(both.finish(), torch.ones(1, 1, 2))


def test_exponentiate_is_the_definition() -> None:
    scores = torch.tensor([[0.0, 1.0, -torch.inf], [-torch.inf, -torch.inf, -torch.inf], [-1e4, -1e4, -1e4]])
    before = scores.clone()
    weights, maximum, total = exponentiate(scores)
    assert torch.equal(scores, before)
    assert maximum.flatten().tolist() == [1.0, 0.0, -1e4]
    torch.testing.assert_close(weights[0], torch.tensor([1.0, 0.0, 0.0]) + torch.tensor([-0.6321206, 1.0, 0.0]))
    assert weights[1].tolist() == [0, 0, 0]
    assert weights[2].tolist() == [1, 1, 1]
    assert torch.equal(total, weights.sum(-1, keepdim=True))


def test_nan_scores_are_not_hidden() -> None:
    scores, values = pieces((7,))[0]
    scores[0, 0, 3] = float("nan")
    merged = partial(*pieces((5,), seed=1)[0]).merge(partial(scores, values)).finish()
    assert merged[0, 0].isnan().all()
    assert torch.isfinite(merged[1]).all()
