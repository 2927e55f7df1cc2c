"""The compiled kernel: one pass over the blocks as they are stored (native/attend.cpp)."""

import ctypes
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from unsloth_spectral.attention.rotary_tables import wave_tables
from unsloth_spectral.attention.scores import ScoreOptions
from unsloth_spectral.codec.block import Block, ExactBlock
from unsloth_spectral.codec.spectral import keys, scales, trellis, values
from unsloth_spectral.codec.spectral.block import SpectralBlock
from unsloth_spectral.codec.spectral.packing import MAX_NBITS, TILE_TOKENS
from unsloth_spectral.codec.stored_tensors import Sizes, StoredTensors
from unsloth_spectral.native import abi, library
from unsloth_spectral.native.pointers import address, refusal, require

_DTYPES = {torch.float32: abi.FLOAT32, torch.bfloat16: abi.BFLOAT16, torch.float16: abi.FLOAT16}
_NAME = "native kernel"
_MOST_DIMS = 256  # of codes of 8 bits times weights of 15, in 31


def obstacle(query: Tensor, blocks: Sequence[Block]) -> str | None:
    """Why the kernel cannot attend with ``query`` to ``blocks``; None where it can."""
    if torch.compiler.is_compiling():
        return "inside a compiled graph"
    unserved = obstacle_of(query.device, query.dtype, query.shape[-1])
    if unserved is not None:
        return unserved
    if query.requires_grad and torch.is_grad_enabled():
        return "gradients are wanted"
    if not any(block.num_tokens for block in blocks):
        return "no tokens at all"
    return next(filter(None, map(_unreadable, blocks)), None) or library.obstacle()


