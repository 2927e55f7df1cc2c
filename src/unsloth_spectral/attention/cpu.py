"""The compiled kernel: one pass over the blocks as they are stored (native/attend.cpp)."""

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unsloth_spectral.attention.scores import ScoreOptions
from unsloth_spectral.codec.block import Block, ExactBlock
from unsloth_spectral.codec.spectral import keys, scales, values
from unsloth_spectral.codec.spectral.block import SpectralBlock
from unsloth_spectral.codec.spectral.packing import MAX_NBITS, PLANE_BYTES, TILE_TOKENS, num_tiles
from unsloth_spectral.errors import InvalidArgumentError
from unsloth_spectral.native import library
from unsloth_spectral.native.pointers import address, refusal, require
from unsloth_spectral.rope import Rotation

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CODED = len(_KINDS)
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
        ("sink_logits", c_void_p),
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
    if query.device.type != "cpu" or query.dtype not in _KINDS:
        return f"queries in {query.dtype} on {query.device.type}"
    if query.shape[-1] > _MOST_DIMS:
        return f"a head_dim of {query.shape[-1]}: sums of more than {_MOST_DIMS} products may overflow"
    if query.requires_grad and torch.is_grad_enabled():
        return "gradients are wanted"
    if not any(block.num_tokens for block in blocks):
        return "no tokens at all"
    for block in blocks:
        if isinstance(block, SpectralBlock):
            rotation = block.keys.rotation
            if rotation is not None and not rotation.is_even:
                return "positions that do not run on evenly"
        elif not isinstance(block, ExactBlock):
            return f"a block of another codec ({type(block).__name__})"
        elif not all(part.dtype in _KINDS and part.stride(-1) == 1 for part in (block.keys, block.values)):
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
    if num_heads <= 0 or num_attention_heads % num_heads:
        raise refusal("query heads", f"a multiple of {num_heads}", num_attention_heads)
    shape = (batch, num_heads, key_dim, value_dim)
    query = query.to(torch.float32).contiguous()
    answer_shape = (batch, num_attention_heads, query_length, value_dim)
    output = torch.empty(answer_shape, dtype=torch.float32, device="cpu")
    prepared = [_prepare(block, shape) for block in blocks]
    structures = (_Block * len(prepared))(*prepared)
    num_tokens = 0 if mask is None else sum(block.num_tokens for block in blocks)
    mask = None if mask is None else _additive(mask, (batch, query_length, num_tokens))
    sink_logits = None if options.sink_logits is None else options.sink_logits.detach().float().flatten().contiguous()
    constants = _constants(value_dim)
    call = _Call(
        ctypes.addressof(structures),
        len(prepared),
        address("query", query, torch.float32, (batch, num_attention_heads, query_length, key_dim)),
        None if mask is None else address("mask", mask, torch.float32, (len(mask), query_length, num_tokens)),
        0 if mask is None or len(mask) == 1 else query_length * num_tokens,
        num_tokens,
        None if sink_logits is None else address("sink logits", sink_logits, torch.float32, (num_attention_heads,)),
        constants.turn_address if any(isinstance(block, SpectralBlock) for block in blocks) else None,
        address("output", output, torch.float32, answer_shape),
        batch,
        num_heads,
        num_attention_heads // num_heads * query_length,
        query_length,
        key_dim,
        value_dim,
        torch.get_num_threads(),
        options.scaling,
        options.softcap or 0.0,
        constants.key_levels_address,
        constants.value_levels_address,
    )
    _function(variant)(ctypes.byref(call))
    return output


class _Constants(NamedTuple):
    """Tensors that every call takes, and their addresses."""

    tensors: tuple[Tensor, ...]
    turn_address: int
    key_levels_address: int
    value_levels_address: int


@lru_cache
def _constants(value_dim: int) -> _Constants:
    turn = values.hadamard(value_dim)
    levels = [_levels(steps) for steps in (keys.STEPS_PER_OCTAVE, values.STEPS_PER_OCTAVE)]
    return _Constants(
        (turn, *levels),
        address("turn", turn, torch.float32, (value_dim, value_dim)),
        *(address("levels", each, torch.float32, (256,)) for each in levels),
    )


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
    assert isinstance(block, SpectralBlock)
    # A sealed block never changes: what was found out about it once holds.
    found = block.memo.get(_NAME)
    if found is None or found[0] != shape:
        found = block.memo[_NAME] = (shape, *_coded(block, shape))
    prepared: _Block = found[1]
    return prepared


