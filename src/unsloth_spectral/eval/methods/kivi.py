"""KIVI's quantizer: keys by channel, values by token (Liu et al. 2024, arXiv:2402.02750)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from unsloth_spectral.errors import InvalidArgumentError

_METADATA_BITS = 32  # of a group: scale and zero point, float16 each
_FLOAT16_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True, slots=True)
class Kivi:
    """Asymmetric integers of ``nbits``, in groups of neighbours (section 3.2 of the paper).

    Keys have channels of large magnitude, the same for all tokens, so a group is one channel of ``group`` tokens;
    values have none, so a group is one token's ``group`` channels. Groups at the end may be smaller. The paper's group
    is 32. A reference implementation: nothing is packed, the bits are counted.
    """

    nbits: int
    group: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.nbits <= 8:
            raise InvalidArgumentError(f"nbits must be from 1 to 8, got {self.nbits}")
        if self.group < 1:
            raise InvalidArgumentError(f"group must be at least 1, got {self.group}")

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, int]:
        """Keys and values ``[..., tokens, head_dim]`` as decoding returns them, and the bits of both."""
        keys_hat, key_bits = round_trip(keys, -2, self.group, self.nbits)
        values_hat, value_bits = round_trip(values, -1, self.group, self.nbits)
        return keys_hat, values_hat, key_bits + value_bits


def round_trip(x: Tensor, dim: int, group: int, nbits: int) -> tuple[Tensor, int]:
    """Quantize ``x`` in groups of ``group`` along ``dim`` and reconstruct it; also returns the bits, with metadata."""
    work = x.float().movedim(dim, -1)
    length = work.shape[-1]
    # A smaller last group is filled up with its last element, which moves neither minimum nor maximum.
    filled = torch.cat([work, work[..., -1:].expand(*work.shape[:-1], -length % group)], dim=-1)
    groups = filled.unflatten(-1, (-1, group))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    levels = 2**nbits - 1
    # Rounded to the stored values before the codes are chosen, so that the codes compensate for the rounding.
    zero, scale = _float16(low), _float16((high - low) / levels)
    # A constant group has scale 0: with any divisor, its codes are 0 or are cancelled by the scale.
    codes = ((groups - zero) / torch.where(scale == 0, 1, scale)).round_().clamp_(0, levels)
    decoded = (codes * scale + zero).flatten(-2)[..., :length].movedim(-1, dim)
    return decoded.to(x.dtype), x.numel() * nbits + low.numel() * _METADATA_BITS


def _float16(x: Tensor) -> Tensor:
    return x.clamp(-_FLOAT16_MAX, _FLOAT16_MAX).half().float()
