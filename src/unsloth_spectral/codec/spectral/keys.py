"""Keys as codes of their principal components."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import Annotated, TypeAlias

import torch
from torch import Tensor

from unsloth_spectral.codec.config import GROUP_SIZE
from unsloth_spectral.codec.model_basis import BasisRows, ModelBasis, Places, row_numbers
from unsloth_spectral.codec.spectral import kernel, trellis
from unsloth_spectral.codec.spectral.allocate import DISTORTION
from unsloth_spectral.codec.spectral.packing import MAX_NBITS, ROW_BYTES, filled, last_bytes, num_tiles, pack, unpack
from unsloth_spectral.codec.spectral.scales import decode_scales, encode_scales, squared_errors, unbiased_scales
from unsloth_spectral.codec.spectral.statistics import Basis, KeyStatistics, projection
from unsloth_spectral.codec.stored_tensors import Sizes, Stored, StoredTensors
from unsloth_spectral.codec.tensors import TensorFunction, TokenShape, joint_error, rounded_rows
from unsloth_spectral.fields import Field, Fields
from unsloth_spectral.rope import SPAN, Rotation, Spans, anchors_of, join_rotations, rotate, unrotate

STEPS_PER_OCTAVE = 32
# Later tokens coded in the same basis may need larger scales than the first ones.
_ROOM = 4.0
# Clipping points, as shares of a group's largest coefficient. Without clipping, rare huge coefficients set the step.
CLIPS = (1.0, 0.85, 0.7, 0.55, 0.42, 0.32)

# For each key-value head, the bits of its components in falling order.
Widths: TypeAlias = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, eq=False)
class KeyCodes(StoredTensors):
    """Keys of one run of tokens, logical shape ``[B, H, num_tokens, D]``.

    Only components of one bit or more are stored, ``C`` in all: head by head, by falling width.

    Attributes:
        streams: ``[B, tiles, sum of widths, 16]`` uint8, see ``packing``.
        carries: ``[B, C]`` uint8, the bytes that the streams go on from.
        scales: ``[B, tiles, C]`` uint8, see ``scales``; the tokens of a tile share a scale.
        vectors: ``[B, C, D]`` int8, the basis; ``[B, 0, D]`` if it is the model's.
        vector_scales: ``[B, C, 1]`` float32, of the basis rows, times the largest scale of each component.
        mean: ``[B, H, D]`` float16, un-rotated.
        relative_error: ``[B, H]`` float16, under the query metric.
        widths: bits of each component.
        num_tokens: the number of tokens.
        rotation: the tokens' positions; None for a model without rotary embeddings.
        spans: of the anchors that the components are un-rotated by, see ``rope.anchors``.
        rows: the components' rows of the model's basis; None if the basis is the keys' own.
    """

    streams: Annotated[Tensor, Stored(torch.uint8, ("batch", "tiles", "rows", ROW_BYTES))]
    carries: Annotated[Tensor, Stored(torch.uint8, ("batch", "components"))]
    scales: Annotated[Tensor, Stored(torch.uint8, ("batch", "tiles", "components"))]
    vectors: Annotated[Tensor, Stored(torch.int8, ("batch", "vectors", "key_dim"))]
    vector_scales: Annotated[Tensor, Stored(torch.float32, ("batch", "components", 1))]
    mean: Annotated[Tensor, Stored(torch.float16, ("batch", "heads", "key_dim"))]
    relative_error: Annotated[Tensor, Stored(torch.float16, ("batch", "heads"), is_statistic=True)]
    widths: Widths
    num_tokens: int
    rotation: Rotation | None
    spans: Spans
    rows: BasisRows | None = None

    @property
    def num_key_value_heads(self) -> int:
        return self.mean.shape[1]

    @property
    def num_bits(self) -> int:
        """Bits per token of all heads together, without metadata."""
        return sum(map(sum, self.widths))

    @property
    def basis_vectors(self) -> Tensor:
        """The basis, ``[B, C, D]`` int8 or, if it is the model's, ``[1, C, D]``."""
        return self.vectors if self.rows is None else self.rows.vectors(self.vectors.device)

    def components(self) -> tuple[Tensor, Tensor]:
        """Coefficients ``[B, H, K, num_tokens]`` and their basis ``[B, H, K, D]``, both float32.

        ``K`` is the largest number of components of a head; other heads are filled up with zeros.
        """
        widths = flat_widths(self.widths)
        scales = decode_scales(self.scales.mT, STEPS_PER_OCTAVE)
        coefficients = dequantize(unpack(self.streams, self.carries, widths), widths, scales)
        basis = self.basis_vectors.float() * self.vector_scales
        return _by_head(coefficients, self.widths)[..., : self.num_tokens], _by_head(basis, self.widths)

    def reconstruct(self) -> Tensor:
        """The dense keys as the model caches them, ``[B, H, num_tokens, D]`` float32."""
        coefficients, basis = self.components()
        x = coefficients.mT @ basis
        mean = self.mean.float()[:, :, None]
        if self.rotation is None:
            return x + mean
        x = rotate(x, anchors_of(self.rotation, self.spans)[:, None], self.rotation)
        return x + rotate(mean.expand_as(x), self.rotation.table()[:, None], self.rotation)

    def scores(self, query: Tensor) -> Tensor:
        """Dot products of ``query [B, H, rows, D]`` with every key, ``[B, H, rows, num_tokens]``."""
        if self.rebuilds(query.shape[2]):
            return query @ self.reconstruct().to(query.dtype).mT
        coefficients, basis = (tensor.to(query.dtype) for tensor in self.components())
        mean = self.mean.to(query.dtype)[:, :, None]
        if self.rotation is None:
            return (query @ basis.mT) @ coefficients + query @ mean.mT
        return self._anchored_scores(query, coefficients, basis) + _rotated_mean_scores(query, mean, self.rotation)

    def rebuilds(self, num_rows: int) -> bool:
        """True if ``scores`` rebuilds the keys for ``num_rows`` queries, and does not un-rotate the queries."""
        return self.rotation is not None and num_rows >= self._tokens_per_anchor

    @property
    def kernel_obstacle(self) -> str | None:
        """Why the compiled and the Triton kernels cannot read these keys; None if they can."""
        if self.rotation is not None and not self.rotation.is_even:
            return "positions that do not run on evenly"
        return None if {0, SPAN}.issuperset(self.spans) else "keys un-rotated one by one"

    @property
    def _tokens_per_anchor(self) -> int:
        """The number of consecutive tokens for which a query is un-rotated once."""
        return min((span for span in self.spans if span), default=max(self.num_tokens, SPAN))

    def _anchored_scores(self, query: Tensor, coefficients: Tensor, basis: Tensor) -> Tensor:
        """The part of the scores that the coefficients give: the query is un-rotated once per run of tokens that share
        their anchors."""
        assert self.rotation is not None
        run = self._tokens_per_anchor
        anchors = anchors_of(self.rotation, self.spans, interval=run)[:, None, :, None]
        wide_query = query.to(torch.promote_types(query.dtype, torch.float32))[:, :, None]
        repeated = wide_query.expand(-1, -1, anchors.shape[2], -1, -1)
        unrotated = unrotate(repeated, anchors, self.rotation).to(query.dtype)
        padding = -self.num_tokens % run
        runs = torch.nn.functional.pad(coefficients, (0, padding)).unflatten(-1, (-1, run)).movedim(3, 2)
        scores = (unrotated @ basis.mT[:, :, None]) @ runs
        return scores.movedim(2, 3).flatten(3)[..., : self.num_tokens]

    def slice(self, start: int, stop: int) -> "KeyCodes":
        """Tokens ``start`` to ``stop`` as views; ``start`` is a multiple of the group size."""
        rotation = None if self.rotation is None else self.rotation.slice(start, stop)
        carries = self.carries_at(start)
        return replace(self.slice_tensors(start, stop), carries=carries, num_tokens=stop - start, rotation=rotation)

    def carries_at(self, token: int) -> Tensor:
        """The bytes ``[B, C]`` uint8 that streams go on from at ``token``, a multiple of 8."""
        return last_bytes(self.streams, self.carries, flat_widths(self.widths), token)

    def map(self, function: TensorFunction) -> "KeyCodes":
        """``function`` applied along the batch dimension of each tensor."""
        rotation = None if self.rotation is None else self.rotation.map_batch(function)
        return replace(self.map_tensors(function), rotation=rotation)

    def append(self, other: "KeyCodes") -> "KeyCodes":
        """These keys followed by ``other``'s, of the same plan and going on from these; these fill whole groups."""
        return self.append_tensors(other)._with_tokens_of(self, other)

    def fill(self, other: "KeyCodes") -> "KeyCodes":
        """These keys followed by ``other``'s, which were coded at the scales of the last group and have room in it."""
        start = self.num_tokens % GROUP_SIZE
        streams = filled(self.streams, other.streams, flat_widths(self.widths), start, other.num_tokens)
        return replace(self, streams=streams)._with_tokens_of(self, other)

    def _with_tokens_of(self, first: "KeyCodes", second: "KeyCodes") -> "KeyCodes":
        """These tensors, with what ``first`` and ``second`` together say of their tokens."""
        rotation = first.rotation
        if rotation is not None and second.rotation is not None:
            rotation = join_rotations([rotation, second.rotation])
        return replace(
            self,
            relative_error=joint_error(first, second),
            num_tokens=first.num_tokens + second.num_tokens,
            rotation=rotation,
        )

    def to_fields(self) -> dict[str, Field]:
        rotation = None if self.rotation is None else self.rotation.to_fields()
        more: dict[str, Field] = {"widths": self.widths, "num_tokens": self.num_tokens, "spans": self.spans}
        rows = None if self.rows is None else self.rows.to_fields()
        return {**self.tensors_to_fields(), **more, "rotation": rotation, "rows": rows}

    @classmethod
    def from_fields(cls, fields: Fields, shape: TokenShape) -> "KeyCodes":
        widths, num_tokens, rotation = _widths_of(fields, shape), fields.integer("num_tokens", 1), None
        rows = _rows_of(fields, shape, widths)
        if fields.has("rotation"):
            rotation = Rotation.from_fields(fields.sub("rotation"), shape.key_dim, shape.batch, num_tokens)
        sizes = key_sizes(shape.batch, shape.key_dim, widths, num_tokens, rows is None)
        tensors = cls.tensors_from_fields(fields, sizes)
        spans = fields.integers("spans")
        fields.require(len(spans) == (0 if rotation is None else rotation.num_pairs), "a span for each rotary pair")
        fields.require({0, 1, SPAN}.issuperset(spans), f"spans among 0, 1 and {SPAN}")
        return cls(**tensors, widths=widths, num_tokens=num_tokens, rotation=rotation, spans=spans, rows=rows)