def _exact(block: ExactBlock, shape: tuple[int, int, int, int]) -> _Block:
    batch, num_heads, key_dim, value_dim = shape
    exact_keys, exact_values, count = block.keys, block.values, block.num_tokens
    return _Block(
        count,
        _kind("exact keys", exact_keys.dtype),
        _kind("exact values", exact_values.dtype),
        address("exact keys", exact_keys, exact_keys.dtype, (batch, num_heads, count, key_dim), strided=True),
        address("exact values", exact_values, exact_values.dtype, (batch, num_heads, count, value_dim), strided=True),
        _Strides(*exact_keys.stride()[:3]),
        _Strides(*exact_values.stride()[:3]),
    )


def _kind(name: str, dtype: torch.dtype) -> int:
    kind = _KINDS.get(dtype)
    if kind is None:
        raise refusal(name, "a tensor of float32, bfloat16 or float16", dtype)
    return kind


def _coded(block: SpectralBlock, shape: tuple[int, int, int, int]) -> tuple[_Block, list[Tensor]]:
    """The structure, and the tensors it points to."""
    batch, num_heads, key_dim, value_dim = shape
    key_codes, value_codes, num_tokens = block.keys, block.values, block.num_tokens
    tiles, components, num_planes = num_tiles(num_tokens), sum(map(len, key_codes.widths)), key_codes.num_bits
    stored_dim = key_codes.vectors.shape[-1]
    require(key_dim == stored_dim, "the query's head_dim", f"{stored_dim}, as that of the keys", key_dim)
    require(len(key_codes.widths) == num_heads, "widths", f"one row for each of {num_heads} heads", key_codes.widths)
    for widths in key_codes.widths:
        falling = list(widths) == sorted(widths, reverse=True) and all(1 <= nbits <= MAX_NBITS for nbits in widths)
        require(falling, "widths", f"1 to {MAX_NBITS} bits each, falling,", widths)
    require(value_codes.num_tokens == num_tokens, "values", f"{num_tokens} tokens", value_codes.num_tokens)
    require(1 <= value_codes.nbits <= MAX_NBITS, "the values' width", f"1 to {MAX_NBITS} bits", value_codes.nbits)
    counts = [[widths.count(nbits) for nbits in range(MAX_NBITS + 1)] for widths in key_codes.widths]
    value_planes = (batch, tiles, num_heads * value_dim * value_codes.nbits, PLANE_BYTES)
    parts = {
        "key_planes": _Part(key_codes.planes, torch.uint8, (batch, tiles, num_planes, PLANE_BYTES)),
        "key_scales": _Part(key_codes.scales, torch.uint8, (batch, tiles, components)),
        "vectors": _Part(key_codes.vectors, torch.int8, (batch, components, key_dim)),
        "vector_scales": _Part(key_codes.vector_scales, torch.float32, (batch, components, 1)),
        "mean": _Part(key_codes.mean, torch.float16, (batch, num_heads, key_dim)),
        "counts": _Part(torch.tensor(counts, dtype=torch.int32, device="cpu"), torch.int32, (num_heads, MAX_NBITS + 1)),
        "value_planes": _Part(value_codes.planes, torch.uint8, value_planes),
        "value_scales": _Part(value_codes.scales, torch.uint8, (batch, num_heads, tiles * TILE_TOKENS)),
        "largest": _Part(value_codes.largest, torch.float32, (batch, num_heads, 1)),
    }
    numbers = {
        "num_tokens": num_tokens,
        "kind": _CODED,
        "value_kind": _CODED,
        "num_components": components,
        "num_planes": num_planes,
        "is_rotated": key_codes.is_rotated,
        "value_nbits": value_codes.nbits,
    }
    if key_codes.rotation is not None:
        turning, more = _rotation(key_codes.rotation, batch, key_dim)
        parts, numbers = parts | turning, numbers | more
    # Slices of a block are views; the kernel wants tensors without gaps.
    tensors = {name: part.tensor.contiguous() for name, part in parts.items()}
    addresses = {
        name: address(name.replace("_", " "), tensors[name], part.dtype, part.shape) for name, part in parts.items()
    }
    return _Block(**numbers, **addresses), list(tensors.values())


class _Part(NamedTuple):
    """A tensor of a coded block, and what the kernel takes it for."""

    tensor: Tensor
    dtype: torch.dtype
    shape: tuple[int, ...]


