"""The rotations of a model's rotary embeddings, read by calling the model's own function.

Keys reach a cache already rotated, and the rotation cannot be computed again later: some models change their tables
with length, and padding gives each row its own positions. An attention module's call contains the tables. A hook on
the module that makes the tables attaches their positions to them: positions take a few bytes per token, tables take
hundreds.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from unsloth_spectral.integrations.huggingface.attention_call import AttentionCall, note_call
from unsloth_spectral.integrations.huggingface.private_api import FREQUENCIES, ROTATION_FUNCTION, SCALING
from unsloth_spectral.log import logger
from unsloth_spectral.rope import Claim, Dims, Rotation, interned

_ORIGIN = "_unsloth_spectral_origin"  # the attribute of a table of cosines

_stance = threading.Lock()


@dataclass(slots=True, eq=False)
class _Origin:
    """The origin of a table of cosines.

    Attributes:
        module: the module of rotary embeddings that made the table; None if no hook saw that.
        positions: ``[B, n]`` or ``[axes, B, n]``, the positions of the table; None if they are unknown.
        rotation: the rotation read from the table, which all layers share.
        is_read: whether ``rotation`` is valid.
    """

    module: nn.Module | None = None
    positions: Tensor | None = None
    rotation: Rotation | None = None
    is_read: bool = False


def note_rotations(model: nn.Module) -> tuple[Any, ...]:
    """Let ``rotation_of`` serve every pass of ``model``, until the returned handles are removed."""
    handles = []
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            handles.append(module.register_forward_pre_hook(note_call, with_kwargs=True))
        elif any(name.endswith(FREQUENCIES) for name, _ in module.named_buffers(recurse=False)):
            handles.append(module.register_forward_hook(_note_origin, with_kwargs=True))
    return tuple(handles)


def _note_origin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tables: Any) -> None:
    """A forward hook of a module of rotary embeddings, ``(x, position_ids [B, n] or [axes, B, n])`` to ``tables``."""
    # A compiled step needs no positions, and elsewhere in a compiled graph the tables themselves are read.
    if torch.compiler.is_compiling() or not isinstance(tables, tuple) or not isinstance(tables[0], Tensor):
        return
    positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
    is_known = isinstance(positions, Tensor) and positions.dtype in (torch.int64, torch.int32)
    setattr(tables[0], _ORIGIN, _Origin(module, positions) if is_known else _Origin())


def rotation_of(call: AttentionCall | None, head_dim: int, padding: Tensor | None = None) -> Rotation | None:
    """The rotations of the tokens of an attention module's ``call``; None if it has none, or they cannot be read.

    ``padding [B]`` tokens at the start of each row (on the CPU) are padding, whose positions mean nothing.
    """
    embeddings = None if call is None else call.position_embeddings
    if call is None or not isinstance(embeddings, tuple) or len(embeddings) != 2:
        return None
    cos, sin = embeddings
    if not isinstance(cos, Tensor) or cos.ndim != 3:
        return None
    origin: _Origin | None = getattr(cos, _ORIGIN, None)
    if origin is None:
        origin = _Origin()
        setattr(cos, _ORIGIN, origin)
    if not origin.is_read:
        origin.rotation = _read(type(call.module), cos, sin, head_dim, padding, origin)
        origin.is_read = True
    return origin.rotation


def _read(
    kind: type, cos: Tensor, sin: Tensor, head_dim: int, padding: Tensor | None, origin: _Origin
) -> Rotation | None:
    apply, pairs = _function(kind), _pairs(kind, cos.shape[-1], head_dim)
    if apply is None or pairs is None:
        return None
    first, second = (_evenly(dims, cos.device) for dims in (pairs.first, pairs.second))
    # A token with a one in the first dimension of every pair gets the cosine there, and the sine in the second.
    ones = torch.zeros(len(cos), 1, cos.shape[1], pairs.dim, dtype=torch.float32, device=cos.device)
    ones[..., first] = 1.0
    rotated = _rotate(apply, ones, cos.float(), sin.float())[:, 0]
    table = torch.complex(rotated[..., first], rotated[..., second])
    return Rotation.of(table, first, second, padding, _claims(table, origin))


def _claims(table: Tensor, origin: _Origin) -> Iterator[Claim]:
    """Hypotheses about ``table [B or 1, n, P]``, from the positions and the frequencies of its ``origin``."""
    module, positions = origin.module, origin.positions
    if module is None or positions is None or positions.ndim not in (2, 3) or positions.shape[-1] != table.shape[1]:
        return
    axes = positions if positions.ndim == 3 else positions[None]
    if axes.shape[1] not in (1, len(table)) and len(table) > 1:
        return
    numbers = axes.detach().cpu().long().transpose(0, 1)
    for name, frequencies in module.named_buffers(recurse=False):
        if name.endswith(FREQUENCIES) and frequencies.shape == table.shape[2:]:
            scaling = getattr(module, name.removesuffix(FREQUENCIES) + SCALING, 1.0)
            unit = torch.full((1, 1, len(frequencies)), float(scaling), dtype=torch.complex64, device="cpu")
            device = table.device
            yield Claim(numbers, interned(unit, device), interned(frequencies.double(), device))


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Pairs of dimensions rotated together, among the ``dim`` leading ones that the function is called with."""

    dim: int
    first: tuple[int, ...]
    second: tuple[int, ...]


