"""Softmax over a sequence that arrives in pieces: partial results that merge by log-sum-exp."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Partial:
    """Attention over some of the tokens, before division by the softmax's denominator.

    Attributes:
        output: ``[..., rows, head_dim]``, values summed under ``exp(score - maximum)``.
        maximum: ``[..., rows, 1]``, the largest score; 0 where every token is masked.
        total: ``[..., rows, 1]``, the sum of ``exp(score - maximum)``; 0 where every token is masked.
    """

    output: Tensor
    maximum: Tensor
    total: Tensor

    def merge(self, other: "Partial") -> "Partial":
        """The partial result over the tokens of both."""
        # The maximum of a side without tokens is a placeholder: it must not push the other side's weights to zero.
        maximum = torch.where(
            self.total == 0,
            other.maximum,
            torch.where(other.total == 0, self.maximum, torch.maximum(self.maximum, other.maximum)),
        )
        # An empty side has total 0 and output 0; clamping keeps exp from making 0 * inf there.
        self_weight = (self.maximum - maximum).clamp_max(0).exp()
        other_weight = (other.maximum - maximum).clamp_max(0).exp()
        return Partial(
            self.output * self_weight + other.output * other_weight,
            maximum,
            self.total * self_weight + other.total * other_weight,
        )

    def finish(self) -> Tensor:
        """The attention output; zeros for a row that may attend to nothing, as in torch's SDPA."""
        return self.output / self.total.clamp_min(torch.finfo(self.total.dtype).tiny)


def exponentiate(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights ``exp(score - maximum)``, the maximum and the sum of the weights, over the last dimension.

    Masked scores are ``-inf`` and get weight 0, also in a row that is masked throughout.
    """
    maximum = scores.amax(-1, keepdim=True)
    maximum = maximum.masked_fill(maximum == -torch.inf, 0.0)
    weights = (scores - maximum).exp_()
    return weights, maximum, weights.sum(-1, keepdim=True)
