"""The rank codec, which seals every block independently."""

from typing import ClassVar

from torch import Tensor

from unsloth_spectral.codec.block import Block, ExactBlock, SealedBlock
from unsloth_spectral.codec.codec import Codec, LayerCodec
from unsloth_spectral.codec.config import SpectralConfig
from unsloth_spectral.codec.observed import Observed
from unsloth_spectral.codec.profile import ModelProfile
from unsloth_spectral.codec.rank.block import RankBlock, seal

_COMPARED_RANKS = ((16, 32), (24, 40), (32, 48))


class RankLayer(LayerCodec):
    """One layer; it keeps nothing between sealings."""

    def __init__(self, config: SpectralConfig) -> None:
        self._config = config

    def unit(self, is_first: bool, num_sealed: int = 0) -> int:
        return self._config.block_size

    def seal(
        self, tokens: ExactBlock, real: Tensor | None, observed: Observed, last: Block | None = None
    ) -> SealedBlock | None:
        return seal(tokens.keys, tokens.values, self._config)

    def join(self, last: Block, new: Block) -> Block | None:
        if isinstance(last, RankBlock) and isinstance(new, RankBlock) and last.block_length == new.block_length:
            return last.stack(new)
        return None


class RankCodec(Codec):
    """A truncated SVD of each block, see ``factors``. Layers share nothing."""

    name = "rank"
    config_type = SpectralConfig
    block_types = (RankBlock,)
    compared: ClassVar[dict[str, tuple[SpectralConfig, ...]]] = {
        "rank": tuple(SpectralConfig(rank_keys=keys, rank_values=values) for keys, values in _COMPARED_RANKS)
    }

    def __init__(self, config: SpectralConfig, num_layers: int, profile: ModelProfile | None = None) -> None:
        self._config = config

    def layer(self, number: int) -> RankLayer:
        return RankLayer(self._config)
