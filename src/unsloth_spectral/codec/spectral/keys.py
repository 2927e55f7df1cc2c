"""Keys as codes of their principal components."""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import Annotated, TypeAlias

import torch
from torch import Tensor

from unsloth_spectral.codec.config import GROUP_SIZE
from unsloth_spectral.codec.spectral import kernel
from unsloth_spectral.codec.spectral.allocate import DISTORTION
from unsloth_spectral.codec.spectral.packing import MAX_NBITS, PLANE_BYTES, num_tiles, pack_quads, unpack_quads
from unsloth_spectral.codec.spectral.scales import decode_scales, encode_scales
from unsloth_spectral.codec.spectral.statistics import Basis, KeyStatistics, projection
from unsloth_spectral.codec.stored_tensors import Sizes, Stored, StoredTensors
from unsloth_spectral.codec.tensors import TensorFunction, TokenShape, joint_error
from unsloth_spectral.fields import Field, Fields
from unsloth_spectral.rope import Rotation, join_rotations, rotate

STEPS_PER_OCTAVE = 32
# Clipping points, as shares of a group's largest coefficient. Without clipping, rare huge coefficients set the step.
CLIPS = (1.0, 0.85, 0.7, 0.55, 0.42, 0.32)

# For each key-value head, the bits of its components in falling order.
Widths: TypeAlias = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, eq=False)
class KeyCodes(StoredTensors):
    """Keys of one run of tokens, logical shape ``[B, H, num_tokens, D]``.

    Only components of one bit or more are stored, ``C`` in all: head by head, by falling width.

    Attributes:
        planes: ``[B, tiles, sum of widths, 16]`` uint8, see ``packing``.
        scales: ``[B, tiles, C]`` uint8, see ``scales``; the tokens of a tile share a scale.
        vectors: ``[B, C, D]`` int8, the basis.
        vector_scales: ``[B, C, 1]`` float32, of the basis rows, times the largest scale of each component.
        mean: ``[B, H, D]`` float16, un-rotated.
        relative_error: ``[B, H]`` float16, under the query metric.
        widths: bits of each component.
        num_tokens: the number of tokens.
        rotation: the tokens' positions; None for a model without rotary embeddings.
        is_rotated: whether the components are those of rotated keys (less the rotated mean) or of un-rotated ones.
    """

    planes: Annotated[Tensor, Stored(torch.uint8, ("batch", "tiles", "planes", PLANE_BYTES))]
    scales: Annotated[Tensor, Stored(torch.uint8, ("batch", "tiles", "components"))]
    vectors: Annotated[Tensor, Stored(torch.int8, ("batch", "components", "key_dim"))]
    vector_scales: Annotated[Tensor, Stored(torch.float32, ("batch", "components", 1))]
    mean: Annotated[Tensor, Stored(torch.float16, ("batch", "heads", "key_dim"))]
    relative_error: Annotated[Tensor, Stored(torch.float16, ("batch", "heads"), is_statistic=True)]
    widths: Widths
    num_tokens: int
    rotation: Rotation | None
    is_rotated: bool

    @property
    def num_key_value_heads(self) -> int:
        return self.mean.shape[1]

    @property
    def num_bits(self) -> int:
        """Bits per token of all heads together, without metadata."""
        return sum(map(sum, self.widths))

    def components(self) -> tuple[Tensor, Tensor]:
        """Coefficients ``[B, H, K, num_tokens]`` and their basis ``[B, H, K, D]``, both float32.

        ``K`` is the largest number of components of a head; other heads are filled up with zeros.
        """
        flat = flat_widths(self.widths)
        scales = decode_scales(self.scales.mT, STEPS_PER_OCTAVE)
        coefficients = dequantize(unpack_quads(self.planes, self.widths), _as_tensor(flat, self.planes.device), scales)
        basis = self.vectors.float() * self.vector_scales
        return _by_head(coefficients, self.widths)[..., : self.num_tokens], _by_head(basis, self.widths)

    def reconstruct(self) -> Tensor:
        """The dense keys as the model caches them, ``[B, H, num_tokens, D]`` float32."""
        coefficients, basis = self.components()
        x = coefficients.mT @ basis
        mean = self.mean.float()[:, :, None]
        if self.rotation is None:
            return x + mean
        table = self.rotation.table()[:, None]
        if self.is_rotated:
            return x + rotate(mean.expand_as(x), table, self.rotation)
        return rotate(x + mean, table, self.rotation)

    def scores(self, query: Tensor) -> Tensor:
        """Dot products of ``query [B, H, rows, D]`` with every key, ``[B, H, rows, num_tokens]``."""
        if not self.is_rotated and self.rotation is not None:
            return query @ self.reconstruct().to(query.dtype).mT
        coefficients, basis = self.components()
        scores = (query @ basis.to(query.dtype).mT) @ coefficients.to(query.dtype)
        mean = self.mean.to(query.dtype)[:, :, None]
        if self.rotation is None:
            return scores + query @ mean.mT
        return scores + _rotated_mean_scores(query, mean, self.rotation)

    def slice(self, start: int, stop: int) -> "KeyCodes":
        """Tokens ``start`` to ``stop`` as views; ``start`` is a multiple of the group size."""
        rotation = None if self.rotation is None else self.rotation.slice(start, stop)
        return replace(self.slice_tensors(start, stop), num_tokens=stop - start, rotation=rotation)

    def map(self, function: TensorFunction) -> "KeyCodes":
        """``function`` applied along the batch dimension of each tensor."""
        rotation = None if self.rotation is None else self.rotation.map_batch(function)
        return replace(self.map_tensors(function), rotation=rotation)

    def append(self, other: "KeyCodes") -> "KeyCodes":
        """These keys followed by ``other``'s, coded by the same plan; these fill whole groups."""
        rotation = self.rotation
        if rotation is not None and other.rotation is not None:
            rotation = join_rotations([rotation, other.rotation])
        return replace(
            self.append_tensors(other),
            relative_error=joint_error(self, other),
            num_tokens=self.num_tokens + other.num_tokens,
            rotation=rotation,
        )

    def to_fields(self) -> dict[str, Field]:
        rotation = None if self.rotation is None else self.rotation.to_fields()
        more: dict[str, Field] = {"widths": self.widths, "num_tokens": self.num_tokens, "is_rotated": self.is_rotated}
        return {**self.tensors_to_fields(), **more, "rotation": rotation}

    @classmethod
    def from_fields(cls, fields: Fields, shape: TokenShape) -> "KeyCodes":
        widths, num_tokens, rotation = _widths_of(fields, shape), fields.integer("num_tokens", 1), None
        if fields.has("rotation"):
            rotation = Rotation.from_fields(fields.sub("rotation"), shape.key_dim, shape.batch, num_tokens)
        tensors = cls.tensors_from_fields(fields, key_sizes(shape.batch, shape.key_dim, widths, num_tokens))
        is_rotated = fields.flag("is_rotated")
        return cls(**tensors, widths=widths, num_tokens=num_tokens, rotation=rotation, is_rotated=is_rotated)


