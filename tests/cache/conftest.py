"""Fixtures of the cache tests."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _nan_in_empty_tensors() -> Iterator[None]:
    """Uninitialized memory is NaN in these tests, so that reading a buffer's spare room fails a test."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.ones(1).new_empty(1).isnan().item()
    yield
    torch.use_deterministic_algorithms(before)


def tensors_within(value: Any) -> list[torch.Tensor]:
    """Every tensor that ``value`` keeps alive, found by walking attributes, slots and containers."""
    tensors: list[torch.Tensor] = []
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, type) or callable(item):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            tensors.append(item)
        elif isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, list | tuple | set):
            waiting.extend(item)
        else:
            waiting.extend(vars(item).values() if hasattr(item, "__dict__") else [])
            names = [name for kind in type(item).__mro__ for name in getattr(kind, "__slots__", ())]
            waiting.extend(getattr(item, name) for name in names if hasattr(item, name))
    return tensors


@pytest.fixture(scope="session")
def allocated_bytes() -> Callable[[Any], int]:
    """``allocated_bytes(value)``: bytes of all storages it keeps alive, each once."""

    def count(value: Any) -> int:
        tensors = tensors_within(value)
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    return count
