"""Agreement of logits, checked against numbers computed in another way."""

import math

import pytest
import torch

from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.eval.agreement import compare_logits


def logits(positions: int, vocabulary: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randn(positions, vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("positions", [1, 31, 32, 33, 100])
def test_against_torch(positions: int) -> None:
    dense, other = logits(positions), logits(positions, seed=1)
    targets = torch.arange(positions) % 50
    agreement = compare_logits(dense, other, targets)
    expected_kl = torch.nn.functional.kl_div(
        other.double().log_softmax(-1), dense.double().log_softmax(-1), log_target=True, reduction="batchmean"
    )
    loss = torch.nn.functional.cross_entropy(other.double(), targets)
    dense_loss = torch.nn.functional.cross_entropy(dense.double(), targets)
    assert agreement.kl == pytest.approx(expected_kl.item())
    assert agreement.top1_agreement == pytest.approx((dense.argmax(-1) == other.argmax(-1)).double().mean().item())
    assert agreement.perplexity == pytest.approx(loss.exp().item())
    assert agreement.perplexity_change == pytest.approx(loss.exp().item() - dense_loss.exp().item())
    assert agreement.to_dict()["kl"] == agreement.kl


def test_a_cache_agrees_with_itself() -> None:
    agreement = compare_logits(logits(40), logits(40), torch.zeros(40, dtype=torch.long))
    assert (agreement.kl, agreement.top1_agreement, agreement.perplexity_change) == (0.0, 1.0, 0.0)


def test_by_hand() -> None:
    dense = torch.tensor([[math.log(0.5), math.log(0.5)]])
    other = torch.tensor([[math.log(0.25), math.log(0.75)]])
    agreement = compare_logits(dense, other, torch.tensor([0]))
    assert agreement.kl == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75))
    assert agreement.perplexity == pytest.approx(4)
    assert agreement.perplexity_change == pytest.approx(2)


def test_a_forbidden_token_adds_nothing() -> None:
    dense = torch.tensor([[0.0, 0.0, -math.inf]])
    assert compare_logits(dense, dense.clone(), torch.tensor([0])).kl == 0.0


def test_half_precision_is_compared_in_float64() -> None:
    dense = logits(8)
    same = compare_logits(dense.bfloat16(), dense.bfloat16(), torch.zeros(8, dtype=torch.long))
    assert same.kl == 0.0


@pytest.mark.parametrize(
    ("first", "second", "third"),
    [((4, 5), (4, 6), (4,)), ((4, 5), (4, 5), (3,)), ((0, 5), (0, 5), (0,)), ((4,), (4,), (4,))],
)
def test_shapes_that_do_not_fit(first: tuple[int, ...], second: tuple[int, ...], third: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"\[positions, vocabulary\]"):
        compare_logits(torch.zeros(first), torch.zeros(second), torch.zeros(third, dtype=torch.long))