def obstacle_of(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernel cannot serve queries in ``dtype`` on ``device``, of ``head_dim``; None where it can."""
    if device.type != "cpu" or dtype not in _DTYPES:
        return f"queries in {dtype} on {device.type}"
    if head_dim > _MOST_DIMS:
        return f"a head_dim of {head_dim}: sums of more than {_MOST_DIMS} products may overflow"
    return None


def _unreadable(block: Block) -> str | None:
    if isinstance(block, SpectralBlock):
        return block.keys.kernel_obstacle
    if not isinstance(block, ExactBlock):
        return f"a block of another codec ({type(block).__name__})"
    if not all(part.dtype in _DTYPES and part.stride(-1) == 1 for part in (block.keys, block.values)):
        return f"exact tokens in {block.keys.dtype} and {block.values.dtype}, or not contiguous"
    return None


def attend(
    query: Tensor, blocks: Sequence[Block], mask: Tensor | None, options: ScoreOptions, variant: str | None = None
) -> Tensor:
    """Attention of ``query [B, num_attention_heads, Q, D]`` over ``blocks``, float32, for which no ``obstacle`` exists.

    ``mask`` is ``[B or 1, 1, Q, kv_length]`` in the order of ``blocks``, or None for no mask at all; ``variant`` names
    a build of the kernel, the best one if None. Returns ``[B, num_attention_heads, Q, value head_dim]``.

    Raises:
        InvalidArgumentError: a tensor's shape is not what the others say, so that the kernel would read elsewhere.
    """
    num_heads, value_dim = blocks[0].num_key_value_heads, blocks[0].value_dim
    shape = (query.shape[0], num_heads, query.shape[-1], value_dim)
    structures = (abi.Block * len(blocks))(*(_prepare(block, shape) for block in blocks))
    num_tokens = sum(block.num_tokens for block in blocks)
    has_codes = any(isinstance(block, SpectralBlock) for block in blocks)
    prepared = _Blocks(ctypes.addressof(structures), len(blocks), has_codes, num_tokens)
    return _call(query, shape, prepared, mask, options, variant)


def directory_of(blocks: Sequence[Block], shape: tuple[int, int, int, int]) -> tuple[Tensor, list[Tensor]]:
    """Where ``blocks`` of ``shape`` (batch, heads, key and value dimensions) lie, ``[n, m]`` uint8, for
    ``attend_to_places``; and tensors to keep, which no block has: a block that the kernel cannot read is rebuilt.
    """
    structures, kept = [], []
    for block in blocks:
        if _unreadable(block) is not None:
            block = ExactBlock(*block.reconstruct())
            kept += [block.keys, block.values]
        structures.append(_prepare(block, shape))
    entries = (abi.Block * len(structures))(*structures)
    size = ctypes.sizeof(abi.Block)
    return torch.tensor(bytearray(entries), dtype=torch.uint8, device="cpu").view(len(structures), size), kept


def attend_to_places(
    query: Tensor, places: Tensor, ring: ExactBlock, counts: Tensor, mask: Tensor | None, options: ScoreOptions
) -> Tensor:
    """``attend`` to the blocks that ``directory_of`` described, and behind them to the first ``counts[0]`` tokens of
    ``ring``.

    ``places [n, m]`` may have zeros behind them, which are no blocks, and ``mask`` columns for more tokens.
    """
    batch, num_heads, _, key_dim = ring.keys.shape
    shape = (batch, num_heads, key_dim, ring.value_dim)
    last = _exact_block(ring, shape, address("counts", counts, torch.int64, (2,)))
    blocks = _Blocks(
        address("places", places, torch.uint8, (len(places), ctypes.sizeof(abi.Block))),
        len(places),
        has_codes=True,
        num_tokens=0 if mask is None else mask.shape[-1],
        last=last,
    )
    return _call(query, shape, blocks, mask, options)


class _Blocks(NamedTuple):
    """Structures of blocks at an address, whether some are coded, and how many columns a mask for them has."""

    structures: int
    num_blocks: int
    has_codes: bool
    num_tokens: int
    last: abi.Block | None = None


def _call(
    query: Tensor,
    shape: tuple[int, int, int, int],
    blocks: _Blocks,
    mask: Tensor | None,
    options: ScoreOptions,
    variant: str | None = None,
) -> Tensor:
    """``attend`` to ``blocks`` of ``shape`` (batch, heads, key and value dimensions)."""
    batch, num_heads, key_dim, value_dim = shape
    num_attention_heads, query_length = query.shape[1:3]
    if num_heads <= 0 or num_attention_heads % num_heads:
        raise refusal("query heads", f"a multiple of {num_heads}", num_attention_heads)
    query = query.to(torch.float32).contiguous()
    answer_shape = (batch, num_attention_heads, query_length, value_dim)
    output = torch.empty(answer_shape, dtype=torch.float32, device="cpu")
    num_tokens = blocks.num_tokens
    mask = None if mask is None else _additive(mask, (batch, query_length, num_tokens))
    sink_logits = None if options.sink_logits is None else options.sink_logits.detach().float().flatten().contiguous()
    constants = _constants(value_dim)
    call = abi.Call(
        blocks=blocks.structures,
        num_blocks=blocks.num_blocks,
        last=None if blocks.last is None else ctypes.addressof(blocks.last),
        query=address("query", query, torch.float32, (batch, num_attention_heads, query_length, key_dim)),
        mask=None if mask is None else address("mask", mask, torch.float32, (len(mask), query_length, num_tokens)),
        mask_batch=0 if mask is None or len(mask) == 1 else query_length * num_tokens,
        mask_query=num_tokens,
        sink_logits=None
        if sink_logits is None
        else address("sink logits", sink_logits, torch.float32, (num_attention_heads,)),
        hadamard=constants.hadamard_address if blocks.has_codes else None,
        output=address("output", output, torch.float32, answer_shape),
        batch=batch,
        num_heads=num_heads,
        num_rows=num_attention_heads // num_heads * query_length,
        query_length=query_length,
        key_dim=key_dim,
        value_dim=value_dim,
        num_threads=torch.get_num_threads(),
        scaling=options.scaling,
        softcap=options.softcap or 0.0,
        key_levels=constants.key_levels_address,
        value_levels=constants.value_levels_address,
        parts=constants.parts_address,
    )
    library.function("spectral_attend", variant)(ctypes.byref(call))
    return output


class _Constants(NamedTuple):
    """Tensors that every call takes, and their addresses."""

    tensors: tuple[Tensor, ...]
    hadamard_address: int
    key_levels_address: int
    value_levels_address: int
    parts_address: int


@lru_cache
def _constants(value_dim: int) -> _Constants:
    hadamard = values.hadamard(value_dim)
    key_levels, value_levels = _levels(keys.STEPS_PER_OCTAVE), _levels(values.STEPS_PER_OCTAVE)
    parts = trellis.tables().parts
    return _Constants(
        (hadamard, key_levels, value_levels, parts),
        address("hadamard", hadamard, torch.float32, (value_dim, value_dim)),
        address("key levels", key_levels, torch.float32, (256,)),
        address("value levels", value_levels, torch.float32, (256,)),
        address("parts", parts, torch.int8, (trellis.MAX_TRELLIS_NBITS, 2, 16)),
    )


def _prepare(block: Block, shape: tuple[int, int, int, int]) -> abi.Block:
    if isinstance(block, ExactBlock):
        return _exact_block(block, shape)
    assert isinstance(block, SpectralBlock)
    # Cached: sealed blocks are immutable.
    prepared: _Prepared | None = block.memo.get(_NAME)
    if prepared is None or prepared.shape != shape:
        prepared = block.memo[_NAME] = _coded_block(block, shape)
    return prepared.structure


class _Prepared(NamedTuple):
    """A coded block's structure for queries and answers of one shape, and the tensors that it points to."""

    shape: tuple[int, int, int, int]
    structure: abi.Block
    pointed: "_PointedTensors"


def _exact_block(block: ExactBlock, shape: tuple[int, int, int, int], counts: int | None = None) -> abi.Block:
    """Its structure; its tokens are as many as the number at ``counts`` says, if that is an address."""
    batch, num_heads, key_dim, value_dim = shape
    count = block.num_tokens
    return abi.Block(
        num_tokens=count,
        count=counts,
        is_coded=False,
        exact_keys=_exact_tokens("exact keys", block.keys, (batch, num_heads, count, key_dim)),
        exact_values=_exact_tokens("exact values", block.values, (batch, num_heads, count, value_dim)),
    )


def _exact_tokens(name: str, tokens: Tensor, shape: tuple[int, int, int, int]) -> abi.ExactTokens:
    dtype = _DTYPES.get(tokens.dtype)
    if dtype is None:
        raise refusal(name, "a tensor of float32, bfloat16 or float16", tokens.dtype)
    batch_stride, head_stride, token_stride, _ = tokens.stride()
    return abi.ExactTokens(
        data=address(name, tokens, tokens.dtype, shape, strided=True),
        dtype=dtype,
        batch_stride=batch_stride,
        head_stride=head_stride,
        token_stride=token_stride,
    )


class _PointedTensors:
    """The tensors of a coded block's structure, which has only their addresses."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def address(self, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
        # Slices of a block are views; the kernel wants tensors without gaps.
        tensor = tensor.contiguous()
        self.tensors.append(tensor)
        return address(name, tensor, dtype, shape)

    def stored(self, owner: str, codes: StoredTensors, name: str, sizes: Sizes) -> int:
        """The address of a tensor of ``codes``, once it is as declared; ``owner`` is whose, in the error."""
        declared = codes.declarations()[name]
        label = f"{owner} {name.replace('_', ' ')}"
        return self.address(label, getattr(codes, name), declared.dtype, declared.sizes(sizes))


def _coded_block(block: SpectralBlock, shape: tuple[int, int, int, int]) -> _Prepared:
    batch, num_heads, key_dim, value_dim = shape
    num_tokens, num_values = block.num_tokens, block.values.num_tokens
    require(num_values == num_tokens, "values", f"{num_tokens} tokens", num_values)
    pointed = _PointedTensors()
    structure = abi.Block(
        num_tokens=num_tokens,
        count=None,
        is_coded=True,
        keys=_coded_keys(block.keys, (batch, num_heads, key_dim), pointed),
        rotation=_rotation(block.keys, (batch, key_dim), pointed),
        values=_coded_values(block.values, (batch, num_heads, value_dim), pointed),
    )
    return _Prepared(shape, structure, pointed)


def _coded_keys(codes: keys.KeyCodes, shape: tuple[int, int, int], pointed: _PointedTensors) -> abi.CodedKeys:
    batch, num_heads, key_dim = shape
    stored_dim = codes.vectors.shape[-1]
    require(key_dim == stored_dim, "the query's head_dim", f"{stored_dim}, as that of the keys", key_dim)
    require(len(codes.widths) == num_heads, "widths", f"one row for each of {num_heads} heads", codes.widths)
    for widths in codes.widths:
        falling = list(widths) == sorted(widths, reverse=True) and all(1 <= nbits <= MAX_NBITS for nbits in widths)
        require(falling, "widths", f"1 to {MAX_NBITS} bits each, falling,", widths)
    by_width = [[widths.count(nbits) for nbits in range(MAX_NBITS + 1)] for widths in codes.widths]
    counts = torch.tensor(by_width, dtype=torch.int32, device="cpu")
    sizes = keys.key_sizes(batch, key_dim, codes.widths, codes.num_tokens, codes.rows is None)
    stored = partial(pointed.stored, "key", codes, sizes=sizes)
    vectors, rows = stored("vectors"), None
    if codes.rows is not None:
        host = torch.device("cpu")
        shape_of_basis = (num_heads, key_dim, key_dim)
        vectors = pointed.address("the model's basis", codes.rows.basis.on(host).vectors, torch.int8, shape_of_basis)
        rows = pointed.address("rows", codes.rows.numbers(host), torch.int32, (sizes["components"],))
    return abi.CodedKeys(
        streams=stored("streams"),
        carries=stored("carries"),
        scales=stored("scales"),
        vectors=vectors,
        rows=rows,
        vector_scales=stored("vector_scales"),
        mean=stored("mean"),
        counts=pointed.address("counts", counts, torch.int32, (num_heads, MAX_NBITS + 1)),
        num_components=sizes["components"],
        num_rows=sizes["rows"],
    )


def _coded_values(codes: values.ValueCodes, shape: tuple[int, int, int], pointed: _PointedTensors) -> abi.CodedValues:
    batch, num_heads, value_dim = shape
    nbits = codes.nbits
    require(1 <= nbits <= MAX_NBITS, "the values' width", f"1 to {MAX_NBITS} bits", nbits)
    sizes = values.value_sizes(batch, num_heads, value_dim, nbits, codes.num_tokens)
    stored = partial(pointed.stored, "value", codes, sizes=sizes)
    return abi.CodedValues(
        streams=stored("streams"),
        carries=stored("carries"),
        scales=stored("scales"),
        largest=stored("largest"),
        nbits=nbits,
    )


def _rotation(codes: keys.KeyCodes, shape: tuple[int, int], pointed: _PointedTensors) -> abi.Rotation:
    rotation = codes.rotation
    if rotation is None:
        return abi.Rotation()
    assert rotation.step is not None
    batch, key_dim = shape
    first, second = rotation.indices(key_dim)
    count, start = len(rotation.step), rotation.start
    for dims in (first, second):
        require(len(dims) == count, "rotary dimensions", f"{count} below {key_dim}", dims)
    rows, first_shape = len(start), (batch, 1, count)
    fits = rows in (1, batch) and start.shape[1:] == first_shape[1:]
    require(fits, "the first rotation", f"a tensor of shape {first_shape}", tuple(start.shape))
    tables = wave_tables(rotation.step)
    start = torch.view_as_real(start.to(torch.complex64))[..., tables.order, :]
    require(len(codes.spans) == count, "spans", f"one for each of {count} rotary pairs", codes.spans)
    spans = [codes.spans[pair] for pair in tables.order.tolist()]
    require(spans == sorted(spans), "spans", "longer ones for slower pairs", codes.spans)
    slow_shape = (count - tables.num_fast, abi.MAX_SMOOTH)
    return abi.Rotation(
        num_pairs=count,
        num_fast=tables.num_fast,
        num_waves=tables.num_waves,
        first_anchored=spans.count(0),
        first=pointed.address("first", first[tables.order], torch.int32, (count,)),
        second=pointed.address("second", second[tables.order], torch.int32, (count,)),
        start=pointed.address("start", start, torch.float32, (rows, 1, count, 2)),
        start_stride=0 if rows == 1 else 2 * count,
        step=pointed.address("step", tables.step, torch.float64, (count,)),
        tile_step=pointed.address("tile step", tables.tile_step, torch.float64, (2, count)),
        waves=pointed.address("waves", tables.waves, torch.int16, (tables.num_waves, TILE_TOKENS, 2)),
        mixing=pointed.address("mixing", tables.mixing, torch.float32, (2, *slow_shape)),
        reach=pointed.address("reach", tables.reach, torch.float32, slow_shape),
    )


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
