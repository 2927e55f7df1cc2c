"""The rotations of a model's own rotary embeddings, read off by asking its own function.

Keys reach a cache already rotated, and later the rotation cannot be computed again: some models change their tables
with length, and padding gives each row its own positions. So a hook notes the tables each attention module is called
with.
"""

import logging
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from unsloth_spectral.rope import Dims, Rotation

logger = logging.getLogger("unsloth_spectral")
_FUNCTION = "apply_rotary_pos_emb"


class _Noted(threading.local):
    """What this thread's attention module was called with last, and the last rotation made: all layers share one."""

    module: int | None = None
    embeddings: Any = None
    source: Any = None
    rotation: Rotation | None = None


_noted = _Noted()
_stance = threading.Lock()


def note(module: nn.Module, _: Any, kwargs: dict[str, Any]) -> None:
    """A forward pre-hook, with keyword arguments, of every attention module."""
    embeddings = kwargs.get("position_embeddings")
    if embeddings is not None:
        _noted.module, _noted.embeddings = id(module), embeddings


def forget() -> None:
    """Let go of what was noted: a prefill's tables are as long as its prompt, and the next module notes its own."""
    _noted.module = _noted.embeddings = None


def rotation_of(module: nn.Module, head_dim: int, padding: Tensor | None = None) -> Rotation | None:
    """Rotations of the tokens of the forward pass ``module`` is in; None where it has none or they cannot be read.

    ``padding [B]`` tokens at the start of each row are padding, whose places mean nothing.
    """
    embeddings = _noted.embeddings
    if _noted.module != id(module) or not isinstance(embeddings, tuple) or len(embeddings) != 2:
        return None
    cos, sin = embeddings
    if not isinstance(cos, Tensor) or cos.ndim != 3:
        return None
    if _noted.source is not None and _noted.source() is cos:
        return _noted.rotation
    rotation = _read(type(module), cos, sin, head_dim, padding)
    _noted.source, _noted.rotation = ref(cos), rotation
    return rotation


def _read(kind: type, cos: Tensor, sin: Tensor, head_dim: int, padding: Tensor | None) -> Rotation | None:
    apply, pairs = _function(kind), _pairs(kind, cos.shape[-1], head_dim)
    if apply is None or pairs is None:
        return None
    first, second = (_evenly(dims, cos.device) for dims in (pairs.first, pairs.second))
    # A token with a one in the first dimension of every pair gets the cosine there, and the sine in the second.
    ones = torch.zeros(len(cos), 1, cos.shape[1], pairs.dim, dtype=torch.float32, device=cos.device)
    ones[..., first] = 1.0
    turned = _turn(apply, ones, cos.float(), sin.float())[:, 0]
    return Rotation.of(torch.complex(turned[..., first], turned[..., second]), first, second, padding)


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Dimensions rotated together, of the ``dim`` leading ones that the function is called with."""

    dim: int
    first: tuple[int, ...]
    second: tuple[int, ...]


@lru_cache
def _pairs(kind: type, table_dim: int, head_dim: int) -> _Pairs | None:
    """Which dimensions the function of ``kind``'s module rotates together; None if it is not such a rotation."""
    apply = _function(kind)
    if apply is None:
        return None
    # Some modules rotate part of a head inside the function, some call it with that part alone.
    whole = _pairs_of(apply, kind, table_dim, head_dim)
    return whole if whole is not None or table_dim >= head_dim else _pairs_of(apply, kind, table_dim, table_dim)


def _pairs_of(apply: Callable[..., Any], kind: type, table_dim: int, head_dim: int) -> _Pairs | None:
    # The same angle for every pair: what each unit vector becomes shows its partner.
    angle = torch.full((1, 1, table_dim), 0.5, dtype=torch.float32, device="cpu")
    identity = torch.eye(head_dim, dtype=torch.float32, device="cpu")
    try:
        turned = _turn(
            apply, identity[None, None], angle.cos().expand(1, head_dim, -1), angle.sin().expand(1, head_dim, -1)
        )[0, 0]
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        logger.debug("%s cannot be read as a rotation: %s", kind.__name__, str(error))
        return None
    if turned.shape != (head_dim, head_dim):
        return None
    # Row i is what unit vector i became: cos at i, and sin at its partner where i comes first, -sin where second.
    positive = turned - torch.diag(turned.diagonal()) > 0.1
    first = positive.any(-1).nonzero().flatten()
    second = positive[first].int().argmax(-1)
    expected = identity.clone()
    expected[first, first] = expected[second, second] = angle[0, 0, 0].cos()
    expected[first, second], expected[second, first] = angle[0, 0, 0].sin(), -angle[0, 0, 0].sin()
    if not torch.allclose(turned, expected, atol=1e-5):
        logger.debug("%s does not rotate pairs of dimensions", kind.__name__)
        return None
    return _Pairs(head_dim, tuple(first.tolist()), tuple(second.tolist()))


def _turn(apply: Callable[..., Any], keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # Attention is kept from the compiler, and a function that was compiled to be whole refuses to run there. The stance
    # is the whole process's: of two threads the second would take the first one's for what to go back to.
    with _stance, torch.compiler.set_stance("force_eager"):
        return apply(keys, keys, cos, sin)[1]


def _function(kind: type) -> Callable[..., Any] | None:
    return getattr(sys.modules.get(kind.__module__), _FUNCTION, None)


def _evenly(dims: tuple[int, ...], device: torch.device) -> Dims:
    """A slice where there is one, which reads many times faster than a list of indices."""
    step = dims[1] - dims[0] if len(dims) > 1 else 1
    if dims == tuple(range(dims[0], dims[-1] + 1, step)):
        return slice(dims[0], dims[-1] + 1, step)
    return torch.tensor(dims, dtype=torch.int64, device=device)
