"""The compiled kernel: one pass over the blocks as they are stored (native/attend.cpp)."""

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unsloth_spectral.attention.scores import ScoreOptions
from unsloth_spectral.codec import keys, logscale, values
from unsloth_spectral.codec.block import Block, ExactBlock
from unsloth_spectral.codec.coded import CodedBlock
from unsloth_spectral.codec.packing import MAX_NBITS, PLANE_BYTES, TILE_TOKENS, num_tiles
from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.native import library
from unsloth_spectral.rope import Rotation

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CODED = len(_DTYPES)
_NAME = "native kernel"
_Strides = c_int64 * 3
# Pairs that turn by less than so many radians in a tile are slow: few smooth functions, at most as many as attend.cpp
# has room for, make up their cosines and sines to a millionth.
_SLOW_ANGLE = 4.0
_MOST_SMOOTH = 16
_NEGLIGIBLE = 1e-6
_FULL_WAVE = 32767
_MOST_DIMS = 256  # of codes of 8 bits times weights of 15, in 31


class _Block(ctypes.Structure):
    """``Block`` of native/attend.cpp; an exact one's kinds are the places of its dtypes."""

    _fields_ = [
        ("num_tokens", c_int64),
        ("kind", c_int64),
        ("value_kind", c_int64),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_strides", _Strides),
        ("value_strides", _Strides),
        ("key_planes", c_void_p),
        ("key_scales", c_void_p),
        ("vectors", c_void_p),
        ("vector_scales", c_void_p),
        ("mean", c_void_p),
        ("counts", c_void_p),
        ("num_components", c_int64),
        ("num_planes", c_int64),
        ("is_rotated", c_int64),
        ("num_pairs", c_int64),
        ("first", c_void_p),
        ("second", c_void_p),
        ("start", c_void_p),
        ("start_stride", c_int64),
        ("step", c_void_p),
        ("tile_turn", c_void_p),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("num_fast", c_int64),
        ("num_waves", c_int64),
        ("waves", c_void_p),
        ("mixing", c_void_p),
        ("reach", c_void_p),
        ("value_planes", c_void_p),
        ("value_scales", c_void_p),
        ("largest", c_void_p),
        ("value_nbits", c_int64),
    ]


class _Call(ctypes.Structure):
    """``Call`` of native/attend.cpp."""

    _fields_ = [
        ("blocks", c_void_p),
        ("num_blocks", c_int64),
        ("query", c_void_p),
        ("mask", c_void_p),
        ("mask_batch", c_int64),
        ("mask_query", c_int64),
        ("sinks", c_void_p),
        ("turn", c_void_p),
        ("output", c_void_p),
        ("batch", c_int64),
        ("num_heads", c_int64),
        ("num_rows", c_int64),
        ("query_length", c_int64),
        ("key_dim", c_int64),
        ("value_dim", c_int64),
        ("num_threads", c_int64),
        ("scaling", c_float),
        ("softcap", c_float),
        ("key_levels", c_void_p),
        ("value_levels", c_void_p),
    ]


def obstacle(query: Tensor, blocks: Sequence[Block]) -> str | None:
    """Why the kernel cannot attend with ``query`` to ``blocks``; None where it can."""
    if torch.compiler.is_compiling():
        return "inside a compiled graph"
    if query.device.type != "cpu" or query.dtype not in _DTYPES:
        return f"queries in {query.dtype} on {query.device.type}"
    if query.shape[-1] > _MOST_DIMS:
        return f"a head_dim of {query.shape[-1]}: sums of more than {_MOST_DIMS} products may overflow"
    if query.requires_grad and torch.is_grad_enabled():
        return "gradients are wanted"
    if not any(block.num_tokens for block in blocks):
        return "no tokens at all"
    for block in blocks:
        if isinstance(block, CodedBlock):
            rotation = block.keys.rotation
            if rotation is not None and not rotation.is_even:
                return "positions that do not run on evenly"
        elif not isinstance(block, ExactBlock):
            return f"a block of another codec ({type(block).__name__})"
        elif not all(part.dtype in _DTYPES and part.stride(-1) == 1 for part in (block.keys, block.values)):
            return f"exact tokens in {block.keys.dtype} and {block.values.dtype}, or not contiguous"
    return library.obstacle()