def key_sizes(
    batch: int, key_dim: int, widths: Widths, num_tokens: int = 0, has_vectors: bool = True
) -> dict[str, int]:
    """The sizes that the declarations of ``KeyCodes`` and ``KeyPlan`` name; ``has_vectors`` is False with the model's
    basis."""
    return {
        "batch": batch,
        "heads": len(widths),
        "key_dim": key_dim,
        "tiles": num_tiles(num_tokens),
        "components": sum(map(len, widths)),
        "vectors": sum(map(len, widths)) if has_vectors else 0,
        "rows": sum(map(sum, widths)),
    }


def fixed_bytes(sizes: Sizes) -> int:
    """Bytes of the keys' codes that do not depend on the widths, without statistics."""
    return KeyCodes.bytes_without(("components", "vectors", "rows"), sizes)


def _widths_of(fields: Fields, shape: TokenShape) -> Widths:
    widths = fields.integer_lists("widths", 1, MAX_NBITS)
    falling = all(list(row) == sorted(row, reverse=True) and len(row) <= shape.key_dim for row in widths)
    fields.require(len(widths) == shape.heads and falling, f"falling widths of {shape.heads} heads")
    return widths


def _rows_of(fields: Fields, shape: TokenShape, widths: Widths) -> BasisRows | None:
    if not fields.has("rows"):
        return None
    return BasisRows.from_fields(fields.sub("rows"), shape.heads, shape.key_dim, tuple(map(len, widths)))


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
        vectors: ``[B, C, D]`` int8, head by head, by falling width; ``[B, 0, D]`` if the basis is the model's.
        row_scales: ``[B, C, 1]`` float32, of the rows of ``vectors``; ``[B, 0, 1]`` if the basis is the model's.
        vector_scales: ``[B, C, 1]`` float32, those of the codes; None until the first tokens are coded.
        widths: bits of each component.
        level: the water level that gave the widths.
        rows: the components' rows of the model's basis, or None.
    """

    vectors: Annotated[Tensor, Stored(torch.int8, ("batch", "vectors", "key_dim"))]
    row_scales: Annotated[Tensor, Stored(torch.float32, ("batch", "vectors", 1))]
    vector_scales: Tensor | None
    widths: Widths
    level: float
    rows: BasisRows | None = None

    @property
    def basis(self) -> tuple[Tensor, Tensor]:
        """The basis, ``[B or 1, C, D]`` int8, and the scales of its rows, ``[B or 1, C, 1]`` float32."""
        if self.rows is None:
            return self.vectors, self.row_scales
        device = self.vectors.device
        return self.rows.vectors(device), self.rows.row_scales(device)

    def map(self, function: TensorFunction) -> "KeyPlan":
        """``function`` applied along the batch dimension of each tensor."""
        scales = None if self.vector_scales is None else function(self.vector_scales)
        return replace(self.map_tensors(function), vector_scales=scales)

    def to_fields(self) -> dict[str, Field]:
        more: dict[str, Field] = {"vector_scales": self.vector_scales, "widths": self.widths, "level": self.level}
        return {**self.tensors_to_fields(), **more, "rows": None if self.rows is None else self.rows.to_fields()}

    @classmethod
    def from_fields(cls, fields: Fields, shape: TokenShape) -> "KeyPlan":
        widths = _widths_of(fields, shape)
        rows = _rows_of(fields, shape, widths)
        sizes = key_sizes(shape.batch, shape.key_dim, widths, has_vectors=rows is None)
        tensors, scales = cls.tensors_from_fields(fields, sizes), None
        if fields.has("vector_scales"):
            like_codes = KeyCodes.declarations()["vector_scales"].sizes(sizes)
            scales = fields.tensor("vector_scales", torch.float32, like_codes)
        return cls(**tensors, vector_scales=scales, widths=widths, level=fields.number("level"), rows=rows)


def plan(basis: Basis, widths: Tensor, level: float) -> KeyPlan:
    """The plan of ``widths [H, D]`` for the components of ``basis``, its rows rounded to int8."""
    falling, places = _falling(widths)
    rows = basis.vectors.flatten(1, 2)[:, row_numbers(places, widths.shape[1], basis.vectors.device).long()]
    return KeyPlan(*rounded_rows(rows), None, falling, level)


def plan_of_model(basis: ModelBasis, widths: Tensor, level: float, like: Tensor) -> KeyPlan:
    """The plan of ``widths [H, D]`` for the rows of a model's basis, for the batch and device of ``like``."""
    falling, places = _falling(widths)
    empty = like.new_empty(len(like), 0, basis.shape[1], dtype=torch.int8)
    no_scales = like.new_empty(len(like), 0, 1, dtype=torch.float32)
    return KeyPlan(empty, no_scales, None, falling, level, BasisRows(basis, places))


