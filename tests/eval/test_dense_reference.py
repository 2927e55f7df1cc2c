"""The dense run's result serves its own model and case, and no other."""

from typing import Any

import pytest

from unsloth_spectral.eval.tasks.dense_reference import DenseReference


class Maker:
    """Counts its calls and returns the count."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> int:
        self.count += 1
        return self.count


def test_made_once_for_each_model_and_case() -> None:
    reference: DenseReference[int] = DenseReference()
    first: Any = object()
    second: Any = object()
    make = Maker()
    results = [
        reference.get(loaded, case, make, anew=anew)
        for loaded, case, anew in [
            (first, "a", False), (first, "a", False), (first, "a", True), (first, "a", False), (first, "b", False),
            (first, "a", False), (second, "a", False), (second, "a", False),
        ]
    ]  # fmt: skip
    assert results == [1, 1, 2, 2, 3, 4, 5, 5]


def test_a_failure_leaves_nothing() -> None:
    reference: DenseReference[int] = DenseReference()
    loaded: Any = object()
    reference.get(loaded, "a", lambda: 1, anew=False)

    def fail() -> int:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        reference.get(loaded, "a", fail, anew=True)
    assert reference.get(loaded, "a", lambda: 2, anew=False) == 2
