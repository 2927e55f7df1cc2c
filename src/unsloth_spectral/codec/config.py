"""The options of this library's codecs: one frozen dataclass, checked when it is made."""

import math
from dataclasses import dataclass

from unsloth_spectral.errors import InvalidArgumentError

# Bits per element of the sealed tokens, metadata included.
PRESETS = {"quality": 3.05, "balanced": 2.12, "small": 1.38, "tiny": 1.12}
# Tokens that share a scale in the spectral codec; it seals whole groups.
GROUP_SIZE = 128
_MIN_BITS, _MAX_BITS = 1.0, 8.0
_DEFAULT_RANKS = (16, 32)


@dataclass(frozen=True, slots=True)
class SpectralConfig:
    """Options of the codecs and of the tiers around them.

    With a rank the rank codec runs: a truncated SVD in int8. Otherwise the spectral codec runs, which keeps the same
    quality in about half the bytes, at the bits that exactly one of ``preset``, ``bits_per_element`` and
    ``compression_factor`` asks for ("balanced" if none is given).

    Attributes:
        rank_keys: singular vectors kept per block and head for the keys, 1 to ``head_dim``; 16 if only
            ``rank_values`` is given.
        rank_values: the same for the values, which have flatter spectra and need about twice the rank; 32 if only
            ``rank_keys`` is given.
        block_size: tokens sealed together while decoding; at least as many as either rank, and for the spectral codec a
            multiple of 128. With a profile the spectral codec seals 32 at a time instead. It seals a prefill as a
            whole, from ``num_sink_tokens + residual_length + 128`` tokens on, or 16 in place of 128 with a profile.
        num_sink_tokens: first tokens of each sequence kept exact, since every later token attends to them strongly.
        residual_length: newest tokens never sealed; the exact tail holds fewer than ``residual_length + block_size``,
            or with a profile ``residual_length + 32``, except behind tokens that the known basis does not suit.
        preset: ``"quality"``, ``"balanced"``, ``"small"`` or ``"tiny"``: 3.05, 2.12, 1.38 or 1.12 bits per element.
        bits_per_element: stored bits per number of the sealed tokens, metadata included, 1 to 8.
        compression_factor: the same as bytes of the sealed tokens in half precision over their stored bytes, 2 to 16.
        error_limit: relative error that no sealed block may exceed, in the norm of the queries for keys; such a block
            gets more bits, and stays exact where eight do not help. With a limit, the profile's bases are not used.
            None for no limit.

    Raises:
        InvalidArgumentError: an option is of the wrong type, out of its range, or given together with another.
    """

    rank_keys: int | None = None
    rank_values: int | None = None
    block_size: int = 512
    num_sink_tokens: int = 4
    residual_length: int = 64
    preset: str | None = None
    bits_per_element: float | None = None
    compression_factor: float | None = None
    error_limit: float | None = None

    def __post_init__(self) -> None:
        self._check_integers()
        amounts = [
            name for name in ("preset", "bits_per_element", "compression_factor") if getattr(self, name) is not None
        ]
        if self.rank_keys is not None or self.rank_values is not None:
            others = [*amounts, *["error_limit"] * (self.error_limit is not None)]
            if others:
                raise InvalidArgumentError(
                    f"ranks choose the rank codec, {others[0]} belongs to the spectral one: give either, not both"
                )
            for name, rank in zip(("rank_keys", "rank_values"), _DEFAULT_RANKS, strict=True):
                if getattr(self, name) is None:
                    object.__setattr__(self, name, rank)
            self._check_ranks()
            return
        if len(amounts) > 1:
            raise InvalidArgumentError(f"{' and '.join(amounts)} say the same thing: give one of them")
        self._check_amount()
        if self.error_limit is not None:
            _check_number("error_limit", self.error_limit, 0.0, 1.0)
        if self.block_size % GROUP_SIZE:
            raise InvalidArgumentError(
                f"block_size must be a multiple of {GROUP_SIZE} for the spectral codec, got {self.block_size}: take "
                f"{max(1, round(self.block_size / GROUP_SIZE)) * GROUP_SIZE}"
            )

    @property
    def codec(self) -> str:
        """``"rank"`` or ``"spectral"``."""
        return "spectral" if self.rank_keys is None else "rank"

    @property
    def title(self) -> str:
        """The name in tables: ``rank 16/32``, ``spectral balanced``, ``spectral 2.5 bits``."""
        if self.codec == "rank":
            return f"rank {self.rank_keys}/{self.rank_values}"
        has_amount = self.bits_per_element is not None or self.compression_factor is not None
        amount = f"{self.target_bits:.3g} bits" if has_amount else self.preset or "balanced"
        return f"spectral {amount}"

    @property
    def target_bits(self) -> float:
        """Bits per element that the spectral codec aims at."""
        if self.bits_per_element is not None:
            return self.bits_per_element
        if self.compression_factor is not None:
            return 16 / self.compression_factor
        return PRESETS[self.preset or "balanced"]

    def check_head_dim(self, head_dim: int) -> None:
        """Raise InvalidArgumentError where a rank exceeds the model's ``head_dim``."""
        for name in ("rank_keys", "rank_values"):
            rank = getattr(self, name)
            if rank is not None and rank > head_dim:
                raise InvalidArgumentError(
                    f"{name} must be at most the model's head_dim, {head_dim}; got {rank}: choose 1 to {head_dim}"
                )

    def _check_integers(self) -> None:
        options = {"rank_keys": 1, "rank_values": 1, "block_size": 1, "num_sink_tokens": 0, "residual_length": 0}
        for name, least in options.items():
            value = getattr(self, name)
            if value is None and name.startswith("rank"):
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise InvalidArgumentError(f"{name} must be an integer, got {value!r} ({type(value).__name__})")
            if value < least:
                raise InvalidArgumentError(f"{name} must be at least {least}, got {value}")

    def _check_ranks(self) -> None:
        for name in ("rank_keys", "rank_values"):
            rank = getattr(self, name)
            if rank > self.block_size:
                raise InvalidArgumentError(
                    f"{name} must be at most block_size, since a block of {self.block_size} tokens has no higher rank; "
                    f"got {name}={rank}, block_size={self.block_size}: raise block_size or lower {name}"
                )

    def _check_amount(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise InvalidArgumentError(f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        if self.bits_per_element is not None:
            _check_number("bits_per_element", self.bits_per_element, _MIN_BITS, _MAX_BITS)
        if self.compression_factor is not None:
            _check_number("compression_factor", self.compression_factor, 16 / _MAX_BITS, 16 / _MIN_BITS)


def _check_number(name: str, value: object, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidArgumentError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    if not least <= value <= most:
        raise InvalidArgumentError(f"{name} must be {least:g} to {most:.4g}, got {value}")
