"""Turning exact tokens into a sealed block, by either codec. One sealer serves one layer."""

from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from unsloth_spectral.codec.block import Block, ExactBlock, RankBlock, seal
from unsloth_spectral.codec.config import GROUP_SIZE, SpectralConfig
from unsloth_spectral.codec.observed import Observed
from unsloth_spectral.codec.spectral import keys as key_codec
from unsloth_spectral.codec.spectral import values as value_codec
from unsloth_spectral.codec.spectral.allocate import Budget, uniform_value_width, widths_at
from unsloth_spectral.codec.spectral.block import SpectralBlock
from unsloth_spectral.codec.spectral.keys import KeyPlan
from unsloth_spectral.codec.spectral.packing import MAX_NBITS
from unsloth_spectral.codec.spectral.profile import ModelProfile
from unsloth_spectral.codec.spectral.statistics import covariance, principal_basis
from unsloth_spectral.codec.tensors import TensorFunction, TokenShape, storage_bytes
from unsloth_spectral.fields import Field, Fields
from unsloth_spectral.rope import Rotation, join_in_kind

# Tokens sealed while decoding get a basis of their own where that lowers their error this much: a basis costs as much
# as 0.7 bits per element of a block of 512 tokens, and those would lower it 2.6 times.
_WORTH_A_BASIS = 3.0


SealedBlock: TypeAlias = RankBlock | SpectralBlock


class Sealer(Protocol):
    """What a layer asks of a codec."""

    @property
    def nbytes(self) -> int:
        """Bytes held between sealings."""
        ...

    def unit(self, is_first: bool) -> int:
        """Tokens sealed are a multiple of this; ``is_first`` for the first sealing of a layer."""
        ...

    def seal(self, tokens: ExactBlock, real: Tensor | None, observed: Observed) -> SealedBlock | None:
        """A sealed block of ``tokens``, finite; None where none within the error limit exists.

        ``real [B, n]`` bool leaves out padding. ``observed`` is what is known of these tokens' positions and queries.
        """
        ...

    def join(self, last: Block, new: Block) -> Block | None:
        """Both as one block, or None where they do not fit together."""
        ...

    def map_batch(self, function: TensorFunction) -> None:
        """Apply ``function`` along the batch dimension, as was done to the blocks sealed before.

        It gives the same result for the same tensor, so that later blocks still join those.
        """
        ...

    def forget(self) -> None:
        """The blocks sealed before were cut: nothing of them is to be used again."""
        ...

    def reset(self) -> None: ...

    def to_fields(self) -> dict[str, Field]:
        """What later sealings depend on, besides what layers share."""
        ...

    def restore(self, fields: Fields, shape: TokenShape) -> None:
        """Go on as the sealer whose ``to_fields`` these were."""
        ...

    def shared_to_fields(self) -> dict[str, Field]:
        """What all sealers of a cache share, of any of them."""
        ...

    def restore_shared(self, fields: Fields) -> None:
        """Go on with what was shared."""
        ...


class RankSealer:
    """The rank codec: every block on its own."""

    nbytes = 0

    def __init__(self, config: SpectralConfig) -> None:
        self._config = config

    def unit(self, is_first: bool) -> int:
        return self._config.block_size

    def seal(self, tokens: ExactBlock, real: Tensor | None, observed: Observed) -> SealedBlock | None:
        return seal(tokens.keys, tokens.values, self._config)

    def join(self, last: Block, new: Block) -> Block | None:
        if isinstance(last, RankBlock) and isinstance(new, RankBlock) and last.block_length == new.block_length:
            return last.stack(new)
        return None

    def map_batch(self, function: TensorFunction) -> None:
        pass

    def forget(self) -> None:
        pass

    def reset(self) -> None:
        pass

    def to_fields(self) -> dict[str, Field]:
        return {}

    def restore(self, fields: Fields, shape: TokenShape) -> None:
        pass

    def shared_to_fields(self) -> dict[str, Field]:
        return {}

    def restore_shared(self, fields: Fields) -> None:
        pass


def make_sealers(config: SpectralConfig, num_layers: int, profile: ModelProfile | None = None) -> list[Sealer]:
    """One sealer for each of ``num_layers`` layers, which share one budget."""
    if config.codec == "rank":
        return [RankSealer(config) for _ in range(num_layers)]
    bits, value_nbits = 2 * config.target_bits, None
    if profile is None:
        value_nbits = uniform_value_width(config.target_bits)
        bits -= value_nbits
    budget, short_budget = Budget(bits, num_layers, profile), Budget(bits, num_layers, profile)
    return [SpectralSealer(config, budget, short_budget, layer, value_nbits) for layer in range(num_layers)]


