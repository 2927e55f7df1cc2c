"""Truncated SVD of a batch of blocks: ours against LAPACK, torch, scikit-learn, SciPy, Nystrom and CUR."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
import sklearn
import torch
from harness import Target, alternate, arguments, finish
from rich.console import Console
from rich.table import Table
from sklearn.utils.extmath import randomized_svd
from torch import Tensor

from unsloth_spectral.rsvd import batched_gram_svd, batched_randomized_svd

N_ITER, OVERSAMPLING = 2, 5
# (heads, tokens, head_dim) and rank; the last two are the shapes of sealing: 3 heads in 7 blocks of SmolLM2.
SETTINGS = (((8, 512, 128), 16), ((8, 1024, 128), 16), ((8, 512, 128), 32), ((21, 512, 64), 16), ((21, 512, 64), 32))
SPECTRA = ("j^-0.8", "rank k")
WANTED_SPEEDUP = {((8, 512, 128), 16): 9.5, ((8, 1024, 128), 16): 10.4, ((8, 512, 128), 32): 4.7}
OURS, BASELINE = "batched_randomized_svd", "torch.linalg.svd, per head"
OPTIMUM_IS_ZERO = 1e-6


@dataclass(frozen=True, slots=True)
class Approximation:
    """A contender's result: ``left @ right`` approximates the matrices; ``S`` are singular values, if it computes
    them."""

    left: Tensor
    right: Tensor
    S: Tensor | None


def from_svd(factors: tuple[Tensor, Tensor, Tensor], k: int) -> Approximation:
    U, S, Vh = factors
    return Approximation(U[..., :k], S[..., :k, None] * Vh[..., :k, :], S[..., :k])


def per_matrix(A: Tensor, factorize: Callable[[np.ndarray], tuple[np.ndarray, ...]]) -> tuple[Tensor, ...]:
    """Run a NumPy routine on each matrix and stack what it returns."""
    factors = [factorize(matrix) for matrix in A.numpy()]
    return tuple(torch.from_numpy(np.stack(factor)) for factor in zip(*factors, strict=True))


def svd_per_head(A: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The plain way, a loop over heads."""
    return [torch.linalg.svd(head, full_matrices=False) for head in A]


def stacked(factors: list[tuple[Tensor, Tensor, Tensor]], k: int) -> Approximation:
    U, S, Vh = (torch.stack(factor) for factor in zip(*factors, strict=True))
    return from_svd((U, S, Vh), k)


