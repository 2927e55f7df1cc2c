"""Switching a caller's autocast off: the codecs amplify the errors of products in half precision."""

import contextlib
from contextlib import AbstractContextManager

import torch


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A context in which torch computes on ``device`` in the dtypes of its inputs."""
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
