"""The spectral codec: one water level for the keys of all layers, one basis for the blocks of each."""

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from unsloth_spectral.codec.block import Block, ExactBlock, SealedBlock
from unsloth_spectral.codec.codec import Codec, LayerCodec
from unsloth_spectral.codec.config import GROUP_SIZE, PRESETS, SpectralConfig
from unsloth_spectral.codec.model_basis import ModelBasis
from unsloth_spectral.codec.observed import Observed
from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.codec.spectral import keys as key_codec
from unsloth_spectral.codec.spectral import values as value_codec
from unsloth_spectral.codec.spectral.allocate import Budget, uniform_value_width, widths_at
from unsloth_spectral.codec.spectral.block import SpectralBlock
from unsloth_spectral.codec.spectral.keys import KeyCodes, KeyPlan
from unsloth_spectral.codec.spectral.metric import metric_of
from unsloth_spectral.codec.spectral.packing import MAX_NBITS
from unsloth_spectral.codec.spectral.statistics import Basis, KeyStatistics
from unsloth_spectral.codec.spectral.values import ValueCodes
from unsloth_spectral.codec.tensors import TensorFunction, TokenShape, storage_bytes
from unsloth_spectral.fields import Field, Fields
from unsloth_spectral.rope import Rotation, join_in_kind, spans_of

# Tokens sealed while decoding get their own basis if that lowers their error by this factor: for a block of 512 tokens
# a basis costs as much as 0.7 bits per element, and these would lower the error 2.6 times.
_WORTH_A_BASIS = 3.0
# The first tokens of a layer get the model's basis without a look at one of their own if they are fewer.
_LEAST_TOKENS_OF_A_BASIS = 1024
# In the model's basis, the variances of its texts count as those of so many tokens.
_EXPECTED_TOKENS = 128
# Tokens that a row must have, for a plan of all rows to serve its later tokens.
_LEAST_TOKENS_OF_A_ROW = 32
# A mean square of keys' relative errors that asks for no basis of their own, however small others are.
_HARMLESS_ERROR = 0.03
# In a known basis a prefill is sealed in multiples of the first, and later tokens in multiples of the second.
FIRST_UNIT, UNIT = 16, 32


class SpectralCodec(Codec):
    """Keys as codes of their principal components, values as codes of their Hadamard transform, within one budget.

    Attributes:
        config: the options.
        budget: for the keys of all layers or, with a profile, for keys and values.
        short_budget: the same for prefills shorter than a block.
        value_nbits: width of all values; None with a profile, by which the budget decides.
        on_statistics: called with the number of a layer and the statistics of its first keys, or None.
    """

    name = "spectral"
    config_type = SpectralConfig
    block_types = (SpectralBlock,)
    compared: ClassVar[dict[str, tuple[SpectralConfig, ...]]] = {
        "spectral": tuple(SpectralConfig(preset=preset) for preset in PRESETS)
    }
    uses_queries = True
    uses_profile = True

    def __init__(self, config: SpectralConfig, num_layers: int, profile: ModelProfile | None = None) -> None:
        bits, self.value_nbits = 2 * config.target_bits, None
        if profile is None:
            self.value_nbits = uniform_value_width(config.target_bits)
            bits -= self.value_nbits
        self.config, self._profile = config, profile
        self.on_statistics: Callable[[int, KeyStatistics], None] | None = None
        self.budget, self.short_budget = Budget(bits, num_layers, profile), Budget(bits, num_layers, profile)

    @property
    def has_bases(self) -> bool:
        """True if the profile has bases for the keys, and no error limit asks for more bits here and there."""
        return self._profile is not None and bool(self._profile.bases) and self.config.error_limit is None

    def basis_of(self, layer: int, tokens: ExactBlock) -> ModelBasis | None:
        """The model's basis for the keys of ``tokens``; None if the profile has none, or one of other heads."""
        bases = self._profile.bases if self._profile is not None and self.has_bases else ()
        fits = bool(bases) and bases[layer].shape == (tokens.keys.shape[1], tokens.keys.shape[-1])
        return bases[layer] if fits else None

    def layer(self, number: int) -> "SpectralLayerCodec":
        return SpectralLayerCodec(self, number)

    def to_fields(self) -> dict[str, Field]:
        return {"budget": self.budget.to_fields(), "short_budget": self.short_budget.to_fields()}

    def restore(self, fields: Fields) -> None:
        self.budget.restore(fields.sub("budget"))
        self.short_budget.restore(fields.sub("short_budget"))