@dataclass(slots=True)
class SpectralSealer:
    """The spectral codec: the prefill's mean and basis serve later blocks too, while they capture their energy.

    A prefill shorter than a block pays so much of its bits for its basis that few components are left: more are worth
    their bits once more tokens share them, so that basis serves no later block, and neither does its water level.

    Attributes:
        config: the options.
        budget: shared by all layers of a cache.
        short_budget: the same for runs shorter than a block.
        layer: this layer's place among those that share the budget.
        value_nbits: width of this layer's values; None where the budget decides, by the model's profile.
    """

    config: SpectralConfig
    budget: Budget
    short_budget: Budget
    layer: int
    value_nbits: int | None
    _plan: KeyPlan | None = None
    _mean: Tensor | None = None
    _largest: Tensor | None = None

    @property
    def nbytes(self) -> int:
        # The rest of the plan, the mean and the largest scale belong to the blocks.
        held = () if self._plan is None else (self._plan.row_scales, self._plan.tops)
        return storage_bytes(*(tensor for tensor in held if tensor is not None))

    def unit(self, is_first: bool) -> int:
        return GROUP_SIZE if is_first else self.config.block_size

    def seal(self, tokens: ExactBlock, real: Tensor | None, observed: Observed) -> SealedBlock | None:
        is_rotated = self.config.key_frame == "rotated"
        x, mean = key_codec.centre(tokens.keys, self._mean, observed.rotation, is_rotated, real)
        metric = observed.metric(x.shape[1], x.shape[-1], is_rotated).to(x.device)
        elements = tokens.values.shape[1] * tokens.values.shape[-1]
        spread = covariance(x)
        shares = torch.ones(len(x), dtype=x.dtype, device=x.device) if real is None else real.to(x.dtype).mean(1)
        keys, plan, reused = self._encode_keys(x, shares, spread, mean, metric, observed.rotation, is_rotated, elements)
        nbits = self._value_nbits(x, shares)
        values = value_codec.encode(tokens.values, nbits, self._largest if reused else None)
        keys, plan, values = self._within_limit(x, shares, spread, metric, tokens.values, keys, plan, values)
        limit = self.config.error_limit
        if limit is not None and max(float(keys.relative_error.max()), float(values.relative_error.max())) > limit:
            return None
        block = SpectralBlock(keys, values, tokens.keys.dtype)
        # What was made for a row of padding alone serves none of its later tokens.
        is_of_all = bool((shares > 0).all())
        if self._plan is None and block.is_finite and is_of_all and not self._is_short(x):
            self._plan, self._mean, self._largest = plan, mean, values.largest
        return block

    def join(self, last: Block, new: Block) -> Block | None:
        if not isinstance(last, SpectralBlock) or not isinstance(new, SpectralBlock):
            return None
        same = last.keys.vectors is new.keys.vectors and last.values.nbits == new.values.nbits
        whole = last.num_tokens % GROUP_SIZE == 0
        if not same or not whole or last.values.largest is not new.values.largest:
            return None
        before, behind = last.keys.rotation, new.keys.rotation
        if before is None or behind is None:
            return last.append(new) if before is behind else None
        return None if join_in_kind(before, behind) is None else last.append(new)

    def map_batch(self, function: TensorFunction) -> None:
        plan, mean, largest = self._plan, self._mean, self._largest
        if plan is None or mean is None or largest is None:
            return
        tops = None if plan.tops is None else function(plan.tops)
        self._plan = replace(plan, vectors=function(plan.vectors), row_scales=function(plan.row_scales), tops=tops)
        self._mean, self._largest = function(mean), function(largest)

    def forget(self) -> None:
        self._plan = self._mean = self._largest = None

    def reset(self) -> None:
        self.forget()
        self.budget.reset()
        self.short_budget.reset()

    def to_fields(self) -> dict[str, Field]:
        plan = None if self._plan is None else self._plan.to_fields()
        return {"plan": plan, "mean": self._mean, "largest": self._largest}

    def restore(self, fields: Fields, shape: TokenShape) -> None:
        self.forget()
        if fields.has("plan"):
            rows = (shape.batch, shape.heads)
            mean = fields.tensor("mean", torch.float16, (*rows, shape.key_dim))
            largest = fields.tensor("largest", torch.float32, (*rows, 1))
            self._plan, self._mean, self._largest = KeyPlan.from_fields(fields.sub("plan"), shape), mean, largest

    def shared_to_fields(self) -> dict[str, Field]:
        return {"budget": self.budget.to_fields(), "short_budget": self.short_budget.to_fields()}

    def restore_shared(self, fields: Fields) -> None:
        self.budget.restore(fields.sub("budget"))
        self.short_budget.restore(fields.sub("short_budget"))

    def _encode_keys(
        self,
        x: Tensor,
        shares: Tensor,
        spread: Tensor,
        mean: Tensor,
        metric: Tensor,
        rotation: Rotation | None,
        is_rotated: bool,
        value_elements: int,
    ) -> tuple[key_codec.KeyCodes, KeyPlan, bool]:
        own = principal_basis(spread, metric)
        variances = _over_tokens(own.variances, shares)
        first_bit_cost = self._first_bit_cost(x)
        if not bool((shares > 0).any()):
            # Padding throughout, which says nothing of what tokens cost.
            widths, level = torch.zeros_like(variances, dtype=torch.int64), 1.0
        elif self._plan is None:
            budget = self._budget(x)
            fixed_cost = self._fixed_cost(x)
            widths = budget.allocate(self.layer, variances, first_bit_cost, fixed_cost, value_elements)
            level = budget.level_of(self.layer)
        else:
            level = self._plan.level
            widths = widths_at(level, self.budget.weighted(self.layer, variances), first_bit_cost)
            keys, plan = key_codec.encode(x, spread, self._plan, metric, mean, rotation, is_rotated)
            # Row by row: a row that the basis does not suit is not to be outvoted.
            lost = (keys.relative_error.float().square() * own.variances.sum(-1)).sum(-1)
            if bool((lost <= _WORTH_A_BASIS * key_codec.expected_error(own.variances, widths).sum(-1)).all()):
                return keys, plan, True
        plan = key_codec.plan(own, widths, level)
        keys, plan = key_codec.encode(x, spread, plan, metric, mean, rotation, is_rotated)
        return keys, plan, False

    def _within_limit(
        self,
        x: Tensor,
        shares: Tensor,
        spread: Tensor,
        metric: Tensor,
        values: Tensor,
        keys: key_codec.KeyCodes,
        plan: KeyPlan,
        coded: value_codec.ValueCodes,
    ) -> tuple[key_codec.KeyCodes, KeyPlan, value_codec.ValueCodes]:
        """A bit more for every component, and again, until the error is within the limit or eight bits are reached."""
        limit = self.config.error_limit
        if limit is None:
            return keys, plan, coded
        own, widths, level = None, None, plan.level
        while float(keys.relative_error.max()) > limit and (widths is None or int(widths.min()) < MAX_NBITS):
            own = principal_basis(spread, metric) if own is None else own
            level /= 4
            widths = widths_at(level, self.budget.weighted(self.layer, _over_tokens(own.variances, shares)), 1.0)
            plan = key_codec.plan(own, widths, level)
            keys, plan = key_codec.encode(x, spread, plan, metric, keys.mean, keys.rotation, keys.is_rotated)
        nbits = coded.nbits
        while float(coded.relative_error.max()) > limit and nbits < MAX_NBITS:
            nbits += 1
            coded = value_codec.encode(values, nbits)
        return keys, plan, coded

    def _value_nbits(self, x: Tensor, shares: Tensor) -> int:
        if self.value_nbits is not None:
            return self.value_nbits
        return self._budget(x).value_nbits_of(self.layer) if bool((shares > 0).any()) else 1

    def _budget(self, x: Tensor) -> Budget:
        return self.short_budget if self._plan is None and self._is_short(x) else self.budget

    def _is_short(self, x: Tensor) -> bool:
        return x.shape[-2] < self.config.block_size

    def _first_bit_cost(self, x: Tensor) -> float:
        """Bits a token of a component's first bit: its scales and its row of the basis are paid with it.

        The row is ``head_dim`` bytes in the basis and 4 of scales in the block, 8 more here where the plan is kept.
        """
        row = x.shape[-1] + (4 if self._is_short(x) else 12)
        return 1 + key_codec.SCALE_BITS + 8 * row / x.shape[-2]

    def _fixed_cost(self, x: Tensor) -> float:
        """Bits a token that go whatever the widths: the keys' mean, this layer's share of where tokens stand, and the
        values' scales. Uneven positions cost more, which the keys are not to pay for."""
        positions = 64 * x.shape[-1] / self.budget.num_layers
        return (16 * x.shape[1] * x.shape[-1] + positions) / x.shape[-2] + 8 * x.shape[1]


def _over_tokens(variances: Tensor, shares: Tensor) -> Tensor:
    """The mean of ``variances [B, H, D]`` over the tokens of all rows, of which padding is none: ``shares [B]`` of the
    tokens are real."""
    return variances.sum(0) / shares.sum().clamp_min(torch.finfo(shares.dtype).tiny)