def attend(
    query: Tensor, blocks: Sequence[Block], mask: Tensor | None, options: ScoreOptions, variant: str | None = None
) -> Tensor:
    """Attention of ``query [B, num_attention_heads, Q, D]`` over ``blocks``, float32, for which no ``obstacle`` exists.

    ``mask`` is ``[B or 1, 1, Q, kv_length]`` in the order of ``blocks``, or None for no mask at all; ``variant`` names
    a build of the kernel, the best one if None. Returns ``[B, num_attention_heads, Q, value head_dim]``.

    Raises:
        InvalidArgumentError: a tensor's shape is not what the others say, so that the kernel would read elsewhere.
    """
    batch, num_attention_heads, query_length, key_dim = query.shape
    num_heads, value_dim = blocks[0].num_key_value_heads, blocks[0].value_dim
    _require(num_heads > 0 and num_attention_heads % num_heads == 0, "query heads", num_attention_heads, num_heads)
    shape = (batch, num_heads, key_dim, value_dim)
    query = query.to(torch.float32).contiguous()
    output = torch.empty(batch, num_attention_heads, query_length, value_dim)
    prepared = [_prepare(block, shape) for block in blocks]
    held = (_Block * len(prepared))(*prepared)
    if mask is not None:
        mask = _additive(mask, (batch, query_length, sum(block.num_tokens for block in blocks)))
    sinks = None if options.sinks is None else options.sinks.detach().float().contiguous()
    _require(sinks is None or sinks.numel() == num_attention_heads, "sinks", sinks, num_attention_heads)
    is_coded = any(isinstance(block, CodedBlock) for block in blocks)
    turn = values.hadamard(value_dim) if is_coded else None
    call = _Call(
        ctypes.addressof(held),
        len(prepared),
        query.data_ptr(),
        None if mask is None else mask.data_ptr(),
        0 if mask is None or len(mask) == 1 else mask.stride(0),
        0 if mask is None else mask.stride(1),
        None if sinks is None else sinks.data_ptr(),
        None if turn is None else turn.data_ptr(),
        output.data_ptr(),
        batch,
        num_heads,
        num_attention_heads // num_heads * query_length,
        query_length,
        key_dim,
        value_dim,
        torch.get_num_threads(),
        options.scaling,
        options.softcap or 0.0,
        _levels(keys.STEPS_PER_OCTAVE).data_ptr(),
        _levels(values.STEPS_PER_OCTAVE).data_ptr(),
    )
    _function(variant)(ctypes.byref(call))
    return output


@lru_cache
def _function(variant: str | None) -> Any:
    """The kernel's entry, after a check that both sides lay out their structures alike."""
    function = library.function("spectral_attend", variant)
    found: Any = library.load(variant)
    found.spectral_sizes.restype = c_int64
    sizes = found.spectral_sizes(c_int64(0)), found.spectral_sizes(c_int64(1))
    if sizes != (ctypes.sizeof(_Block), ctypes.sizeof(_Call)):
        raise InvalidArgumentError("the compiled kernel is of another version: install unsloth-spectral again")
    return function


def _prepare(block: Block, shape: tuple[int, int, int, int]) -> _Block:
    if isinstance(block, ExactBlock):
        return _exact(block, shape)
    assert isinstance(block, CodedBlock)
    # A sealed block never changes: what was found out about it once holds.
    found = block.memo.get(_NAME)
    if found is None or found[0] != shape:
        found = block.memo[_NAME] = (shape, *_coded(block, shape))
    prepared: _Block = found[1]
    return prepared


def _exact(block: ExactBlock, shape: tuple[int, int, int, int]) -> _Block:
    batch, num_heads, key_dim, value_dim = shape
    own, values = block.keys, block.values
    count = own.shape[-2]
    _require_shape("exact keys", own, (batch, num_heads, count, key_dim))
    _require_shape("exact values", values, (batch, num_heads, count, value_dim))
    return _Block(
        count,
        _DTYPES.index(own.dtype),
        _DTYPES.index(values.dtype),
        own.data_ptr(),
        values.data_ptr(),
        _Strides(*own.stride()[:3]),
        _Strides(*values.stride()[:3]),
    )


