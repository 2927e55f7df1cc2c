"""One tensor for all that have the same few numbers on the same device."""

from functools import lru_cache

import torch
from torch import Tensor


def interned(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; the same object for equal ones, which nobody writes to.

    What a model's passes bring, and what was stored of earlier ones, is then known to be of one kind.
    """
    values = tensor.detach().cpu().contiguous()
    return _tensor(values.numpy().tobytes(), values.dtype, tuple(values.shape), device)


@lru_cache(maxsize=64)
def _tensor(values: bytes, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(values), dtype=dtype).view(shape).to(device)