def lowrank(A: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    U, S, V = torch.svd_lowrank(A, q=k + OVERSAMPLING, niter=N_ITER)
    return U, S, V.mT


def arpack(matrix: np.ndarray, k: int) -> tuple[np.ndarray, ...]:
    U, S, Vh = scipy.sparse.linalg.svds(matrix, k=k)  # ascending
    return U[:, ::-1], S[::-1], Vh[::-1]


def nystrom(A: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nystrom approximation of ``A^T A`` (Tropp, Yurtsever, Udell & Cevher 2017, algorithm 3), as an SVD of A."""
    n = A.shape[-1]
    test = torch.linalg.qr(torch.randn(n, k + OVERSAMPLING)).Q
    sketch = (A.mT @ (A @ test)).double()
    shift = 1e-7 * torch.linalg.matrix_norm(sketch)[:, None, None]
    sketch = sketch + shift * test
    core = test.double().mT @ sketch
    root = torch.linalg.cholesky((core + core.mT) / 2)
    V, squares, _ = torch.linalg.svd(torch.linalg.solve_triangular(root.mT, sketch, upper=True, left=False), False)
    S = (squares[:, :k].square() - shift[..., 0]).clamp(min=1e-30).sqrt().float()
    V = V[..., :k].float()
    return A @ V / S[:, None], S, V.mT


def cur(matrix: np.ndarray, k: int) -> tuple[np.ndarray, ...]:
    """``k`` columns and rows by pivoted QR, joined by the core that is best for them."""
    columns = matrix[:, scipy.linalg.qr(matrix, mode="r", pivoting=True)[1][:k]]
    rows = matrix[scipy.linalg.qr(columns.T, mode="r", pivoting=True)[1][:k]]
    # Orthonormal bases instead of the rows and columns themselves: their pseudo-inverses are ill-conditioned.
    left, right = np.linalg.qr(columns)[0], np.linalg.qr(rows.T)[0]
    return left @ (left.T @ matrix @ right), right.T


def contenders(A: Tensor, k: int) -> dict[str, tuple[Callable[[], Any], Callable[[Any], Approximation]]]:
    """By name: the function to time, and the conversion of its result."""

    def as_svd(factors: Any) -> Approximation:
        return from_svd(factors, k)

    return {
        OURS: (lambda: batched_randomized_svd(A, k, n_iter=N_ITER, oversampling=OVERSAMPLING), as_svd),
        "batched_gram_svd": (lambda: batched_gram_svd(A, k), as_svd),
        BASELINE: (lambda: svd_per_head(A), lambda factors: stacked(factors, k)),
        "torch.linalg.svd, batched": (lambda: torch.linalg.svd(A, full_matrices=False), as_svd),
        "torch.svd_lowrank": (lambda: lowrank(A, k), as_svd),
        "scikit-learn randomized_svd": (
            lambda: per_matrix(
                A,
                lambda matrix: randomized_svd(
                    matrix, n_components=k, n_iter=N_ITER, n_oversamples=OVERSAMPLING, random_state=0
                ),
            ),
            as_svd,
        ),
        "SciPy svds": (lambda: per_matrix(A, lambda matrix: arpack(matrix, k)), as_svd),
        "Nystrom": (lambda: nystrom(A, k), as_svd),
        "CUR": (
            lambda: per_matrix(A, lambda matrix: cur(matrix, k)),
            lambda factors: Approximation(factors[0], factors[1], None),
        ),
    }


def blocks(shape: tuple[int, int, int], spectrum: Tensor) -> Tensor:
    """Float32 matrices with these singular values and random singular vectors."""
    b, m, n = shape
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(b, m, n, dtype=torch.float64, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(b, n, n, dtype=torch.float64, generator=generator)).Q
    return ((left * spectrum) @ right).float()


def accuracy(A: Tensor, approximation: Approximation, k: int) -> dict[str, float | None]:
    """Error relative to the optimum of rank k, as the mean over the batch, and the worst singular value."""
    exact = torch.linalg.svdvals(A.double())
    error = torch.linalg.matrix_norm(A.double() - approximation.left.double() @ approximation.right.double())
    optimum = exact[:, k:].square().sum(-1).sqrt()
    norm = torch.linalg.matrix_norm(A.double())
    negligible = bool((optimum < OPTIMUM_IS_ZERO * norm).all())
    singular_values = approximation.S
    return {
        "excess_error_percent": None if negligible else 100 * float((error / optimum).mean() - 1),
        "error_percent_of_norm": 100 * float((error / norm).max()),
        "singular_value_error": None
        if singular_values is None
        else float((singular_values.double() / exact[:, :k] - 1).abs().max()),
    }


def measure(shape: tuple[int, int, int], k: int, name: str, repeats: int) -> dict[str, dict[str, Any]]:
    """Every contender's times and errors on one kind of block."""
    j = torch.arange(1, shape[-1] + 1, dtype=torch.float64)
    A = blocks(shape, j**-0.8 if name == SPECTRA[0] else torch.where(j <= k, j**-0.8, 0.0))
    entrants = contenders(A, k)
    torch.manual_seed(0)
    errors = {entrant: accuracy(A, read(run()), k) for entrant, (run, read) in entrants.items()}
    timings = alternate({entrant: run for entrant, (run, _) in entrants.items()}, repeats)
    baseline = timings[BASELINE].median
    return {
        entrant: {**asdict(timing), "speedup": baseline / timing.median, **errors[entrant]}
        for entrant, timing in timings.items()
    }


def show(console: Console, title: str, rows: dict[str, dict[str, Any]]) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("contender")
    for heading in ("ms", "quartiles", "speedup", "excess error %", "error % of norm", "worst S"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        excess, worst = row["excess_error_percent"], row["singular_value_error"]
        table.add_row(
            name,
            f"{row['median']:.2f}",
            f"{row['lower_quartile']:.2f} to {row['upper_quartile']:.2f}",
            f"{row['speedup']:.2f}x",
            "-" if excess is None else f"{excess:.3f}",
            f"{row['error_percent_of_norm']:.3g}",
            "-" if worst is None else f"{worst:.1e}",
        )
    console.print(table)


def main() -> None:
    options = arguments("rsvd", __doc__ or "", repeats=15)
    console = Console(width=120)
    results, targets = [], []
    for shape, k in SETTINGS:
        for name in SPECTRA:
            rows = measure(shape, k, name, options.repeats)
            show(console, f"{list(shape)}, k = {k}, {name}", rows)
            results.append({"shape": shape, "k": k, "spectrum": name, "contenders": rows})
            ours, where = rows[OURS], f"at {list(shape)}, k = {k}, {name}"
            target = WANTED_SPEEDUP.get((shape, k))
            if target and name == SPECTRA[0]:
                targets.append(Target(f"speedup over the per-head loop {where}", target, ours["speedup"], True))
            if (shape, k) == SETTINGS[0] and name == SPECTRA[0]:
                targets.append(Target(f"excess error % {where}", 0.5, ours["excess_error_percent"], False))
            if name == SPECTRA[1]:
                targets.append(Target(f"error % of norm {where}", 0.001, ours["error_percent_of_norm"], False))
                targets.append(Target(f"singular value error {where}", 1e-4, ours["singular_value_error"], False))
    versions = {"scipy": scipy.__version__, "scikit-learn": sklearn.__version__, "numpy": np.__version__}
    finish(options.json, {"benchmark": "rsvd", "versions": versions, "results": results}, targets)


if __name__ == "__main__":
    main()
