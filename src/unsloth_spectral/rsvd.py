"""Truncated SVD of batches of small matrices: randomized, by Gram matrix, and a bound on the randomized error.

Source: Halko, Martinsson & Tropp, "Finding structure with randomness", SIAM Review 53(2), 2011 (HMT below).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from unsloth_spectral.autocast import no_autocast
from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.log import warn_once

# The largest S[1] / S[k] at which dividing by S leaves U orthonormal to 1e-6.
_MAX_CONDITION = 1e4
_MAX_DRIFT = 1e-7
# Squared norms that leave room for float32 products and quotients whatever the condition.
_MIN_TRACE, _MAX_TRACE = 1e-56, 1e56
# Largest entries whose matrices have Gram matrices well inside float32.
_MIN_PEAK, _MAX_PEAK = 1e-8, 1e8


class _Factors(NamedTuple):
    U: Tensor
    S: Tensor
    Vh: Tensor


class SVDResult(_Factors):
    """``U [..., m, k], S [..., k], Vh [..., k, n]``, and unpacks to these three; ``S`` is descending.

    Attributes:
        num_fallbacks: matrices of the batch that were handed to the exact ``torch.linalg.svd``.
        fallback_reason: the reason, or None if there were none.
    """

    num_fallbacks: int = 0
    fallback_reason: str | None = None


def batched_randomized_svd(
    M: Tensor, k: int, n_iter: int = 2, oversampling: int = 5, *, generator: torch.Generator | None = None
) -> SVDResult:
    """The leading ``k`` singular triplets of every matrix in ``M``, by randomized subspace iteration.

    HMT algorithm 4.4, normalized at each half step, then 5.1, on the transpose: the shorter side is iterated on. The
    error is bounded by ``svd_error_bound``. The ``k + oversampling`` test vectors, if below 32, are rounded up to a
    multiple of 8, which is more accurate and takes no longer. All matrices share one Gaussian test matrix.

    The exact SVD is used for the whole batch where ``k + oversampling >= min(m, n)``, and for those float32 matrices
    that are zero, of a norm beyond ``1e-28`` to ``1e28``, or whose Cholesky factorization fails, which is logged too.

    Args:
        M: ``[..., m, n]``, floating. float16 and bfloat16 are computed in float32. No gradient flows through. On CUDA,
            ``torch.set_float32_matmul_precision`` below "highest" costs accuracy here too.
        k: number of triplets, 1 to ``min(m, n)``.
        n_iter: power iterations, 0 or more; each reads ``M`` twice.
        oversampling: test vectors beyond ``k``, 0 or more.
        generator: source of the test matrix; torch's default generator if None.

    Raises:
        InvalidArgumentError: an argument breaks a rule above, ``M`` is not finite, or ``S`` overflows the dtype of
            ``M``, in which the result is returned.
    """
    _check_matrix(M)
    _check_int("k", k, 1, min(M.shape[-2:]), "min(m, n)")
    _check_int("n_iter", n_iter, 0)
    _check_int("oversampling", oversampling, 0)
    return _solve(M, k, lambda A: _randomized(A, k, n_iter, oversampling, generator))


def batched_gram_svd(M: Tensor, k: int | None = None) -> SVDResult:
    """The leading ``k`` singular triplets (all if None) of every matrix in ``M``, from its smaller Gram matrix.

    Exact, and faster than ``torch.linalg.svd`` for tall or wide matrices. A Gram matrix halves the digits, so matrices
    whose ``S[k] / S[1]`` is below ``10 sqrt(eps)`` are redone with a float64 one and, where even that is not enough,
    by ``torch.linalg.svd``, counted as a fallback. ``M``, dtypes and errors: as in ``batched_randomized_svd``.
    """
    _check_matrix(M)
    most = min(M.shape[-2:])
    rank = most if k is None else k
    _check_int("k", rank, 1, most, "min(m, n)")
    return _solve(M, rank, lambda A: _gram(A, rank, [A.dtype] + [torch.float64] * _gains_from_float64(A)))


def svd_error_bound(S: Tensor, k: int, p: int, q: int) -> Tensor:
    """Expected spectral error of projecting onto the range found with ``k + p`` vectors and ``q`` power iterations.

    HMT corollary 10.10 (theorem 10.6 where ``q`` is 0), with ``s_j`` the singular values of A and ``r = 2 q + 1``::

        E |(I - Q Q^T) A| <= [(1 + sqrt(k / (p - 1))) s_{k+1}^r + e sqrt(k + p) / p (sum_{j>k} s_j^{2 r})^(1/2)]^(1/r)

    Truncating that projection to rank ``k`` adds at most ``s_{k+1}`` (theorem 9.3).

    ``S [..., n]``, floating, holds all singular values, descending; ``1 <= k < n``, ``p >= 2``, ``q >= 0``, or else
    InvalidArgumentError is raised. Returns ``[...]`` in the dtype of ``S``.
    """
    _check_floating("S", S, 1)
    _check_int("k", k, 1, S.shape[-1] - 1, "the number of singular values less one")
    _check_int("p", p, 2)
    _check_int("q", q, 0)
    if not bool((S.isfinite() & (S >= 0)).all()) or bool((S.diff(dim=-1) > 0).any()):
        raise InvalidArgumentError(f"S must be finite, non-negative and descending, got {S}: pass the S of an SVD")
    tail = S[..., k:].to(S.dtype if S.dtype == torch.float64 else torch.float32)
    exponent = 2 * q + 1
    # Relative to s_{k+1} every power lies in [0, 1], so that none overflows whatever the exponent.
    relative = tail / tail[..., :1].clamp(min=torch.finfo(tail.dtype).tiny)
    tail_norm = relative.pow(2 * exponent).sum(-1).sqrt()
    factor = 1 + math.sqrt(k / (p - 1)) + math.e * math.sqrt(k + p) / p * tail_norm
    return (tail[..., 0] * factor.pow(1 / exponent)).to(S.dtype)


def _check_int(name: str, value: object, least: int, most: int | None = None, limit: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgumentError(f"{name} must be an integer, got {value!r} ({type(value).__name__}): pass an int")
    if value < least:
        raise InvalidArgumentError(f"{name} must be at least {least}, got {value}: raise it")
    if most is not None and value > most:
        raise InvalidArgumentError(f"{name} must be at most {limit}, here {most}; got {value}: lower it")


def _check_floating(name: str, value: object, num_dims: int) -> None:
    if not isinstance(value, Tensor):
        raise InvalidArgumentError(f"{name} must be a torch.Tensor, got {type(value).__name__}: use torch.as_tensor")
    if not value.is_floating_point():
        raise InvalidArgumentError(f"{name} must be real and floating, got {value.dtype}: convert it, as by .float()")
    if value.ndim < num_dims:
        raise InvalidArgumentError(
            f"{name} must have {num_dims} dimensions or more, got {tuple(value.shape)}: add some"
        )


def _check_matrix(M: Tensor) -> None:
    _check_floating("M", M, 2)
    if 0 in M.shape[-2:]:
        raise InvalidArgumentError(f"M must have rows and columns, got {tuple(M.shape)}: leave empty matrices out")


def _gains_from_float64(A: Tensor) -> bool:
    return A.dtype == torch.float32 and A.device.type != "mps"


def _solve(M: Tensor, k: int, body: Callable[[Tensor], SVDResult]) -> SVDResult:
    """Run ``body`` on ``M`` as ``[b, m, n]`` with ``m >= n`` in its compute dtype; undo that on the result."""
    *batch, m, n = M.shape
    A = M.detach().reshape(math.prod(batch), m, n)
    if A.dtype not in (torch.float32, torch.float64):
        A = A.float()
    if not len(A):
        return SVDResult(M.new_empty(*batch, m, k), M.new_empty(*batch, k), M.new_empty(*batch, k, n))
    with no_autocast(A.device):
        factors = body(A if m >= n else A.mT)
    U, S, Vh = factors if m >= n else (factors.Vh.mT, factors.S, factors.U.mT)
    if M.dtype != A.dtype:
        U, S, Vh = U.to(M.dtype), S.to(M.dtype), Vh.to(M.dtype)
    if not math.isfinite(float(S.amax())):
        raise InvalidArgumentError(f"S must fit the dtype of M, {M.dtype}, but overflows: scale M or use a wider dtype")
    if len(batch) != 1:
        U, S, Vh = U.reshape(*batch, m, k), S.reshape(*batch, k), Vh.reshape(*batch, k, n)
    result = SVDResult(U, S, Vh)
    result.num_fallbacks, result.fallback_reason = factors.num_fallbacks, factors.fallback_reason
    return result


def _check_finite(A: Tensor) -> None:
    # A NaN or infinity makes the sum not finite, and summing is far cheaper than isfinite; finite entries may overflow
    # it.
    if not math.isfinite(float(A.sum())) and (count := int((~A.isfinite()).sum())):
        raise InvalidArgumentError(f"M must be finite, got {count} NaN or infinite entries: mask or replace them first")


def _exact(A: Tensor, k: int, reason: str) -> SVDResult:
    _check_finite(A)
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    result = SVDResult(U[..., :k], S[..., :k], Vh[..., :k, :])
    result.num_fallbacks, result.fallback_reason = len(A), reason
    return result


def _replace(result: SVDResult, where: Tensor, redone: SVDResult) -> None:
    for old, new in zip(result, redone, strict=True):
        old[where] = new
    if redone.num_fallbacks:
        result.num_fallbacks, result.fallback_reason = redone.num_fallbacks, redone.fallback_reason


def _randomized(A: Tensor, k: int, n_iter: int, oversampling: int, generator: torch.Generator | None) -> SVDResult:
    _, m, n = A.shape
    size = k + oversampling
    if size >= n:
        return _exact(A, k, f"k + oversampling, {size}, is not below min(m, n), {n}")
    if size < 32:
        size = min(-(-size // 8) * 8, n)
    device = A.device if generator is None else generator.device
    Omega = torch.randn(size, m, generator=generator, dtype=A.dtype, device=device).to(A.device)
    if _gains_from_float64(A):
        return _randomized_float32(A, k, n_iter, Omega)
    _check_finite(A)
    B, peaks = _with_unit_peaks(A)
    Z = Omega @ B
    for _ in range(n_iter):
        Q = torch.linalg.qr(B @ torch.linalg.qr(Z.mT).Q).Q
        Z = Q.mT @ B
    U, S, Vh = _project(B, Z, k)
    return SVDResult(U, S * peaks, Vh)


def _with_unit_peaks(A: Tensor) -> tuple[Tensor, Tensor]:
    """``A`` with each matrix divided by its largest entry, so that no product overflows; and the divisors ``[b, 1]``.

    Moderate matrices, the usual ones, are not copied: their divisors are 1.
    """
    peaks = torch.maximum(A.amax((-2, -1)), -A.amin((-2, -1)))
    least, largest = peaks.aminmax()
    if float(least) > _MIN_PEAK and float(largest) < _MAX_PEAK:
        return A, torch.ones_like(peaks)[:, None]
    peaks = torch.where(peaks > 0, peaks, 1.0)[:, None]
    return A / peaks[..., None], peaks


def _project(A: Tensor, Z: Tensor, k: int) -> SVDResult:
    """HMT algorithm 5.1 for the row space spanned by ``Z [b, l, n]``, whatever the condition of ``Z`` and ``A``."""
    Q = torch.linalg.qr(Z.mT).Q
    U, S, Wh = torch.linalg.svd(A @ Q, full_matrices=False)
    return SVDResult(U[..., :k], S[..., :k], Wh[..., :k, :] @ Q.mT)


def _randomized_float32(A: Tensor, k: int, n_iter: int, Omega: Tensor) -> SVDResult:
    """The same in float32, with thin matrices as rows and small ones in float64: several times faster on a CPU.

    The long side is never orthonormalized. With ``Z = Y A`` and ``Y`` about orthonormal, the next ``Y`` is taken as
    ``(Z Z^T)^-1 Z A^T``: it spans the same space as ``Z A^T``, and is well conditioned by itself, for its product with
    the last ``Y^T`` is the identity. Only the Gram matrix of the short ``Z`` is factorized, in float64, where squaring
    the condition number of a float32 matrix does no harm.
    """
    At, b = A.mT, len(A)
    eye = torch.eye(len(Omega), dtype=torch.float64, device=A.device).expand(b, -1, -1)
    Z = torch.bmm(Omega.expand(b, -1, -1), A)
    L_inv, trace, failed = _inverse_cholesky(Zd := Z.double(), eye, shifted=True)
    # A NaN or infinity reaches its matrix's trace, and NaN differs from itself: the exact SVD refuses both.
    extreme = trace.clamp(_MIN_TRACE, _MAX_TRACE) != trace
    failed |= extreme
    for _ in range(n_iter):
        X = torch.bmm(torch.bmm(L_inv.mT, L_inv), Zd).float()
        Z = torch.bmm(torch.bmm(X, At), A)
        L_inv, trace, info = _inverse_cholesky(Zd := Z.double(), eye, shifted=True)
        failed |= info
    P, unusable = torch.bmm(L_inv, Zd), failed
    # The left side bounds how far shift and rounding leave P from orthonormal; if too far, orthonormalize a second
    # time.
    if not float((L_inv.square().sum((-2, -1)) * trace).amax()) < _MAX_DRIFT / _rounding(eye):
        L_inv, trace, info = _inverse_cholesky(P, eye, shifted=False)
        P = torch.bmm(L_inv, P)
        unusable = failed | info | ~(L_inv.square().sum((-2, -1)) * trace < _MAX_DRIFT / _rounding(eye))
    P = P.float()
    C = torch.bmm(P, At)
    Cd = C.double()
    # Zeros in place of a failed matrix's NaN, which eigh would refuse. Negated, the largest eigenvalue comes first.
    gram = torch.bmm(Cd, Cd.mT).neg_().masked_fill_(unusable[:, None, None], 0.0)
    minus_squares, W = torch.linalg.eigh(gram)
    S, W = minus_squares.abs_().sqrt_()[:, :k], W[..., :k]
    condition = S[:, 0] / S[:, -1]
    worst = float(condition.amax())
    U = torch.bmm((W / S[:, None]).float().mT, C).mT
    result = SVDResult(U, S.float(), torch.bmm(W.mT.float(), P))
    if worst < _MAX_CONDITION:
        return result
    steep = ~failed & ~(condition < _MAX_CONDITION)
    if bool(steep.any()):
        _replace(result, steep, _project(A[steep], Z[steep], k))
    if bool(failed.any()):
        num_extreme = int(extreme.sum())
        num_failed = int(failed.sum()) - num_extreme
        reason = (
            f"of {b} matrices, {num_extreme} are zero or of extreme scale, {num_failed} failed to factorize by Cholesky"
        )
        if num_failed:
            warn_once("batched_randomized_svd uses the exact SVD: %s", reason)
        _replace(result, failed, _exact(A[failed], k, reason))
    return result


def _inverse_cholesky(Z: Tensor, eye: Tensor, shifted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``L^-1`` of ``L L^T = Z Z^T``, the trace of the latter ``[b]``, and whether the factorization failed ``[b]``.

    The shift, as large as the rounding of ``Z Z^T``, lets numerically rank-deficient matrices pass: directions below
    the float32 rounding of ``Z`` are damped rather than blown up.
    """
    gram = torch.bmm(Z, Z.mT)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    trace = diagonal.sum(-1)
    if shifted:
        diagonal.add_(trace[:, None], alpha=_rounding(eye))
    L, info = torch.linalg.cholesky_ex(gram)
    return torch.linalg.solve_triangular(L, eye, upper=False), trace, info != 0


