"""Progress reports during a long forward pass."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from torch import nn

# Called with the stage, the steps done and the steps in all.
OnProgress: TypeAlias = Callable[[str, int, int], None]


@contextlib.contextmanager
def layers_reported(model: nn.Module, stage: str, on_progress: OnProgress | None) -> Iterator[None]:
    """Inside the context, report each attention layer that finishes its forward pass as one step of ``stage``."""
    modules = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    if on_progress is None or not modules:
        yield
        return
    done = 0

    def report(*_: Any) -> None:
        nonlocal done
        done = min(done + 1, len(modules))
        on_progress(stage, done, len(modules))

    on_progress(stage, 0, len(modules))
    hooks = [module.register_forward_hook(report) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