def _rotation(rotation: Rotation, batch: int, key_dim: int) -> tuple[dict[str, _Part], dict[str, int]]:
    """The structure's fields from ``num_pairs`` to ``reach``: tensors, fast pairs first, and numbers."""
    assert rotation.step is not None
    first, second = rotation.indices(key_dim)
    count, start = len(rotation.step), rotation.start
    for dims in (first, second):
        require(len(dims) == count, "rotary dimensions", f"{count} below {key_dim}", dims)
    rows, first_shape = len(start), (batch, 1, count)
    fits = rows in (1, batch) and start.shape[1:] == first_shape[1:]
    require(fits, "the first rotation", f"a tensor of shape {first_shape}", tuple(start.shape))
    tables = _tables(rotation.step.double().contiguous().numpy().tobytes())
    start = torch.view_as_real(start.to(torch.complex64))[..., tables.order, :]
    num_slow = count - tables.num_fast
    parts = {
        "first": _Part(first[tables.order], torch.int32, (count,)),
        "second": _Part(second[tables.order], torch.int32, (count,)),
        "start": _Part(start, torch.float32, (rows, 1, count, 2)),
        "step": _Part(tables.step, torch.float64, (count,)),
        "tile_turn": _Part(tables.tile_turn, torch.float64, (2, count)),
        "cosines": _Part(tables.cosines, torch.float32, (count, TILE_TOKENS)),
        "sines": _Part(tables.sines, torch.float32, (count, TILE_TOKENS)),
        "waves": _Part(tables.waves, torch.int16, (tables.num_waves, TILE_TOKENS, 2)),
        "mixing": _Part(tables.mixing, torch.float32, (2, num_slow, _MOST_SMOOTH)),
        "reach": _Part(tables.reach, torch.float32, (num_slow, _MOST_SMOOTH)),
    }
    numbers = {
        "num_pairs": count,
        "start_stride": 0 if rows == 1 else 2 * count,
        "num_fast": tables.num_fast,
        "num_waves": tables.num_waves,
    }
    return parts, numbers


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
    angles = step[:, None] * torch.arange(TILE_TOKENS + 1, dtype=torch.float64, device="cpu")
    tile_turn = torch.stack([angles[:, -1].cos(), angles[:, -1].sin()])
    within = torch.stack([angles[:, :-1].cos(), angles[:, :-1].sin()])
    num_fast = int((step.abs() * TILE_TOKENS > _SLOW_ANGLE).sum())
    slow = within[:, num_fast:]
    left, values, right = torch.linalg.svd(slow.flatten(0, 1), full_matrices=False)
    num_smooth = min(_MOST_SMOOTH, int((values > _NEGLIGIBLE * TILE_TOKENS**0.5).sum()))
    peaks = right[:num_smooth].abs().amax(-1)
    mixing = torch.zeros(*slow.shape[:2], _MOST_SMOOTH, dtype=torch.float32, device="cpu")
    mixing[..., :num_smooth] = (left * values)[:, :num_smooth].mul(peaks).unflatten(0, slow.shape[:2])
    smooth = torch.nn.functional.pad(right[:num_smooth] / peaks[:, None], (0, 0, 0, num_smooth % 2))
    pairs = torch.cat([within[:, :num_fast].transpose(0, 1), smooth.unflatten(0, (-1, 2))]).mT
    waves = (pairs * _FULL_WAVE).round().to(torch.int16).contiguous()
    cosines, sines = (table.float().contiguous() for table in within)
    return _Tables(order, step, tile_turn, cosines, sines, num_fast, len(waves), waves, mixing, mixing.norm(dim=0))


@lru_cache
def _levels(steps_per_octave: int) -> Tensor:
    return scales.decode_scales(torch.arange(256, dtype=torch.uint8, device="cpu"), steps_per_octave)


def _additive(mask: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """``mask`` as float32 to be added, ``[B or 1, Q, n]``, contiguous."""
    batch, query_length, num_tokens = shape
    fits = mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[1] == 1
    fits = fits and mask.shape[2] in (1, query_length) and mask.shape[3] == num_tokens
    require(fits, "mask", f"a tensor of shape {(batch, 1, query_length, num_tokens)}", tuple(mask.shape))
    mask = mask[:, 0].expand(-1, query_length, -1)
    if mask.dtype == torch.bool:
        return mask.new_zeros(mask.shape, dtype=torch.float32).masked_fill_(~mask, -torch.inf)
    return mask.float().contiguous()
