"""Turning exact tokens into a sealed block, by either codec. One sealer serves one layer."""

from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor

from unsloth_spectral.codec import keys as key_codec
from unsloth_spectral.codec import values as value_codec
from unsloth_spectral.codec.allocate import KeyBudget, value_widths, widths_at
from unsloth_spectral.codec.basis import principal_basis
from unsloth_spectral.codec.block import Block, ExactBlock, SpectralBlock, seal
from unsloth_spectral.codec.coded import CodedBlock
from unsloth_spectral.codec.config import GROUP_SIZE, SpectralConfig
from unsloth_spectral.codec.keys import KeyPlan
from unsloth_spectral.codec.observed import Observed
from unsloth_spectral.codec.packing import MAX_NBITS
from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.codec.tensors import storage_bytes
from unsloth_spectral.rope import Rotation

# Tokens sealed while decoding get a basis of their own where that lowers their error this much: a basis costs as much
# as 0.7 bits per element of a block of 512 tokens, and those would lower it 2.6 times.
_WORTH_A_BASIS = 3.0


SealedBlock: TypeAlias = SpectralBlock | CodedBlock


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

    def forget(self) -> None:
        """The blocks sealed before were changed: nothing of them is to be used again."""
        ...

    def reset(self) -> None: ...


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
        if isinstance(last, SpectralBlock) and isinstance(new, SpectralBlock) and last.block_length == new.block_length:
            return last.stack(new)
        return None

    def forget(self) -> None:
        pass

    def reset(self) -> None:
        pass


def make_sealers(config: SpectralConfig, num_layers: int, profile: ModelProfile | None = None) -> list[Sealer]:
    """One sealer for each of ``num_layers`` layers, which share one budget."""
    if config.codec == "rank":
        return [RankSealer(config) for _ in range(num_layers)]
    value_nbits = value_widths(config.target_bits, num_layers, profile)
    budget = KeyBudget(2 * config.target_bits - sum(value_nbits) / num_layers, num_layers)
    return [SpectralSealer(config, budget, layer, nbits) for layer, nbits in enumerate(value_nbits)]


@dataclass(slots=True)
class SpectralSealer:
    """The spectral codec: the prefill's mean and basis serve later blocks too, while they capture their energy.

    Attributes:
        config: the options.
        budget: of the keys and of the values' scales, shared by all layers of a cache.
        layer: this layer's place among those that share the budget.
        value_nbits: width of this layer's values.
    """

    config: SpectralConfig
    budget: KeyBudget
    layer: int
    value_nbits: int
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
        keys, plan, reused = self._encode_keys(x, mean, metric, observed.rotation, is_rotated)
        values = value_codec.encode(tokens.values, self.value_nbits, self._largest if reused else None)
        keys, plan, values = self._within_limit(x, metric, tokens.values, keys, plan, values)
        limit = self.config.error_limit
        if limit is not None and max(float(keys.relative_error.max()), float(values.relative_error.max())) > limit:
            return None
        if self._plan is None:
            self._plan, self._mean, self._largest = plan, mean, values.largest
        return CodedBlock(keys, values, tokens.keys.dtype)

    def join(self, last: Block, new: Block) -> Block | None:
        if not isinstance(last, CodedBlock) or not isinstance(new, CodedBlock):
            return None
        same = last.keys.vectors is new.keys.vectors and last.values.nbits == new.values.nbits
        same = same and (last.keys.rotation is None) == (new.keys.rotation is None)
        whole = last.num_tokens % GROUP_SIZE == 0
        if same and whole and last.values.largest is new.values.largest:
            return last.append(new)
        return None

    def forget(self) -> None:
        self._plan = self._mean = self._largest = None

    def reset(self) -> None:
        self.forget()
        self.budget.reset()

    def _encode_keys(
        self, x: Tensor, mean: Tensor, metric: Tensor, rotation: Rotation | None, is_rotated: bool
    ) -> tuple[key_codec.KeyCodes, KeyPlan, bool]:
        own = principal_basis(x, metric)
        variances = own.variances.mean(0)
        first_bit_cost = self._first_bit_cost(x.shape[-2], x.shape[-1])
        if self._plan is None:
            widths = self.budget.allocate(self.layer, variances, first_bit_cost, self._fixed_cost(x))
            level = self.budget.level_of(self.layer)
        else:
            level = self._plan.level
            widths = widths_at(level, variances, first_bit_cost)
            keys, plan = key_codec.encode(x, self._plan, metric, mean, rotation, is_rotated)
            lost = (keys.relative_error.float().square().mean(0) * variances.sum(-1)).sum()
            if float(lost) <= _WORTH_A_BASIS * float(key_codec.expected_error(variances, widths).sum()):
                return keys, plan, True
        plan = key_codec.plan(own, widths, level)
        keys, plan = key_codec.encode(x, plan, metric, mean, rotation, is_rotated)
        return keys, plan, False

    def _within_limit(
        self,
        x: Tensor,
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
            own = principal_basis(x, metric) if own is None else own
            level /= 4
            widths = widths_at(level, own.variances.mean(0), 1.0)
            plan = key_codec.plan(own, widths, level)
            keys, plan = key_codec.encode(x, plan, metric, keys.mean, keys.rotation, keys.is_rotated)
        nbits = coded.nbits
        while float(coded.relative_error.max()) > limit and nbits < MAX_NBITS:
            nbits += 1
            coded = value_codec.encode(values, nbits)
        return keys, plan, coded

    @staticmethod
    def _first_bit_cost(num_tokens: int, head_dim: int) -> float:
        """Bits a token of a component's first bit: its scales and its row of the basis are paid with it.

        The row is ``head_dim`` bytes in the basis and 13 of scales and head, here and in the block.
        """
        return 1 + key_codec.SCALE_BITS + 8 * (head_dim + 13) / num_tokens

    @staticmethod
    def _fixed_cost(x: Tensor) -> float:
        """Bits a token that go whatever the widths: the keys' mean, where tokens stand, and the values' scales."""
        return (16 * x.shape[1] * x.shape[-1] + 64 * x.shape[-1]) / x.shape[-2] + 8 * x.shape[1]