def key_sizes(batch: int, key_dim: int, widths: Widths, num_tokens: int = 0) -> dict[str, int]:
    """The sizes that the declarations of ``KeyCodes`` and ``KeyPlan`` name."""
    return {
        "batch": batch,
        "heads": len(widths),
        "key_dim": key_dim,
        "tiles": num_tiles(num_tokens),
        "components": sum(map(len, widths)),
        "planes": sum(map(sum, widths)),
    }


def fixed_bytes(sizes: Sizes) -> int:
    """Bytes of the keys' codes that do not depend on the widths, without statistics."""
    return KeyCodes.bytes_without(("components", "planes"), sizes)


def _widths_of(fields: Fields, shape: TokenShape) -> Widths:
    widths = fields.integer_lists("widths", 1, MAX_NBITS)
    falling = all(list(row) == sorted(row, reverse=True) and len(row) <= shape.key_dim for row in widths)
    fields.require(len(widths) == shape.heads and falling, f"falling widths of {shape.heads} heads")
    return widths


def flat_widths(widths: Widths) -> tuple[int, ...]:
    """All heads' widths, one after another."""
    return tuple(chain.from_iterable(widths))


@lru_cache(maxsize=256)
def _as_tensor(widths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(widths, dtype=torch.int64, device=device)


@lru_cache(maxsize=256)
def _slots(widths: Widths, device: torch.device) -> Tensor:
    """The slots of ``C`` components if every head has as many slots as the largest head has components."""
    most = max(map(len, widths))
    slots = [head * most + place for head, row in enumerate(widths) for place in range(len(row))]
    return torch.tensor(slots, dtype=torch.int64, device=device)


def _by_head(components: Tensor, widths: Widths) -> Tensor:
    """``[B, C, n]`` as ``[B, num_heads, most, n]``, filled up with zeros."""
    batch, _, count = components.shape
    most = max(map(len, widths))
    if all(len(row) == most for row in widths):
        return components.unflatten(1, (len(widths), most))
    empty = components.new_zeros(batch, len(widths) * most, count)
    return empty.index_copy_(1, _slots(widths, components.device), components).unflatten(1, (len(widths), most))


@dataclass(frozen=True, slots=True, eq=False)
class KeyPlan(StoredTensors):
    """The plan by which keys are coded: components, their widths and the rounded basis.

    Attributes:
        vectors: ``[B, C, D]`` int8, head by head, by falling width.
        row_scales: ``[B, C, 1]`` float32, of the rows of ``vectors``.
        tops: ``[B, C, 1]`` float32, the largest scale that can be coded; None until the first tokens are coded.
        widths: bits of each component.
        level: the water level that gave the widths.
    """

    vectors: Annotated[Tensor, Stored(torch.int8, ("batch", "components", "key_dim"))]
    row_scales: Annotated[Tensor, Stored(torch.float32, ("batch", "components", 1))]
    tops: Tensor | None
    widths: Widths
    level: float

    def to_fields(self) -> dict[str, Field]:
        return {**self.tensors_to_fields(), "tops": self.tops, "widths": self.widths, "level": self.level}

    @classmethod
    def from_fields(cls, fields: Fields, shape: TokenShape) -> "KeyPlan":
        widths = _widths_of(fields, shape)
        sizes = key_sizes(shape.batch, shape.key_dim, widths)
        like_rows = cls.declarations()["row_scales"].sizes(sizes)
        tops = fields.tensor("tops", torch.float32, like_rows) if fields.has("tops") else None
        return cls(**cls.tensors_from_fields(fields, sizes), tops=tops, widths=widths, level=fields.number("level"))


def plan(basis: Basis, widths: Tensor, level: float) -> KeyPlan:
    """The plan of ``widths [H, D]`` for the components of ``basis``, its rows rounded to int8."""
    falling: Widths = tuple(tuple(sorted((width for width in row if width), reverse=True)) for row in widths.tolist())
    order = (widths.argsort(dim=-1, descending=True, stable=True) + _first_of(widths)).flatten()
    order = order[widths.flatten()[order] > 0]
    rows = basis.vectors.flatten(1, 2)[:, order]
    peak = rows.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    vectors = (rows * (127 / peak)).round().to(torch.int8)
    return KeyPlan(vectors, peak / 127, None, falling, level)


def _first_of(widths: Tensor) -> Tensor:
    """``[H, 1]``, the place of each head's first component among those of all heads."""
    return torch.arange(len(widths), dtype=torch.int64, device=widths.device)[:, None] * widths.shape[1]


def encode(statistics: KeyStatistics, plan: KeyPlan) -> tuple[KeyCodes, KeyPlan]:
    """Code the keys of ``statistics`` by ``plan``; the second result is the plan with its ``tops``."""
    x, metric = statistics.x, statistics.metric
    num_tokens, flat = statistics.num_tokens, flat_widths(plan.widths)
    rows = plan.vectors.float() * plan.row_scales
    basis = _by_head(rows, plan.widths)
    project = projection(basis, metric)
    coefficients = torch.cat([project[:, h, :, : len(row)].mT @ x[:, h].mT for h, row in enumerate(plan.widths)], 1)
    if kernel.serves(coefficients):
        planes, scales, energies, squares = kernel.encode_keys(coefficients, plan.widths, CLIPS)
    else:
        nbits = _as_tensor(flat, x.device)
        unpacked, scales = quantize(coefficients, nbits)
        planes = pack_quads(unpacked, plan.widths)
        energies, squares = (
            _groups(numbers).square().sum(-1)
            for numbers in (coefficients, _around_zero(unpacked, nbits)[..., :num_tokens])
        )
    # Twice the largest, as room for later tokens coded in the same basis.
    tops = 2 * scales.amax(-1, keepdim=True) if plan.tops is None else plan.tops
    scale_codes = encode_scales(scales, STEPS_PER_OCTAVE, tops)[0]
    stored = decode_scales(scale_codes, STEPS_PER_OCTAVE).mul_(tops)
    # |stored * codes - coefficients|^2; at the unbiased scale, the codes' product with the coefficients is the energy
    # over the scale.
    ratio = stored / scales.clamp_min(torch.finfo(scales.dtype).tiny)
    rounding = (energies * (1 - 2 * ratio) + stored.square() * squares).sum(-1) / num_tokens
    error = _relative_error(
        _by_head(rounding[..., None], plan.widths)[..., 0], basis, project, statistics.covariance, metric
    )
    codes = KeyCodes(
        planes=planes,
        scales=scale_codes.mT.contiguous(),
        vectors=plan.vectors,
        vector_scales=plan.row_scales * tops,
        mean=statistics.mean,
        relative_error=error,
        widths=plan.widths,
        num_tokens=num_tokens,
        rotation=statistics.rotation,
        is_rotated=statistics.is_rotated,
    )
    return codes, replace(plan, tops=tops)


def quantize(coefficients: Tensor, nbits: Tensor) -> tuple[Tensor, Tensor]:
    """Uniform mid-rise codes and scales ``[B, C, groups]`` of ``coefficients [B, C, n]``.

    The codes are ``[B, C, T]`` uint8, ``T`` the next multiple of 128.

    Each component and group takes the clipping point of least squared error, then the scale that makes the codes
    project exactly onto the coefficients: a least-squares quantizer shrinks, and shrunken keys flatten the softmax.
    """
    groups = _groups(coefficients)
    half = (1 << (nbits - 1)).to(groups.dtype)[:, None, None]
    peak = groups.abs().amax(-1, keepdim=True)
    best, step = None, torch.ones_like(peak)
    for clip in CLIPS:
        trial = (peak * clip / half).clamp_min(torch.finfo(groups.dtype).tiny)
        value = _mid_rise(groups / trial, half)
        # The error once the scale is the least-squares one for these codes.
        along = (groups * value).sum(-1, keepdim=True).square() / value.square().sum(-1, keepdim=True)
        better = torch.ones_like(peak, dtype=torch.bool) if best is None else along > best
        best = along if best is None else torch.where(better, along, best)
        step = torch.where(better, trial, step)
    value = _mid_rise(groups / step, half)
    overlap = (groups * value).sum(-1, keepdim=True)
    scales = groups.square().sum(-1, keepdim=True) / overlap.clamp_min(torch.finfo(groups.dtype).tiny)
    codes = (value + (half - 0.5)).to(torch.uint8).flatten(-2)
    return codes, scales[..., 0]


def _groups(coefficients: Tensor) -> Tensor:
    """``[..., n]`` as ``[..., groups, 128]``, filled up with zeros."""
    padded = torch.nn.functional.pad(coefficients, (0, -coefficients.shape[-1] % GROUP_SIZE))
    return padded.unflatten(-1, (-1, GROUP_SIZE))


def dequantize(codes: Tensor, nbits: Tensor, scales: Tensor) -> Tensor:
    """Coefficients ``[B, C, T]`` float32 of codes of widths ``nbits [C]`` under ``scales [B, C, groups]``."""
    spread = scales.repeat_interleave(GROUP_SIZE, dim=-1)[..., : codes.shape[-1]]
    return _around_zero(codes, nbits) * spread


def _around_zero(codes: Tensor, nbits: Tensor) -> Tensor:
    return codes.float() - ((1 << (nbits - 1)).float() - 0.5)[:, None]


def expected_error(variances: Tensor, widths: Tensor) -> Tensor:
    """The expected distortion at ``widths``, summed over the last dimension."""
    distortion = torch.tensor(DISTORTION, dtype=torch.float32, device=variances.device)
    return (variances * distortion[widths]).sum(-1)


def _mid_rise(x: Tensor, half: Tensor) -> Tensor:
    return (x.floor() + 0.5).clamp(0.5 - half, half - 0.5)


def _relative_error(rounding: Tensor, basis: Tensor, project: Tensor, covariance: Tensor, metric: Tensor) -> Tensor:
    """Relative error of keys whose coefficients ``x @ project`` in ``basis [B, H, K, D]`` have the squared error
    ``rounding [B, H, K]``.

    Under the metric, the part outside the basis is orthogonal to the rounding error, and the rows of the basis are
    nearly orthogonal to each other. So matrices of ``D`` suffice, instead of products as long as the context.
    """
    weighted = basis @ metric
    energy = (covariance * metric).sum((-2, -1))
    left_out = energy - ((covariance @ project) * weighted.mT).sum((-2, -1))
    rounded = (rounding * (weighted * basis).sum(-1)).sum(-1)
    lost = left_out.clamp_min(0) + rounded.clamp_min(0)
    return (lost / energy.clamp_min(torch.finfo(energy.dtype).tiny)).sqrt().half()


def _rotated_mean_scores(query: Tensor, mean: Tensor, rotation: Rotation) -> Tensor:
    """``q R(n) mu`` for every token: two products per pair and token, cheap beside the codes."""
    fixed = torch.ones(mean.shape[-1], dtype=torch.bool, device=mean.device)
    fixed[rotation.first], fixed[rotation.second] = False, False
    q_real, q_imaginary = query[..., rotation.first], query[..., rotation.second]
    m_real, m_imaginary = mean[..., rotation.first], mean[..., rotation.second]
    cosine = q_real * m_real + q_imaginary * m_imaginary
    sine = q_imaginary * m_real - q_real * m_imaginary
    table = rotation.table()[:, None]
    rotated = cosine @ table.real.to(query.dtype).mT + sine @ table.imag.to(query.dtype).mT
    return rotated + query[..., fixed] @ mean[..., fixed].mT