def _falling(widths: Tensor) -> tuple[Widths, Places]:
    """``widths [H, D]`` above zero in falling order, and the places where they were."""
    rows: list[list[int]] = widths.tolist()
    places: Places = tuple(
        tuple(sorted((place for place, width in enumerate(row) if width), key=lambda place: -row[place]))
        for row in rows
    )
    return tuple(tuple(row[place] for place in order) for row, order in zip(rows, places, strict=True)), places


def encode(
    statistics: KeyStatistics,
    plan: KeyPlan,
    carries: Tensor | None = None,
    scale_codes: Tensor | None = None,
    begins: bool = False,
) -> tuple[KeyCodes, KeyPlan]:
    """Code the keys of ``statistics`` by ``plan``; the second result is the plan with its ``vector_scales``.

    Args:
        statistics: of the keys.
        plan: with its ``vector_scales`` where earlier keys were coded by it.
        carries: ``[B, C]`` uint8, what the streams go on from; free if not given.
        scale_codes: ``[B, C, 1]`` uint8, where the keys, at most a group, join earlier ones in their group.
        begins: whether the keys begin another group, which others will join; ``scale_codes`` are of the group before.
    """
    x, metric = statistics.x, statistics.metric
    num_tokens, widths = statistics.num_tokens, flat_widths(plan.widths)
    vectors, row_scales = plan.basis
    basis = _by_head(vectors.float() * row_scales, plan.widths)
    is_own_metric = plan.rows is not None and metric is plan.rows.basis.on(x.device).metric
    if is_own_metric and plan.rows is not None:
        # Its rows are orthonormal.
        project = _by_head(plan.rows.inverse(x.device).mT, plan.widths).mT
    else:
        project = projection(basis, metric)
    by_head = project.mT @ x.mT
    coefficients = torch.cat([by_head[:, head, : len(row)] for head, row in enumerate(plan.widths)], 1)
    vector_scales, inverses = plan.vector_scales, None
    if scale_codes is not None:
        assert vector_scales is not None, "earlier keys have scales"
        tops = vector_scales / row_scales
        given = decode_scales(scale_codes, STEPS_PER_OCTAVE) * tops
        if begins:
            scale_codes = encode_scales(_expected_scales(given, coefficients, widths), STEPS_PER_OCTAVE, tops)[0]
            given = decode_scales(scale_codes, STEPS_PER_OCTAVE) * tops
        inverses = _inverses(given[..., 0], widths)
    encode_all = kernel.encode_keys if kernel.is_available() else quantize
    encoded = encode_all(coefficients, widths, CLIPS, carries, inverses=inverses)
    sums = encoded.energies, encoded.overlaps, encoded.squares
    scales = unbiased_scales(*sums)
    if vector_scales is None:
        vector_scales = _ROOM * scales.amax(-1, keepdim=True) * row_scales
    tops = vector_scales / row_scales
    if scale_codes is None:
        scale_codes = encode_scales(scales, STEPS_PER_OCTAVE, tops)[0]
    stored = decode_scales(scale_codes, STEPS_PER_OCTAVE).mul_(tops)
    rounding = squared_errors(*sums, stored).sum(-1) / num_tokens
    error = _relative_error(
        _by_head(rounding[..., None], plan.widths)[..., 0], basis, project, statistics.covariance, metric
    )
    codes = KeyCodes(
        streams=encoded.streams,
        carries=encoded.carries,
        scales=scale_codes.mT.contiguous(),
        vectors=plan.vectors,
        vector_scales=vector_scales,
        mean=statistics.mean,
        relative_error=error,
        widths=plan.widths,
        num_tokens=num_tokens,
        rotation=statistics.rotation,
        spans=statistics.spans,
        rows=plan.rows,
    )
    return codes, replace(plan, vector_scales=vector_scales)


