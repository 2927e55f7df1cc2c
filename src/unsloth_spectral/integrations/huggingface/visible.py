"""The tokens that the queries of a forward pass see, read from its mask."""

import threading
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from unsloth_spectral.cache.tiers import NEVER

# An additive mask that lowers a score below this hides the token: its weight is zero in any dtype.
_HIDDEN = -1000.0


@dataclass(frozen=True, slots=True, eq=False)
class Visible:
    """Attributes:
    first: ``[B]`` int64 on the CPU, the first token of each row that any query sees, ``NEVER`` if none is seen.
    asking: ``[B, Q]`` bool on the CPU, True for queries that see a token and whose own token is seen; others are
        padding. None if all are True.
    """

    first: Tensor
    asking: Tensor | None


class _Last(threading.local):
    mask: Any = None
    version: int | None = None
    visible: Visible | None = None


_last = _Last()


def visible_through(mask: Tensor | None, batch: int) -> Visible:
    """The tokens visible through ``mask [B or 1, heads or 1, Q, kv_length]``, bool or additive; None hides nothing.

    The result for the last mask is cached, because all layers get the same mask.
    """
    if mask is None:
        return Visible(torch.zeros(batch, dtype=torch.int64, device="cpu"), None)
    version = None if mask.is_inference() else mask._version
    is_last = _last.mask is not None and _last.mask() is mask and _last.version == version
    if not is_last or _last.visible is None or len(_last.visible.first) != batch:
        _last.visible = _read(mask, batch)
        _last.mask, _last.version = ref(mask), version
    return _last.visible


def _read(mask: Tensor, batch: int) -> Visible:
    # A mask grows with the square of the context, so it is reduced without a copy.
    seen, sees = (_any(mask, dim).any(1).cpu().expand(batch, -1) for dim in (-2, -1))
    first = torch.where(seen.any(-1), seen.int().argmax(-1), NEVER)
    asking = seen[:, -mask.shape[-2] :] & sees
    return Visible(first, None if bool(asking.all()) else asking)


def _any(mask: Tensor, dim: int) -> Tensor:
    return mask.any(dim) if mask.dtype == torch.bool else mask.amax(dim) > _HIDDEN
