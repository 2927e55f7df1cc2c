"""The rank codec: a truncated SVD of each block, its left factor in int8.

A block ``X`` of ``n`` tokens is kept as ``X = U S Vh`` cut to ``rank`` components. ``U`` has orthonormal columns, so
all its entries have one magnitude and a single symmetric int8 scale per head suits every component; the singular
values go into the half-precision basis ``S Vh``. Nothing is centred: on SmolLM2 subtracting the mean gains the keys
little and costs the values a sevenfold KL, because the tokens that draw most attention have values near zero.
"""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from unsloth_spectral.codec.rank.int8 import dequantize_int8, quantize_int8
from unsloth_spectral.codec.stored_tensors import Stored, StoredTensors
from unsloth_spectral.codec.tensors import TensorFunction
from unsloth_spectral.fields import Field, Fields
from unsloth_spectral.rsvd import SVDResult, batched_gram_svd, batched_randomized_svd

_SEED = 0  # Sealing the same tokens twice must give the same block, so the test matrix is always the same.


@dataclass(frozen=True, slots=True, eq=False)
class RankFactors(StoredTensors):
    """One side (keys or values) of a sealed block, of logical shape ``[..., tokens, head_dim]``.

    Attributes:
        codes: ``[..., rank, tokens]`` int8. Components come first, which makes both products of attention faster.
        scale: ``[..., 1, 1]`` float32, one per head and block.
        basis: ``[..., rank, head_dim]`` float16, singular values included, divided by the largest of them.
        relative_error: ``[...]`` float32, estimated Frobenius norm of the error (components cut off, and
            int8 rounding) over the norm of the block.
        num_fallbacks: matrices for which encoding used the exact SVD instead of the randomized one; 0 for factors that
            were cut, mapped or joined, so that nothing is counted twice.
    """

    codes: Annotated[Tensor, Stored(torch.int8, (..., "rank", "tokens"))]
    scale: Annotated[Tensor, Stored(torch.float32, (..., 1, 1))]
    basis: Annotated[Tensor, Stored(torch.float16, (..., "rank", "head_dim"))]
    relative_error: Annotated[Tensor, Stored(torch.float32, (...,), is_statistic=True)]
    num_fallbacks: int = 0

    @property
    def rank(self) -> int:
        return self.codes.shape[-2]

    @property
    def num_tokens(self) -> int:
        return self.codes.shape[-1]

    @property
    def is_finite(self) -> bool:
        """False if the block's squares overflowed: its factors are then unusable."""
        return all(bool(torch.isfinite(tensor).all()) for tensor in (self.scale, self.basis, self.relative_error))

    def scores(self, query: Tensor) -> Tensor:
        """``query [..., rows, head_dim]`` against every token: ``(q basis^T) codes``, ``[..., rows, tokens]``."""
        projected = (query @ self.basis.to(query.dtype).mT) * self.scale
        return projected @ self.codes.to(query.dtype)

    def combine(self, weights: Tensor) -> Tensor:
        """Weighted sum over tokens, ``[..., rows, tokens]`` to ``[..., rows, head_dim]``, summed in code space."""
        coefficients = (weights @ self.codes.to(weights.dtype).mT) * self.scale
        return coefficients @ self.basis.to(weights.dtype)

    def reconstruct(self) -> Tensor:
        """The dense block, ``[..., tokens, head_dim]`` float32."""
        return dequantize_int8(self.codes, self.scale).mT @ self.basis.float()

    def map(self, function: TensorFunction) -> "RankFactors":
        """The same factors with ``function`` applied to each tensor; for indexing or repeating leading dimensions."""
        return replace(self.map_tensors(function), num_fallbacks=0)

    def first_tokens(self, num_tokens: int) -> "RankFactors":
        """The factors of the first ``num_tokens`` tokens; the basis stays, so nothing is encoded again."""
        return replace(self, codes=self.codes[..., :num_tokens].clone(), num_fallbacks=0)

    def concatenate(self, other: "RankFactors", dim: int) -> "RankFactors":
        """Both factors stacked along leading dimension ``dim``."""
        others = other.tensors
        joined = {name: torch.cat([tensor, others[name]], dim) for name, tensor in self.tensors.items()}
        return replace(self, **joined, num_fallbacks=0)

    def to_fields(self) -> dict[str, Field]:
        return self.tensors_to_fields()

    @classmethod
    def from_fields(cls, fields: Fields, leading: tuple[int, ...], head_dim: int) -> "RankFactors":
        """The factors of shape ``[*leading, num_blocks, tokens, head_dim]`` that ``to_fields`` stored."""
        any_size = {"...": (*leading, None), "rank": None, "tokens": None}
        declared = cls.declarations()["codes"]
        *stacked, rank, tokens = fields.tensor("codes", declared.dtype, declared.sizes(any_size)).shape
        sizes = {"...": tuple(stacked), "rank": rank, "tokens": tokens, "head_dim": head_dim}
        return cls(**cls.tensors_from_fields(fields, sizes))


def encode(block: Tensor, rank: int) -> RankFactors:
    """Encode ``block [..., tokens, head_dim]`` (any float dtype, finite) at ``rank``.

    All leading dimensions (batch, heads, blocks) go through one batched factorization.

    Raises:
        InvalidArgumentError: ``rank`` exceeds tokens or head_dim, or the block is not finite.
    """
    matrix = block.float().contiguous()
    svd = _factorize(matrix, rank)
    left, singular_values, right = svd
    largest = singular_values[..., :1].clamp_min(torch.finfo(torch.float32).tiny)
    basis = ((singular_values / largest)[..., None] * right).half()
    codes, scale = quantize_int8(left.mT.contiguous(), dims=(-2, -1))
    energy = torch.linalg.vector_norm(matrix.flatten(-2), dim=-1).square()  # no copy of the squares
    kept_energy = singular_values.square().sum(-1)
    # Uniform rounding adds scale^2 / 12 to each entry of U, hence tokens * scale^2 / 12 times the kept energy.
    rounding = kept_energy * (matrix.shape[-2] / 12) * scale[..., 0, 0].square()
    lost_energy = (energy - kept_energy).clamp_min(0) + rounding
    relative_error = (lost_energy / energy.clamp_min(torch.finfo(torch.float32).tiny)).sqrt()
    return RankFactors(codes, scale * largest[..., None], basis, relative_error, svd.num_fallbacks)


def _factorize(matrix: Tensor, rank: int) -> SVDResult:
    """Factorize by the route that is faster at these shapes (benchmarks/rsvd.py, [21, 512, 64]).

    If more than half of the components are kept, the random projection saves little, and the exact Gram route is
    faster.
    """
    if 2 * rank >= min(matrix.shape[-2:]):
        return batched_gram_svd(matrix, rank)
    generator = torch.Generator(matrix.device).manual_seed(_SEED)
    return batched_randomized_svd(matrix, rank, generator=generator)