def _inverses(scales: Tensor, widths: Sequence[int]) -> Tensor:
    """Factors ``[B, C]`` of coefficients that are coded at unbiased ``scales [B, C]``."""
    shrinkage = _of_widths(tuple(widths), scales.device)[0]
    return (1 / (scales * shrinkage).clamp_min(1 / trellis.LARGEST_INVERSE)).contiguous()


def _expected_scales(before: Tensor, coefficients: Tensor, widths: Sequence[int]) -> Tensor:
    """Scales ``[B, C, 1]`` for a group of which ``coefficients [B, C, n]`` are the first, behind one with the scales
    ``before [B, C, 1]``: those of a Gaussian of the mean variance, in which a whole group counts."""
    shrinkage, units = _of_widths(tuple(widths), before.device)
    per_deviation = (units * shrinkage)[:, None]
    counts = (coefficients != 0).sum(-1, keepdim=True)  # padding is zero
    others = (before * per_deviation).square() * (GROUP_SIZE - counts)
    return ((coefficients.square().sum(-1, keepdim=True) + others) / GROUP_SIZE).sqrt() / per_deviation


@lru_cache(maxsize=256)
def _of_widths(widths: tuple[int, ...], device: torch.device) -> Tensor:
    """``[2, C]`` float32: the least-squares scale over the unbiased one of a Gaussian, and the tables' units."""
    tables = trellis.tables()
    # What the steps of uniform quantizers are chosen for is nearly unbiased.
    shrinkage = [1 - DISTORTION[nbits] if nbits <= trellis.MAX_TRELLIS_NBITS else 1.0 for nbits in widths]
    units = [tables.units[nbits - 1] for nbits in widths]
    return torch.tensor([shrinkage, units], dtype=torch.float32, device=device)