def _coded(block: CodedBlock, shape: tuple[int, int, int, int]) -> tuple[_Block, list[Any]]:
    """The structure, and what it points to beside the block's own tensors."""
    batch, num_heads, key_dim, value_dim = shape
    own, coded, tiles = block.keys, block.values, num_tiles(block.num_tokens)
    components, planes = sum(map(len, own.widths)), own.num_bits
    _require(len(own.widths) == num_heads, "key-value heads", len(own.widths), num_heads)
    for widths in own.widths:
        _require(
            list(widths) == sorted(widths, reverse=True) and all(1 <= nbits <= MAX_NBITS for nbits in widths),
            "widths",
            widths,
            f"1 to {MAX_NBITS}, falling",
        )
    _require(coded.num_tokens == own.num_tokens, "tokens of the values", coded.num_tokens, own.num_tokens)
    _require(1 <= coded.nbits <= MAX_NBITS, "width of the values", coded.nbits, f"1 to {MAX_NBITS}")
    _require_shape("key planes", own.planes, (batch, tiles, planes, PLANE_BYTES), torch.uint8)
    _require_shape("key scales", own.scales, (batch, tiles, components), torch.uint8)
    _require_shape("basis", own.vectors, (batch, components, key_dim), torch.int8)
    _require_shape("basis scales", own.vector_scales, (batch, components, 1), torch.float32)
    _require_shape("mean", own.mean, (batch, num_heads, key_dim), torch.float16)
    value_planes = (batch, tiles, num_heads * value_dim * coded.nbits, PLANE_BYTES)
    _require_shape("value planes", coded.planes, value_planes, torch.uint8)
    _require_shape("value scales", coded.scales, (batch, num_heads, tiles * TILE_TOKENS), torch.uint8)
    _require_shape("largest value scales", coded.largest, (batch, num_heads, 1), torch.float32)
    counts = torch.tensor([[widths.count(nbits) for nbits in range(MAX_NBITS + 1)] for widths in own.widths])
    counts = counts.to(torch.int32)
    # Slices of a block are views; the kernel wants tensors without gaps.
    tensors = [
        tensor.contiguous() for tensor in (own.planes, own.scales, own.vectors, own.vector_scales, own.mean, counts)
    ]
    coded_tensors = [tensor.contiguous() for tensor in (coded.planes, coded.scales, coded.largest)]
    rotation = () if own.rotation is None else _rotation(own.rotation, batch, key_dim)
    pointers = [value.data_ptr() if isinstance(value, Tensor) else value for value in rotation]
    pointers = pointers or [0, None, None, None, 0, None, None, None, None, 0, 0, None, None, None]
    nothing = _Strides()
    prepared = _Block(
        block.num_tokens,
        _CODED,
        _CODED,
        None,
        None,
        nothing,
        nothing,
        *(tensor.data_ptr() for tensor in tensors),
        components,
        planes,
        own.is_rotated,
        *pointers,
        *(tensor.data_ptr() for tensor in coded_tensors),
        coded.nbits,
    )
    return prepared, [tensors, coded_tensors, rotation]


def _rotation(rotation: Rotation, batch: int, key_dim: int) -> tuple[Any, ...]:
    """The structure's fields from ``num_pairs`` to ``reach``, fast pairs first."""
    assert rotation.step is not None
    first, second = rotation.indices(key_dim)
    count = len(rotation.step)
    for dims in (first, second):
        _require(len(dims) == count and int(dims.max()) < key_dim, "rotary dimensions", dims, f"below {key_dim}")
    start = rotation.start
    _require(
        len(start) in (1, batch) and start.shape[1:] == (1, count), "first rotation", start.shape, (batch, 1, count)
    )
    tables = _tables(rotation.step.double().contiguous().numpy().tobytes())
    start = torch.view_as_real(start.to(torch.complex64))[..., tables.order, :].contiguous()
    return (
        count,
        first[tables.order],
        second[tables.order],
        start,
        0 if len(start) == 1 else 2 * count,
        *tables[1:],
    )


