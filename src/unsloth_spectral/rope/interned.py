"""Interning of small tensors: equal numbers on the same device give the same object."""

from functools import lru_cache

import torch
from torch import Tensor


def interned(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; the same object for equal tensors. It must not be written to.

    So the rotations of different passes, and of stored ones, can be compared by identity.
    """
    values = tensor.detach().cpu().contiguous()
    return _tensor(values.numpy().tobytes(), values.dtype, tuple(values.shape), device)


@lru_cache(maxsize=64)
def _tensor(values: bytes, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(values), dtype=dtype).view(shape).to(device)
