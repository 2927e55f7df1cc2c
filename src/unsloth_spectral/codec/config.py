"""How a cache is compressed: one frozen set of options, checked once when it is made."""

from dataclasses import dataclass

from unsloth_spectral.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True)
class SpectralConfig:
    """Options of the rank codec and of the tiers around it.

    Attributes:
        rank_keys: singular vectors kept per block and head for the keys, 1 to ``head_dim``.
        rank_values: the same for the values. Values have flatter spectra and want about twice the rank.
        block_size: tokens sealed together; at least as many as either rank.
        num_sink_tokens: first tokens of each sequence kept exact, since every later token attends to them strongly.
        residual_length: newest tokens never sealed; the exact tail holds up to ``residual_length + block_size``.

    Raises:
        InvalidArgumentError: an option is not an integer or is out of its range.
    """

    rank_keys: int = 16
    rank_values: int = 32
    block_size: int = 512
    num_sink_tokens: int = 4
    residual_length: int = 64

    def __post_init__(self) -> None:
        for name, least in (
            ("rank_keys", 1),
            ("rank_values", 1),
            ("block_size", 1),
            ("num_sink_tokens", 0),
            ("residual_length", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise InvalidArgumentError(f"{name} must be an integer, got {value!r} ({type(value).__name__})")
            if value < least:
                raise InvalidArgumentError(f"{name} must be at least {least}, got {value}")
        for name in ("rank_keys", "rank_values"):
            rank = getattr(self, name)
            if rank > self.block_size:
                raise InvalidArgumentError(
                    f"{name} must be at most block_size, since a block of {self.block_size} tokens has no higher rank; "
                    f"got {name}={rank}, block_size={self.block_size}: raise block_size or lower {name}"
                )

    def check_head_dim(self, head_dim: int) -> None:
        """Raise InvalidArgumentError where a rank exceeds the model's ``head_dim``."""
        for name in ("rank_keys", "rank_values"):
            rank = getattr(self, name)
            if rank > head_dim:
                raise InvalidArgumentError(
                    f"{name} must be at most the model's head_dim, {head_dim}; got {rank}: choose 1 to {head_dim}"
                )