class _Tables(NamedTuple):
    """What the angles between tokens come to within a tile, the same for all layers and blocks of one model.

    Attributes:
        order: ``[P]`` int64, the pairs, the fastest first; so are all others.
        step: ``[P]`` float64, angle from a token to the next.
        tile_turn: ``[2, P]`` float64, cosine and sine of the angle from a tile to the next.
        cosines, sines: ``[P, 128]`` float32, of the angles within a tile.
        num_fast: pairs that turn far in a tile.
        num_waves: these, and functions two by two that make up all the others' rows.
        waves: ``[num_waves, 128, 2]`` int16, 32767 for 1: cosine and sine of the fast pairs, then these functions.
        mixing: ``[2, P - num_fast, 16]`` float32, how they make up the slow pairs' cosines and sines.
        reach: ``[P - num_fast, 16]`` float32, the most that a pair of length 1 has of each of them.
    """

    order: Tensor
    step: Tensor
    tile_turn: Tensor
    cosines: Tensor
    sines: Tensor
    num_fast: int
    num_waves: int
    waves: Tensor
    mixing: Tensor
    reach: Tensor


@lru_cache(maxsize=8)
def _tables(steps: bytes) -> _Tables:
    step = torch.frombuffer(bytearray(steps), dtype=torch.float64)
    order = step.abs().argsort(descending=True, stable=True)
    step = step[order].contiguous()
    angles = step[:, None] * torch.arange(TILE_TOKENS + 1)
    tile_turn = torch.stack([angles[:, -1].cos(), angles[:, -1].sin()])
    within = torch.stack([angles[:, :-1].cos(), angles[:, :-1].sin()])
    num_fast = int((step.abs() * TILE_TOKENS > _SLOW_ANGLE).sum())
    slow = within[:, num_fast:]
    left, values, right = torch.linalg.svd(slow.flatten(0, 1), full_matrices=False)
    num_smooth = min(_MOST_SMOOTH, int((values > _NEGLIGIBLE * TILE_TOKENS**0.5).sum()))
    peaks = right[:num_smooth].abs().amax(-1)
    mixing = torch.zeros(*slow.shape[:2], _MOST_SMOOTH)
    mixing[..., :num_smooth] = (left * values)[:, :num_smooth].mul(peaks).unflatten(0, slow.shape[:2])
    smooth = torch.nn.functional.pad(right[:num_smooth] / peaks[:, None], (0, 0, 0, num_smooth % 2))
    pairs = torch.cat([within[:, :num_fast].transpose(0, 1), smooth.unflatten(0, (-1, 2))]).mT
    waves = (pairs * _FULL_WAVE).round().to(torch.int16).contiguous()
    cosines, sines = (table.float().contiguous() for table in within)
    return _Tables(order, step, tile_turn, cosines, sines, num_fast, len(waves), waves, mixing, mixing.norm(dim=0))


@lru_cache
def _levels(steps_per_octave: int) -> Tensor:
    return logscale.decode_scales(torch.arange(256).to(torch.uint8), steps_per_octave)


def _additive(mask: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """``mask`` as float32 to be added, ``[B or 1, Q, n]``, contiguous along the tokens."""
    batch, query_length, num_tokens = shape
    fits = mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[1] == 1
    fits = fits and mask.shape[2] in (1, query_length) and mask.shape[3] == num_tokens
    _require(fits, "mask", tuple(mask.shape), (batch, 1, query_length, num_tokens))
    mask = mask[:, 0].expand(-1, query_length, -1)
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    return mask.float().contiguous()


def _require_shape(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    if tensor.shape == shape and (dtype is None or tensor.dtype == dtype) and tensor.is_cpu:
        return  # the usual case, at every step
    _require(tuple(tensor.shape) == shape, f"shape of {name}", tuple(tensor.shape), shape)
    _require(dtype is None or tensor.dtype == dtype, f"dtype of {name}", tensor.dtype, dtype)
    _require(tensor.device.type == "cpu", f"device of {name}", tensor.device, "cpu")


def _require(holds: bool, name: str, found: object, wanted: object) -> None:
    if not holds:
        raise InvalidArgumentError(f"malformed block: {name} must be {wanted}, got {found}")
