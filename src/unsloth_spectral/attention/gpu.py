"""Decoding on a GPU: Triton kernels over the blocks as they are stored."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unsloth_spectral.attention.rotary_tables import cosines_and_sines
from unsloth_spectral.attention.scores import ScoreOptions
from unsloth_spectral.codec.block import Block, ExactBlock
from unsloth_spectral.codec.spectral import keys, trellis, values
from unsloth_spectral.codec.spectral.block import SpectralBlock
from unsloth_spectral.codec.spectral.keys import KeyCodes, Widths, flat_widths
from unsloth_spectral.codec.spectral.packing import ROW_BYTES, TILE_TOKENS
from unsloth_spectral.log import logger

_NAME = "triton kernel"
_MOST_DIMS = 256
_ROWS, _CHUNK = 16, 32  # as in the kernels: query rows, and components or dimensions of the output, of a program
# Measured on an H200 (benchmarks/gpu.py). Larger pieces are as fast there and take more shared memory.
_PIECE, _WARPS = 32, 2
_PROGRAMS = 512  # wanted at a time: a few on each multiprocessor
_EXACT_TOKENS = 256  # of a split

# Devices on which the kernels have failed, and why.
_failed: dict[torch.device, str] = {}


def give_up(device: torch.device, error: Exception) -> None:
    """Leave ``device`` to other paths from now on, and say so once."""
    if device not in _failed:
        _failed[device] = f"{type(error).__name__}: {error}"
        logger.warning(
            "The Triton kernels of unsloth-spectral do not run on %s (%s). Decoding goes on in torch, which is slower, "
            "but equally accurate; please report this with the name of your GPU.",
            device,
            _failed[device].splitlines()[0][:300],
        )


@lru_cache
def missing() -> str | None:
    """Why no kernel can run on this machine; None where one can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "no GPU that torch's CUDA knows"
    return None


def obstacle(query: Tensor, blocks: Sequence[Block]) -> str | None:
    """Why the kernels cannot attend with ``query`` to ``blocks``; None where they can."""
    if torch.compiler.is_compiling():
        return "inside a compiled graph"
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"queries in {query.dtype}"
    if query.requires_grad and torch.is_grad_enabled():
        return "gradients are wanted"
    if query.shape[-1] > _MOST_DIMS:
        return f"a head_dim of {query.shape[-1]}"
    if not any(isinstance(block, SpectralBlock) for block in blocks):
        return "nothing sealed"
    for block in blocks:
        if isinstance(block, SpectralBlock):
            unreadable = block.keys.kernel_obstacle
            if unreadable is not None:
                return unreadable
        elif not isinstance(block, ExactBlock):
            return f"a block of another codec ({type(block).__name__})"
        elif not all(part.stride(-1) == 1 for part in (block.keys, block.values)):
            return "exact tokens that are not contiguous"
    if query.device.type != "cuda":
        return f"queries on {query.device.type}"
    return missing() or _failed.get(query.device)


def attend(query: Tensor, blocks: Sequence[Block], mask: Tensor | None, options: ScoreOptions) -> Tensor:
    """Attention of ``query [B, num_attention_heads, Q, D]`` over ``blocks``, float32, for which no ``obstacle`` exists.

    ``mask`` is ``[B or 1, 1, Q, kv_length]`` in the order of ``blocks``, or None for no mask at all. Returns
    ``[B, num_attention_heads, Q, value head_dim]``.
    """
    with torch.cuda.device_of(query):
        return _attend(query, blocks, mask, options)


