"""Keeping a caller's autocast out: it would run products in half precision whose errors codes and factors amplify."""

import contextlib
from contextlib import AbstractContextManager

import torch


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Within it torch computes on ``device`` in the types it is given."""
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