def quantize(
    coefficients: Tensor,
    widths: Sequence[int],
    clips: Sequence[float],
    carries: Tensor | None = None,
    inverses: Tensor | None = None,
) -> kernel.Encoded:
    """``kernel.encode_keys`` in torch, plain and slow.

    A component's group is divided by its standard deviation, without padding, for the trellis; from 5 bits on the
    clipping point of least squared error is tried out, unless the group is not full or its scale is given.
    """
    groups, num_tokens = _groups(coefficients), coefficients.shape[-1]
    reconstructed = torch.zeros_like(groups)
    windows = torch.zeros_like(groups, dtype=torch.uint8)
    is_free = carries is None
    carries = coefficients.new_zeros(coefficients.shape[:2], dtype=torch.uint8) if carries is None else carries.clone()
    energies = groups.double().square().sum(-1)
    counts = (groups != 0).sum(-1).clamp_min(1)  # padding is zero
    deviations = (energies / counts).sqrt().float().clamp_min(torch.finfo(torch.float32).tiny)
    for nbits in sorted(set(widths)):
        chosen = [component for component, width in enumerate(widths) if width == nbits]
        x = groups[:, chosen]
        is_uniform = nbits > trellis.MAX_TRELLIS_NBITS
        reach = float(1 << (nbits - 1)) if is_uniform else trellis.REACHES[nbits - 1]
        by_peak = reach / x.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny)
        by_deviation = trellis.tables().units[nbits - 1] / deviations[:, chosen]
        inverse = by_deviation.minimum(by_peak).clamp_max(trellis.LARGEST_INVERSE)[..., None]
        if inverses is not None:
            inverse[:, :, 0, 0] = inverses[:, chosen]
        if is_uniform:
            codes = _uniform_codes(x, nbits, clips)
            # The tokens that a group still lacks are to be coded at its scale too.
            fixed = {0} if inverses is not None else set()
            for number in fixed | ({groups.shape[2] - 1} if num_tokens % GROUP_SIZE else set()):
                codes[:, :, number] = trellis.uniform_codes(x[:, :, number], inverse[:, :, number], nbits)
            windows[:, chosen] = codes << (MAX_NBITS - nbits)
            if is_free:
                carries[:, chosen] = 0
        else:
            inputs = trellis.inputs_of(x, inverse).flatten(2)[..., :num_tokens]
            before = None if is_free else carries[:, chosen].flatten()
            found, before = trellis.search(inputs.flatten(0, 1), trellis.distances(nbits), nbits, before)
            windows.flatten(2)[:, chosen, :num_tokens] = found.unflatten(0, inputs.shape[:2])
            carries[:, chosen] = before.unflatten(0, inputs.shape[:2])
        reconstructed[:, chosen] = trellis.entries_on(x.device)[nbits - 1][windows[:, chosen].long()]
    reconstructed.flatten(2)[..., num_tokens:] = 0
    windows.flatten(2)[..., num_tokens:] = 0
    shifts = torch.tensor([MAX_NBITS - nbits for nbits in widths], dtype=torch.uint8, device=windows.device)
    codes = windows.flatten(2) >> shifts[:, None]
    overlaps, squares = (groups.double() * reconstructed).sum(-1), reconstructed.double().square().sum(-1)
    return kernel.Encoded(pack(codes, widths), carries, energies.float(), overlaps.float(), squares.float())