class SpectralLayerCodec(LayerCodec):
    """One layer. The first tokens' mean and basis serve later tokens too, while they capture the energy of their keys.

    With a profile that has a basis for the layer, the first tokens take that basis unless one of their own would save
    more bits than it takes. Then sealing is coding alone, so it takes 32 tokens at a time, which go on in the last
    block's tile. Tokens that the plan does not suit stay exact, and behind them a whole block decides whether it gets a
    basis of its own.

    Without one, a prefill shorter than a block spends so many bits on its basis that it can pay for few components.
    Later blocks, with more tokens, can pay for more, so neither that basis nor its water level serves them.
    """

    def __init__(self, codec: SpectralCodec, number: int) -> None:
        self._codec, self._number = codec, number
        self._plan: KeyPlan | None = None
        self._mean: Tensor | None = None
        self._largest: Tensor | None = None
        # The mean square of the relative errors of so many later units; and whether the last one had far larger errors.
        self._usual_error, self._num_compared, self._waits = 0.0, 0, False

    @property
    def nbytes(self) -> int:
        # The blocks count the rest of the plan, the mean and the largest scale.
        return 0 if self._plan is None else storage_bytes(self._plan.row_scales)

    def unit(self, is_first: bool, num_sealed: int = 0) -> int:
        if not self._codec.has_bases or self._waits:
            return GROUP_SIZE if is_first else self._codec.config.block_size
        if is_first:
            return FIRST_UNIT
        # After a prefill of an odd number of first units, half a unit: then no later one lies in two tiles.
        return UNIT if num_sealed % FIRST_UNIT else UNIT - num_sealed % UNIT

    @property
    def wants_queries(self) -> bool:
        return self._plan is None or not self._codec.has_bases or self._waits

    def seal(
        self, tokens: ExactBlock, real: Tensor | None, observed: Observed, last: Block | None = None
    ) -> SealedBlock | None:
        last = last if isinstance(last, SpectralBlock) and self._is_by_plan(last) else None
        config, shared = self._codec.config, self._codec.basis_of(self._number, tokens)
        self._waits = self._waits or shared is None
        block = None
        if self._plan is not None and shared is not None and not self._waits:
            block = self._go_on(tokens, real, observed.rotation, last, shared)
            if block is None:
                self._waits = True
                if tokens.num_tokens < config.block_size:
                    return None
        if block is None:
            block = self._seal(tokens, real, observed, last)
        limit, errors = config.error_limit, (block.keys.relative_error, block.values.relative_error)
        return None if limit is not None and max(float(error.max()) for error in errors) > limit else block

    def _seal(
        self, tokens: ExactBlock, real: Tensor | None, observed: Observed, last: SpectralBlock | None
    ) -> SpectralBlock:
        """The tokens as a block, in the basis of earlier ones if it suits them."""
        spans = spans_of(observed.rotation)
        metric = metric_of(observed, tokens.keys.shape[1], tokens.keys.shape[-1], spans)
        run = KeyStatistics.of(tokens.keys, metric, observed.rotation, spans, self._mean, real)
        if self._codec.on_statistics is not None:
            self._codec.on_statistics(self._number, run)
        # A tile that is not full has other anchors.
        carries = None if last is None or last.num_tokens % GROUP_SIZE else last.carries_at(last.num_tokens)
        keys, plan = self._encode_keys(run, tokens, None if carries is None else carries[0])
        is_by_plan = self._plan is not None and keys.vectors is self._plan.vectors
        largest, value_carries = (self._largest, carries and carries[1]) if is_by_plan else (None, None)
        values = value_codec.encode(tokens.values, self._value_nbits(run, plan), largest, value_carries)
        limit = self._codec.config.error_limit
        if limit is not None:
            keys, plan = self._keys_within(limit, run, keys, plan)
            values = _values_within(limit, tokens.values, values)
        block = SpectralBlock(keys, values, tokens.keys.dtype)
        # The plan of a row that is padding, or nearly, cannot serve its later tokens.
        serves_all_rows = float(run.shares.min()) * run.num_tokens >= min(_LEAST_TOKENS_OF_A_ROW, run.num_tokens)
        has_shared = self._codec.basis_of(self._number, tokens) is not None
        is_to_keep = has_shared if self._plan is not None else not self._is_short(run, plan)
        if is_to_keep and block.is_finite and serves_all_rows:
            if plan is not self._plan or values.is_even:
                self._largest = values.largest
            self._plan, self._mean = plan, run.mean
            self._usual_error, self._num_compared = self._expected_error(run, plan, keys), 1
        # Units need a basis of the model: its metric stands for that of the queries.
        self._waits = self._plan is None or not has_shared
        return block

    def _go_on(
        self,
        tokens: ExactBlock,
        real: Tensor | None,
        rotation: Rotation | None,
        last: SpectralBlock | None,
        shared: ModelBasis,
    ) -> SpectralBlock | None:
        """The tokens coded by the plan, behind those of ``last`` if they can go on from it; None if the plan does not
        suit them."""
        assert self._plan is not None
        metric, spans = shared.on(tokens.keys.device).metric, spans_of(rotation)
        if last is not None and (last.keys.spans != spans or not _runs_on(last.keys.rotation, rotation)):
            last = None
        nbits = self._value_nbits_of_plan() if last is None else last.values.nbits
        start = 0 if last is None else last.num_tokens % GROUP_SIZE
        block, first, errors = last, 0, []
        # What has room in the last tile, then full tiles, then what begins another one.
        room = min(GROUP_SIZE - start if start else 0, tokens.num_tokens)
        full = room + (tokens.num_tokens - room) // GROUP_SIZE * GROUP_SIZE
        for stop in sorted({room, full, tokens.num_tokens} - {0}):
            part, here = tokens.slice(first, stop), None if rotation is None else rotation.slice(first, stop)
            shown = None if real is None else real[:, first:stop]
            before, scale_codes, is_filling = None, None, False
            carries = (None, None) if block is None else block.carries_at(block.num_tokens)
            if block is not None and block.num_tokens % GROUP_SIZE:
                filled = block.num_tokens // GROUP_SIZE * GROUP_SIZE
                earlier = block.keys.rotation
                before, is_filling = None if earlier is None else earlier.slice(filled, block.num_tokens), True
            if block is not None and (is_filling or part.num_tokens < GROUP_SIZE):
                scale_codes = block.keys.scales[:, -1, :, None]
            values = value_codec.encode(part.values, nbits, self._largest, carries[1])
            if values.largest is not self._largest:
                return None
            run = KeyStatistics.of(part.keys, metric, here, spans, self._mean, shown, before)
            keys, _ = key_codec.encode(run, self._plan, carries[0], scale_codes, begins=not is_filling)
            errors.append(keys.relative_error.float().square().mean(1))
            piece = SpectralBlock(keys, values, tokens.keys.dtype)
            if block is not None:
                piece = block.fill(piece) if is_filling else block.append(piece)
            block, first = piece, stop
        squares = torch.stack(errors)
        # Infinities and NaN are no more suited.
        if not float(squares.max()) <= max(_WORTH_A_BASIS * self._usual_error, _HARMLESS_ERROR):
            return None
        self._num_compared += 1
        self._usual_error += (float(squares.mean()) - self._usual_error) / self._num_compared
        return block

    def _expected_error(self, run: KeyStatistics, plan: KeyPlan, keys: KeyCodes) -> float:
        """The mean square of the relative errors of ``keys`` under the model's metric, by which those of later units
        are measured."""
        if plan.rows is None:
            # Measured in this text's metric, it may be smaller.
            return _WORTH_A_BASIS * float(keys.relative_error.float().square().mean())
        variances = run.coefficient_variances(plan.rows.basis.on(run.x.device).inverse)
        lost = key_codec.expected_error(variances, plan.rows.spread(plan.widths, run.x.device))
        return float((lost / variances.sum(-1).clamp_min(torch.finfo(lost.dtype).tiny)).mean())

    def _is_by_plan(self, block: SpectralBlock) -> bool:
        plan = self._plan
        is_same = plan is not None and block.keys.vector_scales is plan.vector_scales
        return is_same and block.values.largest is self._largest

    def join(self, last: Block, new: Block) -> Block | None:
        if not isinstance(last, SpectralBlock) or not isinstance(new, SpectralBlock):
            return None
        # Scales are those of the plan, so they are one object where the plan is one.
        same_keys = last.keys.vector_scales is new.keys.vector_scales and last.keys.spans == new.keys.spans
        same_values = last.values.nbits == new.values.nbits and last.values.largest is new.values.largest
        fills_groups = last.num_tokens % GROUP_SIZE == 0
        if not same_keys or not same_values or not fills_groups:
            return None
        ends = last.carries_at(last.num_tokens)
        if not torch.equal(ends[0], new.keys.carries) or not torch.equal(ends[1], new.values.carries):
            return None
        return last.append(new) if _runs_on(last.keys.rotation, new.keys.rotation) else None

    def map_batch(self, function: TensorFunction) -> None:
        plan, mean, largest = self._plan, self._mean, self._largest
        if plan is None or mean is None or largest is None:
            return
        self._plan, self._mean, self._largest = plan.map(function), function(mean), function(largest)

    def forget(self) -> None:
        self._plan = self._mean = self._largest = None
        self._usual_error, self._num_compared, self._waits = 0.0, 0, False

    def reset(self) -> None:
        self.forget()
        self._codec.budget.forget(self._number)
        self._codec.short_budget.forget(self._number)

    def to_fields(self) -> dict[str, Field]:
        plan = None if self._plan is None else self._plan.to_fields()
        usual: dict[str, Field] = {"error": self._usual_error, "units": self._num_compared, "waits": self._waits}
        return {"plan": plan, "mean": self._mean, "largest": self._largest, "usual": usual}

    def restore(self, fields: Fields, shape: TokenShape) -> None:
        self.forget()
        if fields.has("plan"):
            rows = (shape.batch, shape.heads)
            mean = fields.tensor("mean", torch.float16, (*rows, shape.key_dim))
            largest = fields.tensor("largest", torch.float32, (*rows, 1))
            self._plan, self._mean, self._largest = KeyPlan.from_fields(fields.sub("plan"), shape), mean, largest
            usual = fields.sub("usual")
            self._usual_error, self._num_compared = usual.number("error"), usual.integer("units")
            self._waits = usual.flag("waits")

    def _encode_keys(self, run: KeyStatistics, tokens: ExactBlock, carries: Tensor | None) -> tuple[KeyCodes, KeyPlan]:
        """Encode the keys in the basis of earlier blocks, going on from ``carries``, or, if it does not suit every row,
        in a basis of their own."""
        if self._plan is None:
            return key_codec.encode(run, self._first_plan(run, tokens))
        basis = run.basis()
        if not bool(run.has_tokens.any()):
            return key_codec.encode(run, _empty_plan(run, basis))
        level = self._plan.level
        widths = self._widths_at(level, run, basis, self._first_bit_cost(run))
        keys, _ = key_codec.encode(run, self._plan, carries)
        # Row by row: an average over rows would hide a row that the basis does not suit.
        lost = (keys.relative_error.float().square() * basis.variances.sum(-1)).sum(-1)
        expected = key_codec.expected_error(basis.variances, widths).sum(-1)
        if bool((lost <= _WORTH_A_BASIS * expected).all()):
            return keys, self._plan
        return key_codec.encode(run, key_codec.plan(basis, widths, level))

    def _first_plan(self, run: KeyStatistics, tokens: ExactBlock) -> KeyPlan:
        """The plan of a layer's first tokens: in the model's basis or, if that pays, in one of their own."""
        if not bool(run.has_tokens.any()):
            # All rows are padding: there is no variance to allocate bits by.
            return _empty_plan(run, run.basis())
        values, shared = tokens.values, self._codec.basis_of(self._number, tokens)
        if shared is not None:
            matrices = shared.on(run.x.device)
            variances = run.variances_in(matrices.rows, matrices.inverse)
            own = float(run.shares.sum()) * run.num_tokens
            expected = (run.over_tokens(variances) * own + matrices.variances * _EXPECTED_TOKENS) / (
                own + _EXPECTED_TOKENS
            )
            widths, level = self._allocate(self._codec.budget, run, expected, values, has_vectors=False)
            plan = key_codec.plan_of_model(shared, widths, level, run.x)
            if run.num_tokens < _LEAST_TOKENS_OF_A_BASIS or not self._is_own_basis_worth(run, variances, plan):
                return plan
            self._codec.budget.forget(self._number)
        basis = run.basis()
        budget = self._codec.short_budget if self._is_short(run) else self._codec.budget
        widths, level = self._allocate(budget, run, run.over_tokens(basis.variances), values)
        return key_codec.plan(basis, widths, level)

    def _allocate(
        self, budget: Budget, run: KeyStatistics, variances: Tensor, values: Tensor, has_vectors: bool = True
    ) -> tuple[Tensor, float]:
        """Widths ``[H, D]`` of components of ``variances [H, D]``, and their level."""
        first_bit_cost = self._first_bit_cost(run, has_vectors)
        fixed_cost, elements = self._fixed_cost(run, values.shape[-1], has_vectors), values.shape[1] * values.shape[-1]
        widths = budget.allocate(self._number, variances, first_bit_cost, fixed_cost, elements)
        return widths, budget.level_of(self._number)

    def _is_own_basis_worth(self, run: KeyStatistics, variances: Tensor, plan: KeyPlan) -> bool:
        """True if a basis of their own would save more bits than it takes: ``variances [B, H, D]`` are those of the
        components in the model's basis.

        At equal error a Gaussian takes log2(1 + variance / noise) / 2 bits in each component (Cover & Thomas, theorem
        10.3.3), and in a basis of its own the sum of these logarithms is that of a determinant.
        """
        if not bool(run.has_tokens.all()):
            return False
        # A bit more lowers the noise by 2 ln 2 times the noise, which is what the level asks for.
        noise = (
            plan.level / (2 * math.log(2)) / self._codec.budget.weighted(self._number, torch.ones_like(variances[0]))
        )
        in_model = (1 + variances / noise).log2().sum(-1)
        root = torch.linalg.cholesky_ex(run.metric).L
        own = root.mT @ run.covariance @ root / noise[..., None]
        own.diagonal(dim1=-2, dim2=-1).add_(1)
        factor = torch.linalg.cholesky_ex((own + own.mT) / 2).L
        in_own = 2 * factor.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(factor.dtype).tiny).log2().sum(-1)
        saved = float((in_model - in_own).sum()) / 2 * run.num_tokens
        sizes = key_codec.key_sizes(len(run.x), run.x.shape[-1], plan.widths)
        return saved > 8 * (KeyPlan.bytes_of("vectors", sizes) + KeyPlan.bytes_of("row_scales", sizes))

    def _keys_within(self, limit: float, run: KeyStatistics, keys: KeyCodes, plan: KeyPlan) -> tuple[KeyCodes, KeyPlan]:
        """Raise the widths bit by bit until the error is within the limit or every component has eight bits."""
        widths, level, basis = None, plan.level, None
        while float(keys.relative_error.max()) > limit and (widths is None or int(widths.min()) < MAX_NBITS):
            level /= 4
            basis = run.basis() if basis is None else basis
            widths = self._widths_at(level, run, basis, 1.0)
            keys, plan = key_codec.encode(run, key_codec.plan(basis, widths, level))
        return keys, plan

    def _widths_at(self, level: float, run: KeyStatistics, basis: Basis, first_bit_cost: float) -> Tensor:
        variances = self._codec.budget.weighted(self._number, run.over_tokens(basis.variances))
        return widths_at(level, variances, first_bit_cost)

    def _value_nbits_of_plan(self) -> int:
        """Width of later tokens' values."""
        if self._codec.value_nbits is not None:
            return self._codec.value_nbits
        return self._codec.budget.value_nbits_of(self._number)

    def _value_nbits(self, run: KeyStatistics, plan: KeyPlan) -> int:
        if self._codec.value_nbits is not None:
            return self._codec.value_nbits
        if not bool(run.has_tokens.any()):
            return 1
        is_short = self._plan is None and self._is_short(run, plan)
        budget = self._codec.short_budget if is_short else self._codec.budget
        return budget.value_nbits_of(self._number)

    def _is_short(self, run: KeyStatistics, plan: KeyPlan | None = None) -> bool:
        """True if a basis of their own costs these tokens so much that later ones should get another."""
        return run.num_tokens < self._codec.config.block_size and (plan is None or plan.rows is None)

    def _first_bit_cost(self, run: KeyStatistics, has_vectors: bool = True) -> float:
        """Bits per token of a component's first bit, which also pays for its scales, its carry, its row of the basis
        (``has_vectors``) and, if the plan is kept, the scale of that row."""
        one = {**self._key_sizes(run), "components": 1, "vectors": int(has_vectors)}
        nbytes = KeyCodes.bytes_per("components", one) + KeyCodes.bytes_of("vectors", one)
        if run.num_tokens >= self._codec.config.block_size:
            nbytes += KeyPlan.bytes_of("row_scales", one)
        return 1 + 8 * nbytes / self._tokens_of_costs(run, has_vectors)

    def _fixed_cost(self, run: KeyStatistics, value_dim: int, has_vectors: bool = True) -> float:
        """Bits per token besides the widths: the keys' mean, this layer's share of the positions, and the values'
        scales and carries.

        Uneven positions take more bytes; the budget does not pay for those.
        """
        _, heads, num_tokens, head_dim = run.x.shape
        positions = 8 * head_dim / self._codec.budget.num_layers
        keys = key_codec.fixed_bytes(self._key_sizes(run))
        sizes = value_codec.value_sizes(1, heads, value_dim, MAX_NBITS, num_tokens)
        return 8 * (positions + keys + value_codec.fixed_bytes(sizes)) / self._tokens_of_costs(run, has_vectors)

    def _tokens_of_costs(self, run: KeyStatistics, has_vectors: bool) -> int:
        """Among how many tokens costs are shared: in the model's basis, later tokens join these."""
        return run.num_tokens if has_vectors else max(run.num_tokens, self._codec.config.block_size)

    def _key_sizes(self, run: KeyStatistics) -> dict[str, int]:
        """The sizes of one row's codes, without components."""
        _, heads, num_tokens, head_dim = run.x.shape
        return key_codec.key_sizes(1, head_dim, ((),) * heads, num_tokens)


def _runs_on(before: Rotation | None, behind: Rotation | None) -> bool:
    """True if tokens at ``behind`` can join tokens at ``before`` in one block."""
    if before is None or behind is None:
        return before is behind
    return join_in_kind(before, behind) is not None


def _empty_plan(run: KeyStatistics, basis: Basis) -> KeyPlan:
    widths = torch.zeros(basis.variances.shape[1:], dtype=torch.int64, device=run.x.device)
    return key_codec.plan(basis, widths, 1.0)


def _values_within(limit: float, values: Tensor, codes: ValueCodes) -> ValueCodes:
    nbits = codes.nbits
    while float(codes.relative_error.max()) > limit and nbits < MAX_NBITS:
        nbits += 1
        codes = value_codec.encode(values, nbits)
    return codes
