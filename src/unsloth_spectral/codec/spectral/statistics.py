"""The basis keys are coded in: principal axes under the metric of the queries that will look at them."""

from typing import NamedTuple

import torch
from torch import Tensor

# Directions no sampled query looked at still get this share of the mean weight: later queries may look there.
_FLOOR = 1e-2
_SCARCITY = 1.0


class Basis(NamedTuple):
    """Axes in order of falling variance.

    Attributes:
        vectors: ``[..., D, D]``, rows such that ``x = coefficients @ vectors``.
        variances: ``[..., D]``, what each axis adds to the variance of the scores.
    """

    vectors: Tensor
    variances: Tensor


def query_metric(queries: Tensor, counts: Tensor | None = None, repeats: int = 1) -> Tensor:
    """``E[q q^T]`` of ``queries [..., n, D]``, with a floor on its diagonal, ``[..., D, D]`` float32.

    The fewer the queries, the higher the floor: fewer than ``D`` cannot even span the space. ``counts`` tells how many
    there are, 1 or more, where some are zeros that fill up; each is there ``repeats`` times.
    """
    head_dim, num_queries = queries.shape[-1], queries.shape[-2] // repeats
    if counts is None:
        counts = torch.tensor(num_queries, dtype=torch.float32, device=queries.device)
    # A float: a number divided by a tensor of integers is of the process's default dtype.
    counts = counts[..., None, None].float()
    metric = queries.mT @ queries / (counts * repeats)
    floor = metric.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(metric.dtype).tiny)
    eye = torch.eye(metric.shape[-1], dtype=metric.dtype, device=metric.device)
    return metric + (_FLOOR + _SCARCITY * (head_dim / counts) ** 2) * floor[..., None, None] * eye


def covariance(x: Tensor) -> Tensor:
    """``E[x x^T]`` of ``x [..., tokens, D]``, centred, ``[..., D, D]``."""
    return x.mT @ x / x.shape[-2]


def principal_basis(covariance: Tensor, metric: Tensor) -> Basis:
    """Principal axes of what has ``covariance [..., D, D]``, under ``metric [..., D, D]``.

    With ``metric = L L^T`` they are those of ``L^T x``: which root is taken makes no difference to the axes.
    """
    tiny = torch.finfo(metric.dtype).tiny * torch.eye(metric.shape[-1], dtype=metric.dtype, device=metric.device)
    root = torch.linalg.cholesky_ex(metric + tiny).L
    variances, vectors = torch.linalg.eigh(root.mT @ covariance @ root)
    axes = torch.linalg.solve_triangular(root, vectors.flip(-1).mT, upper=False, left=False)
    return Basis(axes, variances.flip(-1).clamp_min(0))


def projection(vectors: Tensor, metric: Tensor) -> Tensor:
    """``[..., D, C]``: coefficients of least error under ``metric`` in the span of ``vectors [..., C, D]``.

    They need not be orthogonal, so what rounding did to them costs nothing but that. A row of zeros gets zeros.
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
