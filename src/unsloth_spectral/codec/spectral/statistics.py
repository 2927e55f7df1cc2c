"""Statistics of a run of keys for the encoder: centred keys, mean, covariance and principal axes."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from unsloth_spectral.rope import Rotation, Spans, anchors_of, join_rotations, minus_rotated, unrotate, unrotated_sum


class Basis(NamedTuple):
    """Axes in order of falling variance.

    Attributes:
        vectors: ``[..., D, D]``, rows such that ``x = coefficients @ vectors``.
        variances: ``[..., D]``, the part of the scores' variance along each axis.
    """

    vectors: Tensor
    variances: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class KeyStatistics:
    """A run of keys, prepared for encoding.

    Attributes:
        x: ``[B, H, n, D]`` float32, the keys minus their mean, padding zero.
        mean: ``[B, H, D]`` float16, un-rotated.
        covariance: ``[B, H, D, D]``, of ``x``.
        metric: ``[B or 1, H, D, D]``, of the queries.
        rotation: the tokens' positions; None for a model without rotary embeddings.
        spans: of the anchors by which ``x`` is un-rotated, for each rotary pair.
        shares: ``[B]``, the share of each row's tokens that are not padding.
    """

    x: Tensor
    mean: Tensor
    covariance: Tensor
    metric: Tensor
    rotation: Rotation | None
    spans: Spans
    shares: Tensor

    @classmethod
    def of(
        cls,
        keys: Tensor,
        metric: Tensor,
        rotation: Rotation | None,
        spans: Spans,
        mean: Tensor | None = None,
        real: Tensor | None = None,
        before: Rotation | None = None,
    ) -> "KeyStatistics":
        """Statistics of ``keys [B, H, n, D]`` around ``mean [B, H, D]`` float16; None: their own mean.

        ``real [B, n]`` bool is False for padding; ``before`` has the positions of the tokens that came before in the
        first one's tile, if any.
        """
        x, mean = centre(keys, mean, rotation, spans, real, before)
        shares = torch.ones(len(x), dtype=x.dtype, device=x.device) if real is None else real.to(x.dtype).mean(1)
        return cls(x, mean, covariance(x), metric.to(x.device), rotation, spans, shares)

    @property
    def num_tokens(self) -> int:
        return self.x.shape[-2]

    @property
    def has_tokens(self) -> Tensor:
        """``[B]`` bool, False for rows that are padding alone."""
        return self.shares > 0

    def basis(self) -> Basis:
        """Principal axes under the metric."""
        return principal_basis(self.covariance, self.metric)

    def variances_in(self, rows: Tensor, inverse: Tensor) -> Tensor:
        """The part of the scores' variance along each of ``rows [H, D, D]``, ``[B, H, D]``, if components are coded one
        by one; ``inverse`` is that of the rows."""
        return self.coefficient_variances(inverse) * (rows @ self.metric @ rows.mT).diagonal(dim1=-2, dim2=-1)

    def coefficient_variances(self, inverse: Tensor) -> Tensor:
        """Variances ``[B, H, D]`` of the coefficients that ``inverse [H, D, D]`` gives."""
        return (inverse.mT @ self.covariance @ inverse).diagonal(dim1=-2, dim2=-1)

    def over_tokens(self, variances: Tensor) -> Tensor:
        """The mean of ``variances [B, H, D]`` over the tokens of all rows without padding, ``[H, D]``."""
        return variances.sum(0) / self.shares.sum().clamp_min(torch.finfo(self.shares.dtype).tiny)


def centre(
    keys: Tensor,
    mean: Tensor | None,
    rotation: Rotation | None,
    spans: Spans,
    real: Tensor | None,
    before: Rotation | None = None,
) -> tuple[Tensor, Tensor]:
    """``keys [B, H, n, D]`` minus their mean, un-rotated by their anchors, and that mean, ``[B, H, D]`` float16 (or the
    given one), un-rotated.

    ``real [B, n]`` bool is False for padding, which becomes zero; ``before`` as in ``KeyStatistics.of``.
    """
    x = keys.float()
    weight = None if real is None else real[:, None, :, None].to(x.dtype)
    if rotation is None:
        mean = _mean(x, weight).half() if mean is None else mean
        x = x - mean.float()[:, :, None]
    else:
        table = rotation.table()[:, None]
        mean = _mean(x, weight, table, rotation).half() if mean is None else mean
        x = minus_rotated(x, mean.float()[:, :, None], table, rotation)
        whole = rotation if before is None else join_rotations([before, rotation])
        x = unrotate(x, anchors_of(whole, spans)[:, None, -rotation.num_tokens :], rotation)
    return (x if weight is None else x * weight), mean


def _mean(x: Tensor, weight: Tensor | None, table: Tensor | None = None, rotation: Rotation | None = None) -> Tensor:
    """Mean over the tokens of ``x``, un-rotated if a ``rotation`` is given, under ``weight [B, 1, n, 1]``."""
    count = x.shape[-2] if weight is None else weight.sum(-2).clamp_min(1)
    x = x if weight is None else x * weight
    total = x.sum(-2) if table is None or rotation is None else unrotated_sum(x, table, rotation)
    return total / count


def covariance(x: Tensor) -> Tensor:
    """``E[x x^T]`` of ``x [..., tokens, D]``, centred, ``[..., D, D]``."""
    return x.mT @ x / x.shape[-2]


def principal_basis(covariance: Tensor, metric: Tensor) -> Basis:
    """Principal axes of vectors with ``covariance [..., D, D]``, under ``metric [..., D, D]``.

    With ``metric = L L^T`` they are the axes of ``L^T x``; they do not depend on the choice of the root ``L``.
    """
    tiny = torch.finfo(metric.dtype).tiny * torch.eye(metric.shape[-1], dtype=metric.dtype, device=metric.device)
    root = torch.linalg.cholesky_ex(metric + tiny).L
    variances, vectors = torch.linalg.eigh(root.mT @ covariance @ root)
    axes = torch.linalg.solve_triangular(root, vectors.flip(-1).mT, upper=False, left=False)
    return Basis(axes, variances.flip(-1).clamp_min(0))


def projection(vectors: Tensor, metric: Tensor) -> Tensor:
    """The matrix ``[..., D, C]`` that gives the coefficients of least error under ``metric`` in
    ``vectors [..., C, D]``.

    The vectors need not be orthogonal, so rounding them costs little. A row of zeros gets zeros.
    """
    weighted = vectors @ metric
    gram = weighted @ vectors.mT
    scale = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    empty = scale == 0
    scale = scale.masked_fill(empty, 1.0)
    normed = gram / scale[..., :, None] / scale[..., None, :]
    normed.diagonal(dim1=-2, dim2=-1).masked_fill_(empty, 1.0)
    # Rounded axes are nearly orthogonal under the metric, so this is close to the identity.
    factor = torch.linalg.cholesky_ex(normed).L
    return torch.cholesky_solve(weighted / scale[..., None], factor).mT / scale[..., None, :]
