"""The interface of a codec: one object per cache for options and shared state, and one per layer."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

from torch import Tensor

from unsloth_spectral.codec.block import Block, ExactBlock, SealedBlock
from unsloth_spectral.codec.observed import Observed
from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.codec.tensors import TensorFunction, TokenShape
from unsloth_spectral.fields import Field, Fields


class CodecConfig(Protocol):
    """Options of a codec: a frozen dataclass of plain values, checked when it is made.

    Attributes:
        block_size: tokens sealed together while decoding.
        num_sink_tokens: first tokens of each sequence that stay exact.
        residual_length: newest tokens that are never sealed.
    """

    @property
    def block_size(self) -> int: ...

    @property
    def num_sink_tokens(self) -> int: ...

    @property
    def residual_length(self) -> int: ...

    @property
    def codec(self) -> str:
        """The name under which the codec is registered."""
        ...

    @property
    def title(self) -> str:
        """The name of these options in tables."""
        ...

    def check_head_dim(self, head_dim: int) -> None:
        """Raise InvalidArgumentError where an option does not fit the model's ``head_dim``."""
        ...


class LayerCodec(ABC):
    """Seals the tokens of one layer, and holds that layer's state between sealings.

    A codec without such state implements ``unit`` and ``seal`` alone.
    """

    @property
    def nbytes(self) -> int:
        """Bytes kept between sealings, beside those of the blocks."""
        return 0

    @abstractmethod
    def unit(self, is_first: bool, num_sealed: int = 0) -> int:
        """Tokens are sealed in multiples of this; ``is_first`` for the first sealing of a layer, of which
        ``num_sealed`` tokens are sealed."""

    @abstractmethod
    def seal(
        self, tokens: ExactBlock, real: Tensor | None, observed: Observed, last: Block | None = None
    ) -> SealedBlock | None:
        """A sealed block of finite ``tokens``; None where the codec's error limit cannot be met.

        ``real [B, n]`` bool leaves out padding. ``observed`` holds the positions and queries of these tokens. ``last``
        is the block before them: the new block may hold its tokens too, in front, and then takes its place.
        """

    @property
    def wants_queries(self) -> bool:
        """True if the next sealing uses queries."""
        return True

    def join(self, last: Block, new: Block) -> Block | None:
        """Both blocks as one, or None if they cannot be joined."""
        return None

    # A codec without state inherits these.

    def map_batch(self, function: TensorFunction) -> None:  # noqa: B027
        """Apply ``function`` along the batch dimension, as was done to the blocks sealed before.

        The function returns the same result for the same tensor, so that later blocks can still join earlier ones.
        """

    def forget(self) -> None:  # noqa: B027
        """Drop the state: the sealed blocks were cut, and later blocks share nothing with them."""

    def reset(self) -> None:
        """Drop the state of an emptied layer, and return its share of the budget."""
        self.forget()

    def to_fields(self) -> dict[str, Field]:
        """This layer's state between sealings, without the state that layers share."""
        return {}

    def restore(self, fields: Fields, shape: TokenShape) -> None:  # noqa: B027
        """Restore the state that ``to_fields`` returned.

        Raises:
            LoadError: a field is missing, or does not fit ``shape``.
        """


class Codec(ABC):
    """One codec of one cache: its options, its budget, its profile.

    Attributes:
        name: the name in the registry, and of ``config.codec``.
        config_type: the class of its options.
        block_types: the sealed blocks that it makes, each with a ``kind`` of its own.
        compared: the options that the evaluation compares, by family; pictures join a family by a line.
        uses_queries: whether ``seal`` needs the positions and queries of the tokens.
        uses_profile: whether the codec takes the model's profile.
    """

    name: ClassVar[str]
    config_type: ClassVar[type]
    block_types: ClassVar[tuple[type[SealedBlock], ...]]
    compared: ClassVar[dict[str, tuple[Any, ...]]] = {}
    uses_queries: ClassVar[bool] = False
    uses_profile: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, config: Any, num_layers: int, profile: ModelProfile | None) -> None: ...

    @abstractmethod
    def layer(self, number: int) -> LayerCodec:
        """The state of layer ``number``, 0 to ``num_layers - 1``, empty."""

    def to_fields(self) -> dict[str, Field]:
        """The state that layers share."""
        return {}

    def restore(self, fields: Fields) -> None:  # noqa: B027
        """Restore the shared state that ``to_fields`` returned.

        Raises:
            LoadError: a field is missing, or belongs to other layers.
        """
