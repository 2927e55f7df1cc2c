"""The rotations of a model's own rotary embeddings, read off by asking its own function.

Keys reach a cache already rotated, and later the rotation cannot be computed again: some models change their tables
with length, and padding gives each row its own positions. So a hook notes the tables each attention module is called
with. Another notes the positions that the tables were made for, which store them in a few bytes per token.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from unsloth_spectral.log import logger
from unsloth_spectral.rope import Claim, Dims, Rotation, interned

_FUNCTION = "apply_rotary_pos_emb"
_FREQUENCIES, _SCALING = "inv_freq", "attention_scaling"
_MOST_CALLS = 4


class _Noted(threading.local):
    """What this thread's attention module was called with last, the last calls of rotary embeddings, each with its
    positions, and the last rotation made: all layers share one."""

    module: int | None = None
    embeddings: Any = None
    calls: tuple[tuple[nn.Module, Tensor], ...] = ()
    source: Any = None
    rotation: Rotation | None = None


_noted = _Noted()
_stance = threading.Lock()


def note_rotations(model: nn.Module) -> tuple[Any, ...]:
    """Note what ``rotation_of`` needs at every pass of ``model``, until the returned handles are removed."""
    handles = []
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            handles.append(module.register_forward_pre_hook(_note_tables, with_kwargs=True))
        elif any(name.endswith(_FREQUENCIES) for name, _ in module.named_buffers(recurse=False)):
            handles.append(module.register_forward_pre_hook(_note_positions, with_kwargs=True))
    return tuple(handles)


def _note_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of every module of rotary embeddings: ``(x, position_ids [B, n] or [axes, B, n])``."""
    positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
    if isinstance(positions, Tensor) and positions.dtype in (torch.int64, torch.int32):
        # A model may have several such modules, or call one several times.
        _noted.calls = (*_noted.calls[1 - _MOST_CALLS :], (module, positions))


def _note_tables(module: nn.Module, _: Any, kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of every attention module."""
    embeddings = kwargs.get("position_embeddings")
    if embeddings is not None:
        _noted.module, _noted.embeddings = id(module), embeddings


def forget() -> None:
    """Let go of what was noted: a prefill's tables are as long as its prompt, and the next module notes its own."""
    _noted.module = _noted.embeddings = None


def rotation_of(module: nn.Module, head_dim: int, padding: Tensor | None = None) -> Rotation | None:
    """Rotations of the tokens of the forward pass ``module`` is in; None where it has none or they cannot be read.

    ``padding [B]`` tokens at the start of each row (on the CPU) are padding, whose places mean nothing.
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
    table = torch.complex(turned[..., first], turned[..., second])
    rotation = Rotation.of(table, first, second, padding, _claims(table))
    _noted.calls = ()
    return rotation


def _claims(table: Tensor) -> Iterator[Claim]:
    """What ``table [B or 1, n, P]`` may be, by the positions and frequencies of the last rotary embeddings."""
    for module, positions in reversed(_noted.calls):
        if positions.ndim not in (2, 3) or positions.shape[-1] != table.shape[1]:
            continue
        axes = positions if positions.ndim == 3 else positions[None]
        if axes.shape[1] not in (1, len(table)) and len(table) > 1:
            continue
        numbers = axes.detach().cpu().long().transpose(0, 1)
        for name, frequencies in module.named_buffers(recurse=False):
            if name.endswith(_FREQUENCIES) and frequencies.shape == table.shape[2:]:
                scaling = getattr(module, name.removesuffix(_FREQUENCIES) + _SCALING, 1.0)
                unit = torch.full((1, 1, len(frequencies)), float(scaling), dtype=torch.complex64, device="cpu")
                device = table.device
                yield Claim(numbers, interned(unit, device), interned(frequencies.double(), device))


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