@lru_cache
def _pairs(kind: type, table_dim: int, head_dim: int) -> _Pairs | None:
    """Which dimensions the function of ``kind``'s module rotates together; None if it is not such a rotation."""
    apply = _function(kind)
    if apply is None:
        return None
    # Some modules rotate a part of the head inside the function, others call it with that part alone.
    pairs = _pairs_of(apply, kind, table_dim, head_dim)
    return pairs if pairs is not None or table_dim >= head_dim else _pairs_of(apply, kind, table_dim, table_dim)


def _pairs_of(apply: Callable[..., Any], kind: type, table_dim: int, head_dim: int) -> _Pairs | None:
    # With the same angle for every pair, the image of each unit vector shows its partner.
    angle = torch.full((1, 1, table_dim), 0.5, dtype=torch.float32, device="cpu")
    identity = torch.eye(head_dim, dtype=torch.float32, device="cpu")
    try:
        rotated = _rotate(
            apply, identity[None, None], angle.cos().expand(1, head_dim, -1), angle.sin().expand(1, head_dim, -1)
        )[0, 0]
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        logger.debug("%s cannot be read as a rotation: %s", kind.__name__, str(error))
        return None
    if rotated.shape != (head_dim, head_dim):
        return None
    # Row i is the image of unit vector i: cos at i, and at its partner sin if i is first, -sin if i is second.
    positive = rotated - torch.diag(rotated.diagonal()) > 0.1
    first = positive.any(-1).nonzero().flatten()
    second = positive[first].int().argmax(-1)
    expected = identity.clone()
    expected[first, first] = expected[second, second] = angle[0, 0, 0].cos()
    expected[first, second], expected[second, first] = angle[0, 0, 0].sin(), -angle[0, 0, 0].sin()
    if not torch.allclose(rotated, expected, atol=1e-5):
        logger.debug("%s does not rotate pairs of dimensions", kind.__name__)
        return None
    return _Pairs(head_dim, tuple(first.tolist()), tuple(second.tolist()))


def _rotate(apply: Callable[..., Any], keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # Attention runs uncompiled, and a function compiled with fullgraph refuses to run there. The lock is needed because
    # the stance belongs to the process: a second thread would restore the stance of the first.
    with _stance, torch.compiler.set_stance("force_eager"):
        return apply(keys, keys, cos, sin)[1]


def _function(kind: type) -> Callable[..., Any] | None:
    return getattr(sys.modules.get(kind.__module__), ROTATION_FUNCTION, None)


def _evenly(dims: tuple[int, ...], device: torch.device) -> Dims:
    """``dims`` as a slice if they are evenly spaced, which is many times faster to index with, else as a tensor."""
    step = dims[1] - dims[0] if len(dims) > 1 else 1
    if dims == tuple(range(dims[0], dims[-1] + 1, step)):
        return slice(dims[0], dims[-1] + 1, step)
    return torch.tensor(dims, dtype=torch.int64, device=device)