def _attend(query: Tensor, blocks: Sequence[Block], mask: Tensor | None, options: ScoreOptions) -> Tensor:
    from unsloth_spectral.attention import gpu_kernels

    batch, num_attention_heads, query_length, key_dim = query.shape
    num_heads, value_dim = blocks[0].num_key_value_heads, blocks[0].value_dim
    num_rows = num_attention_heads // num_heads * query_length
    row_blocks = -(-num_rows // _ROWS)
    query = query.contiguous()
    runs = _runs(blocks, max(1, _PROGRAMS // (row_blocks * batch * num_heads)))
    num_splits = sum(run.num_splits for run in runs)
    num_coded = sum(run.num_splits for run in runs if isinstance(run.block, SpectralBlock))
    places = (batch, num_heads, num_splits, num_rows)
    partial = query.new_empty(*places, value_dim, dtype=torch.float32)
    maxima, totals = query.new_empty(2, *places, dtype=torch.float32)
    covering, shared = _mask_arguments(mask, query)
    constants = {"VALUE_DIM": _power(value_dim), "HAS_CAP": options.softcap is not None, **shared}
    first_split = 0
    for run in runs:
        block, grid = run.block, (row_blocks, run.num_splits, batch * num_heads)
        common = (partial, maxima, totals, options.scaling, options.softcap or 1.0)
        counts = (num_heads, num_rows, query_length, key_dim, value_dim)
        if isinstance(block, SpectralBlock):
            prepared = _coded(block)
            components = prepared.constants["COMPONENTS"]
            tiles = -(-block.num_tokens // TILE_TOKENS) if prepared.has_anchors else 1
            projected = query.new_empty(batch, num_heads, tiles, num_rows, components, dtype=torch.float32)
            fixed = query.new_empty(batch, num_heads, num_rows, dtype=torch.float32)
            gpu_kernels.project[(tiles * row_blocks, batch * num_heads, components // _CHUNK)](
                query,
                *prepared.basis,
                projected,
                fixed,
                num_heads,
                num_rows,
                key_dim,
                tiles,
                COMPONENTS=components,
            )
            gpu_kernels.attend_coded[grid](
                query,
                *prepared.arguments,
                projected,
                tiles,
                fixed,
                *covering,
                *common,
                *counts,
                prepared.num_pairs,
                block.num_tokens,
                run.size,
                run.first_token,
                first_split,
                num_splits,
                **constants,
                **prepared.constants,
                PIECE=_PIECE,
                num_warps=_WARPS,
            )
        else:
            assert isinstance(block, ExactBlock)
            gpu_kernels.attend_exact[grid](
                query,
                block.keys,
                *block.keys.stride()[:3],
                block.values,
                *block.values.stride()[:3],
                *covering,
                *common,
                *counts,
                block.num_tokens,
                run.size * _EXACT_TOKENS,
                run.first_token,
                first_split,
                num_splits,
                KEY_DIM=_power(key_dim),
                **constants,
            )
        first_split += run.num_splits
    output = query.new_empty(batch, num_attention_heads, query_length, value_dim, dtype=torch.float32)
    sink_logits = options.sink_logits
    gpu_kernels.merge[(row_blocks, batch * num_heads, -(-value_dim // _CHUNK))](
        partial,
        maxima,
        totals,
        query if sink_logits is None else sink_logits.detach(),
        _hadamard(value_dim, query.device),
        output,
        num_heads,
        num_rows,
        query_length,
        value_dim,
        num_coded,
        num_splits,
        VALUE_DIM=constants["VALUE_DIM"],
        HAS_SINK_LOGITS=sink_logits is not None,
    )
    return output


class _Run(NamedTuple):
    """A block, where it begins, and how its tokens are split: so many units each, pieces or exact tokens."""

    block: Block
    first_token: int
    size: int
    num_splits: int


def _runs(blocks: Sequence[Block], most_splits: int) -> list[_Run]:
    """The blocks that hold tokens, the coded ones first: their sums take the Hadamard matrix together."""
    runs, first_token = [], 0
    for block in blocks:
        is_coded = isinstance(block, SpectralBlock)
        units = -(-block.num_tokens // (_PIECE if is_coded else _EXACT_TOKENS))
        size = max(1, -(-units // most_splits)) if is_coded else 1
        runs.append(_Run(block, first_token, size, -(-units // size)))
        first_token += block.num_tokens
    return sorted((run for run in runs if run.num_splits), key=lambda run: isinstance(run.block, ExactBlock))


def _power(number: int) -> int:
    """The next power of two, of at least as many as a dot takes."""
    return max(_ROWS, 1 << (number - 1).bit_length())


@lru_cache
def _hadamard(dim: int, device: torch.device) -> Tensor:
    return values.hadamard(dim).to(device)


def _mask_arguments(mask: Tensor | None, query: Tensor) -> tuple[tuple[Any, ...], dict[str, bool]]:
    if mask is None:
        return (query, 0, 0, 0), {"HAS_MASK": False, "IS_BOOL": False}
    is_bool = mask.dtype == torch.bool
    strides = [0 if mask.shape[place] == 1 else mask.stride(place) for place in (0, 2, 3)]
    return (mask.view(torch.uint8) if is_bool else mask, *strides), {"HAS_MASK": True, "IS_BOOL": is_bool}


@dataclass(frozen=True, slots=True)
class _Coded:
    """What the kernels take of a sealed block."""

    basis: tuple[Any, ...]
    arguments: tuple[Any, ...]
    num_pairs: int
    has_anchors: bool
    constants: dict[str, int]


def _coded(block: SpectralBlock) -> _Coded:
    # Cached: sealed blocks are immutable.
    prepared: _Coded | None = block.memo.get(_NAME)
    if prepared is None:
        prepared = block.memo[_NAME] = _prepare(block)
    return prepared


def _prepare(block: SpectralBlock) -> _Coded:
    codes, coded, key_dim = block.keys, block.values, block.keys.vectors.shape[-1]
    device = codes.streams.device
    heads, components = _components(codes.widths, device)
    fixed, turning = _rotation(codes, key_dim)
    mean = _strided(codes.mean, 1)
    # Slices of a block are views: batches, tiles and heads come with their strides.
    vectors, vector_scales = _basis(codes, device), _strided(codes.vector_scales, 1)
    basis = (*vectors, *vector_scales, *mean, heads, fixed, *_anchors(codes, key_dim))
    arguments = (
        *_strided(codes.streams, 2),
        *_strided(codes.carries, 1),
        *_strided(codes.scales, 2),
        *mean,
        heads,
        components,
        *turning,
        *_strided(coded.streams, 2),
        *_strided(coded.carries, 1),
        *_strided(coded.scales, 2),
        *_strided(coded.largest, 1),
        _entries(device),
    )
    num_pairs = 0 if codes.rotation is None else codes.rotation.num_pairs
    constants = {
        "COMPONENTS": max(1, -(-max(map(len, codes.widths)) // _CHUNK)) * _CHUNK,
        "PAIRS": _power(num_pairs) if num_pairs else 0,
        "VALUE_NBITS": coded.nbits,
        "KEY_STEPS": keys.STEPS_PER_OCTAVE,
        "VALUE_STEPS": values.STEPS_PER_OCTAVE,
    }
    return _Coded(basis, arguments, num_pairs, any(codes.spans), constants)


def _basis(codes: KeyCodes, device: torch.device) -> tuple[Any, ...]:
    """The basis, the stride of its batches, and each component's row of it."""
    if codes.rows is not None:
        return codes.rows.basis.on(device).vectors, 0, codes.rows.numbers(device)
    vectors, stride = _strided(codes.vectors, 1)
    return vectors, stride, torch.arange(vectors.shape[1], dtype=torch.int32, device=device)


def _strided(tensor: Tensor, leading: int) -> tuple[Any, ...]:
    """``tensor``, without gaps behind its ``leading`` dimensions, and their strides."""
    if not tensor[(0,) * leading].is_contiguous():
        tensor = tensor.contiguous()
    return tensor, *tensor.stride()[:leading]


@lru_cache
def _entries(device: torch.device) -> Tensor:
    """The tables of ``codec.spectral.trellis``, ``[8, 256]`` in half precision."""
    return trellis.entries_on(device).half()


@lru_cache(maxsize=256)
def _components(widths: Widths, device: torch.device) -> tuple[Tensor, Tensor]:
    """The places of the streams (``codec.spectral.packing``), two int32 tensors.

    For each head, ``[H, 2]``: its first component and the number of components. For each component, ``[C, 2]``: its
    bits and the first byte of its stream in a tile.
    """
    counts = [len(head_widths) for head_widths in widths]
    heads = list(zip(accumulate(counts, initial=0), counts, strict=False))
    flat = flat_widths(widths)
    components = [(nbits, row * ROW_BYTES) for nbits, row in zip(flat, accumulate(flat, initial=0), strict=False)]
    return (
        torch.tensor(heads, dtype=torch.int32, device=device),
        torch.tensor(components, dtype=torch.int32, device=device),
    )


def _rotation(codes: KeyCodes, key_dim: int) -> tuple[Tensor, tuple[Any, ...]]:
    """Which dimensions are not rotated, ``[D]`` int32, and the kernel's arguments from ``first`` to ``sines``."""
    device, rotation = codes.streams.device, codes.rotation
    fixed = torch.ones(key_dim, dtype=torch.int32, device=device)
    if rotation is None:
        # Never read.
        return fixed, (*[fixed] * 3, 0, *[fixed] * 3)
    assert rotation.step is not None
    first, second = rotation.indices(key_dim)
    fixed[first.long()], fixed[second.long()] = 0, 0
    start = torch.view_as_real(rotation.start.to(torch.complex64)).contiguous()
    start_batch = 0 if len(start) == 1 else start.stride(0)
    step = rotation.step.double()
    return fixed, (first, second, start, start_batch, step, *cosines_and_sines(step))


def _anchors(codes: KeyCodes, key_dim: int) -> tuple[Any, ...]:
    """The arguments of ``project`` from ``partners`` to ``starts_batch``, by which it un-rotates queries: for each
    dimension the other one of its pair, the sign of that one's share, the step, and the first rotation."""
    device, rotation = codes.streams.device, codes.rotation
    partners = torch.arange(key_dim, dtype=torch.int32, device=device)
    signs = torch.zeros(key_dim, dtype=torch.float32, device=device)
    steps = signs.double()
    starts = torch.ones(1, key_dim, dtype=torch.complex64, device=device)
    if rotation is not None:
        assert rotation.step is not None
        has_anchors = torch.tensor([span > 0 for span in codes.spans], dtype=torch.bool, device=device)
        first, second = (dims[has_anchors] for dims in rotation.indices(key_dim))
        start = rotation.start[:, 0, has_anchors]
        starts = starts.repeat(len(start), 1)
        for sign, dims, others in ((1.0, first, second), (-1.0, second, first)):
            places = dims.long()
            partners[places], signs[places] = others, sign
            steps[places] = rotation.step.double()[has_anchors]
            starts[:, places] = start / start.abs()
    by_dim = torch.view_as_real(starts).contiguous()
    return partners, signs, steps, by_dim, 0 if len(starts) == 1 else by_dim.stride(0)