def _rounding(eye: Tensor) -> float:
    """Bound on the rounding error of a Gram matrix of this size and of its Cholesky factorization, over its trace."""
    return 4 * (eye.shape[-1] + 1) * torch.finfo(eye.dtype).eps


def _gram(A: Tensor, k: int, dtypes: list[torch.dtype]) -> SVDResult:
    """Use the Gram matrix in ``dtypes[0]``; for matrices that it cannot resolve the next dtype, and last the exact
    SVD."""
    if not dtypes:
        return _exact(A, k, "the Gram matrix is too ill-conditioned")
    _check_finite(A)
    B, peaks = _with_unit_peaks(A.to(dtypes[0]))
    V = torch.linalg.eigh(torch.bmm(B.mT, B).neg_()).eigenvectors[..., :k]
    # The norms of B V are accurate to second order in the error of V, the eigenvalues only to first.
    US = torch.bmm(B, V)
    squares = torch.bmm(US.mT, US)
    S, order = squares.diagonal(dim1=-2, dim2=-1).sqrt().sort(dim=-1, descending=True)
    V = V.gather(-1, order[:, None].expand_as(V))
    weak = ~(S[:, -1] > 10 * math.sqrt(torch.finfo(B.dtype).eps) * S[:, 0])
    # U = US / S in that order is orthonormal to eps (S[1] / S[k])^2, at worst a hundredth, so that one step of
    # Cholesky-QR corrects it. Both are done on the short side, with one product by the long one.
    T = torch.zeros_like(squares).scatter_(-2, order[:, None], S.reciprocal()[:, None])
    R = torch.linalg.cholesky_ex(torch.bmm(torch.bmm(T.mT, squares), T)).L.mT
    eye = torch.eye(k, dtype=R.dtype, device=R.device).expand_as(R)
    U = torch.bmm(US, torch.bmm(T, torch.linalg.solve_triangular(R, eye, upper=True)))
    result = SVDResult(U.to(A.dtype), (S * peaks).to(A.dtype), V.mT.to(A.dtype))
    if bool(weak.any()):
        _replace(result, weak, _gram(A[weak], k, dtypes[1:]))
    return result