def _uniform_codes(groups: Tensor, nbits: int, clips: Sequence[float]) -> Tensor:
    """Codes uint8 of ``groups [..., 128]``, at the clipping point after which they point most like the group."""
    half = 1 << (nbits - 1)
    peak = groups.abs().amax(-1, keepdim=True)
    best, codes = None, torch.zeros_like(groups)
    for clip in clips:
        inverse = 1 / (peak * clip / half).clamp_min(torch.finfo(groups.dtype).tiny)
        value = ((groups * inverse).clamp(-half, half).floor() + 0.5).clamp_max(half - 0.5)
        # The error once the scale is the least-squares one for these codes.
        overlap = (groups.double() * value).sum(-1, keepdim=True)
        along = overlap.square() / value.double().square().sum(-1, keepdim=True)
        better = torch.ones_like(along, dtype=torch.bool) if best is None else along > best
        best = along if best is None else torch.where(better, along, best)
        codes = torch.where(better, value, codes)
    return (codes + (half - 0.5)).to(torch.uint8)


def _groups(coefficients: Tensor) -> Tensor:
    """``[..., n]`` as ``[..., groups, 128]``, filled up with zeros."""
    padded = torch.nn.functional.pad(coefficients, (0, -coefficients.shape[-1] % GROUP_SIZE))
    return padded.unflatten(-1, (-1, GROUP_SIZE))


def dequantize(windows: Tensor, widths: Sequence[int], scales: Tensor) -> Tensor:
    """Coefficients ``[B, C, T]`` float32 of windows of ``widths [C]`` bits under ``scales [B, C, groups]``."""
    rows = _as_tensor(tuple(widths), windows.device) - 1
    entries = trellis.entries_on(windows.device)[rows[:, None], windows.long()]
    return entries * scales.repeat_interleave(GROUP_SIZE, dim=-1)[..., : windows.shape[-1]]


def expected_error(variances: Tensor, widths: Tensor) -> Tensor:
    """The expected distortion at ``widths``, summed over the last dimension."""
    distortion = torch.tensor(DISTORTION, dtype=torch.float32, device=variances.device)
    return (variances * distortion[widths]).sum(-1)


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
