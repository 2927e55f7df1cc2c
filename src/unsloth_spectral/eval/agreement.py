"""Agreement of two caches, measured by their logits."""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from unsloth_spectral.errors import InvalidArgumentError

_ROWS = 32  # positions compared at a time: a row of logits is as wide as the vocabulary


@dataclass(frozen=True, slots=True)
class Agreement:
    """Teacher-forced agreement with the dense cache, over all positions.

    Attributes:
        kl: mean Kullback-Leibler divergence from the dense cache's distribution, in nats.
        top1_agreement: share of positions where both prefer the same token.
        perplexity: of the true next tokens.
        perplexity_change: ``perplexity`` minus the dense cache's.
    """

    kl: float
    top1_agreement: float
    perplexity: float
    perplexity_change: float

    def to_dict(self) -> dict[str, float]:
        """Plain numbers, ready for JSON."""
        return asdict(self)


def compare_logits(dense_logits: Tensor, logits: Tensor, targets: Tensor) -> Agreement:
    """Compare two sets of logits ``[positions, vocabulary]`` against each other and ``targets [positions]``.

    Raises:
        InvalidArgumentError: the shapes do not fit, or there is no position.
    """
    if dense_logits.shape != logits.shape or logits.ndim != 2 or targets.shape != logits.shape[:1] or not len(targets):
        raise InvalidArgumentError(
            "logits must both be [positions, vocabulary] and targets [positions], with at least one position; got "
            f"{tuple(dense_logits.shape)}, {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    divergence, agreed, dense_loss, loss = 0.0, 0, 0.0, 0.0
    for dense_rows, rows, target in zip(
        dense_logits.split(_ROWS), logits.split(_ROWS), targets.split(_ROWS), strict=True
    ):
        expected, actual = dense_rows.double().log_softmax(-1), rows.double().log_softmax(-1)
        # A token to which the dense cache gives probability 0 adds nothing to the divergence.
        terms = torch.where(expected == -math.inf, 0.0, expected.exp() * (expected - actual))
        divergence += terms.sum().item()
        agreed += int((expected.argmax(-1) == actual.argmax(-1)).sum())
        dense_loss -= expected.gather(-1, target[:, None]).sum().item()
        loss -= actual.gather(-1, target[:, None]).sum().item()
    count = len(targets)
    perplexity, dense_perplexity = math.exp(loss / count), math.exp(dense_loss / count)
    return Agreement(divergence / count, agreed / count, perplexity, perplexity - dense_perplexity)
