"""Triton kernels: attention of few queries over sealed and exact tokens, and the merge of their partial results.

Work is split over the tokens (Dao et al., "Flash-Decoding", 2023): a program takes one key-value head of one sequence,
16 of its query rows and a run of tokens. It writes a partial result: ``sum of values under exp(score - maximum)``, that
maximum and the sum of the weights. ``merge`` combines these. Values of sealed tokens stay rotated until then.

Codes are integers that half precision holds exactly. Their factors are split into two half-precision numbers, and other
dot products are made of three tf32 products; both are as accurate as float32.
"""

import triton
import triton.language as tl

from unsloth_spectral.codec.spectral import packing, scales

ROWS = tl.constexpr(16)  # the fewest rows that tl.dot takes
TILE = tl.constexpr(packing.TILE_TOKENS)
# With larger chunks, the two operands of a dot exceed the shared memory of small cards.
CHUNK = tl.constexpr(32)
_ZERO = tl.constexpr(scales.ZERO)
_TWO_PI = tl.constexpr(6.283185307179586)
# These arguments change from step to step. Without this, triton would compile again whenever one becomes a multiple
# of 16, or stops being one.
_CHANGING = ("mask_batch", "mask_row", "mask_token", "first_token", "first_split", "num_splits")


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _dot_codes(a, codes):
    """``a [ROWS, k]`` float32 times integers ``codes [k, n]`` of up to 8 bits."""
    largest = tl.maximum(tl.max(tl.abs(a), 1), 1e-30)
    a = a / largest[:, None]
    high = a.to(tl.float16)
    low = ((a - high.to(tl.float32)) * 2048.0).to(tl.float16)
    codes = codes.to(tl.float16)
    return (tl.dot(high, codes) + tl.dot(low, codes) * (1.0 / 2048.0)) * largest[:, None]


@triton.jit
def _entries(table, stream, carry, width, tokens, streams_tile, tile, is_real):
    """The entries of a ``table`` of 256 that tokens' windows name, in half precision, which holds them exactly; see
    ``codec.spectral.packing``. A window begins in the byte before the stream's ``(token + 1) * width``-th bit. For a
    tile's first tokens this is the last one in the tile before or, in the first tile, the ``carry``."""
    end = (tokens + 1) * width
    byte = end // 8 - 1
    before = stream + (width * 16 - 1 - streams_tile)
    if tile == 0:
        before = carry
    low = tl.load(tl.where(byte < 0, before, stream + byte), mask=is_real, other=0).to(tl.int32)
    high = tl.load(stream + byte + 1, mask=is_real & (end % 8 != 0), other=0).to(tl.int32)
    window = ((low | (high << 8)) >> (end % 8)) & 255
    return tl.load(table + window, mask=is_real, other=0.0)


@triton.jit
def _masked(scores, mask, rows, tokens, is_real, query_length, mask_row, mask_token, IS_BOOL: tl.constexpr):
    """``scores [ROWS, n]`` under the mask of the rows' queries; ``tokens`` count over all blocks."""
    place = (rows % query_length)[:, None].to(tl.int64) * mask_row + tokens[None, :].to(tl.int64) * mask_token
    if IS_BOOL:
        seen = tl.load(mask + place, mask=is_real[None, :], other=0)
        return tl.where(seen != 0, scores, float("-inf"))
    return scores + tl.load(mask + place, mask=is_real[None, :], other=0.0).to(tl.float32)


@triton.jit
def _capped(scores, scaling, softcap, HAS_CAP: tl.constexpr):
    scores = scores * scaling
    if HAS_CAP:
        # softcap * tanh(scores / softcap)
        scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
    return scores


@triton.jit
def _decoded(codes, STEPS: tl.constexpr):
    """Scales relative to the largest of their row, see ``codec.spectral.scales``."""
    return tl.where(codes == _ZERO, 0.0, tl.exp2(codes.to(tl.float32) * (-1.0 / STEPS)))


@triton.jit
def _weighed(
    products,
    maximum,
    total,
    scaling,
    softcap,
    mask,
    rows,
    tokens,
    is_real,
    query_length,
    mask_row,
    mask_token,
    HAS_CAP: tl.constexpr,
    HAS_MASK: tl.constexpr,
    IS_BOOL: tl.constexpr,
):
    """The weights of more dot products, the new maximum and sum, and the factor for the earlier sums."""
    scores = _capped(products, scaling, softcap, HAS_CAP)
    if HAS_MASK:
        scores = _masked(scores, mask, rows, tokens, is_real, query_length, mask_row, mask_token, IS_BOOL)
    scores = tl.where(is_real[None, :], scores, float("-inf"))
    highest = tl.maximum(maximum, tl.max(scores, 1))
    # A row that may attend to nothing so far has no maximum.
    level = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp(scores - level[:, None])
    fade = tl.exp(maximum - level)
    return weights, highest, total * fade + tl.sum(weights, 1), fade


@triton.jit
def _store(output, maxima, totals, result, maximum, total, place, rows, num_rows, dims, value_dim):
    is_row = rows < num_rows
    at = place * num_rows + rows
    tl.store(maxima + at, maximum, mask=is_row)
    tl.store(totals + at, total, mask=is_row)
    into = output + at[:, None] * value_dim + dims[None, :]
    tl.store(into, result, mask=is_row[:, None] & (dims < value_dim)[None, :])


@triton.jit
def _rotation_of(token, step, start_real, start_imaginary):
    """Cosine and sine of the rotation of ``token``, for pairs whose angles begin at a start and grow by ``step``."""
    # The angle in float64: it grows with the context.
    revolutions = step * token / _TWO_PI
    angle = ((revolutions - tl.floor(revolutions)) * _TWO_PI).to(tl.float32)
    cosine = start_real * tl.cos(angle) - start_imaginary * tl.sin(angle)
    sine = start_real * tl.sin(angle) + start_imaginary * tl.cos(angle)
    return cosine, sine


@triton.jit(do_not_specialize=["num_pieces"])
def project(
    query,
    vectors,
    vectors_batch,
    vector_rows,
    vector_scales,
    vector_scales_batch,
    mean,
    mean_batch,
    heads,
    fixed,
    partners,
    signs,
    steps,
    starts,
    starts_batch,
    projected,
    constants,
    num_heads,
    num_rows,
    key_dim,
    num_tiles,
    COMPONENTS: tl.constexpr,
):
    """The query in a sealed block's basis, un-rotated by each tile's anchors, ``[B, H, tiles, rows, COMPONENTS]``.

    Also its product with the dimensions of the mean that do not rotate, ``[B, H, rows]``."""
    tile, row_block = tl.program_id(0) % num_tiles, tl.program_id(0) // num_tiles
    batch_head, begin = tl.program_id(1), tl.program_id(2) * CHUNK
    batch, head = (batch_head // num_heads).to(tl.int64), batch_head % num_heads
    rows = row_block * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    at = batch_head.to(tl.int64) * num_rows + rows
    means = mean + batch * mean_batch + head * key_dim
    slots = begin + tl.arange(0, CHUNK)
    is_slot = slots < tl.load(heads + head * 2 + 1)
    number = tl.load(heads + head * 2) + slots
    vector = tl.load(vector_rows + number, mask=is_slot, other=0).to(tl.int64)
    result = tl.zeros([ROWS, CHUNK], dtype=tl.float32)
    constant = tl.zeros([ROWS], dtype=tl.float32)
    for first in range(0, key_dim, CHUNK):
        dims = first + tl.arange(0, CHUNK)
        is_dim = dims < key_dim
        query_chunk = tl.load(
            query + at[:, None] * key_dim + dims[None, :], mask=is_row[:, None] & is_dim[None, :], other=0.0
        )
        query_chunk = query_chunk.to(tl.float32)
        partner = tl.load(partners + dims, mask=is_dim, other=0)
        across = tl.load(query + at[:, None] * key_dim + partner[None, :], mask=is_row[:, None], other=0.0)
        across = across.to(tl.float32) * tl.load(signs + dims, mask=is_dim, other=0.0)[None, :]
        step = tl.load(steps + dims, mask=is_dim, other=0.0)
        start = starts + batch * starts_batch + dims * 2
        start_real = tl.load(start, mask=is_dim, other=1.0)
        start_imaginary = tl.load(start + 1, mask=is_dim, other=0.0)
        cosine, sine = _rotation_of(tile * TILE, step, start_real, start_imaginary)
        unrotated = query_chunk * cosine[None, :] + across * sine[None, :]
        row = vectors + batch * vectors_batch + vector[None, :] * key_dim + dims[:, None]
        result += _dot_codes(unrotated, tl.load(row, mask=is_slot[None, :] & is_dim[:, None], other=0))
        is_fixed = tl.load(fixed + dims, mask=is_dim, other=0) != 0
        fixed_mean = tl.load(means + dims, mask=is_dim & is_fixed, other=0.0).to(tl.float32)
        constant += tl.sum(query_chunk * fixed_mean[None, :], 1)
    scale = tl.load(vector_scales + batch * vector_scales_batch + number, mask=is_slot, other=0.0)
    into = projected + ((batch_head.to(tl.int64) * num_tiles + tile) * num_rows + rows)[:, None] * COMPONENTS
    tl.store(into + slots[None, :], result * scale[None, :], mask=is_row[:, None])
    tl.store(constants + at, constant, mask=is_row)  # every tile's and chunk's program computes the same


@triton.jit(do_not_specialize=[*_CHANGING, "num_tokens", "pieces_a_split", "projected_tiles"])
def attend_coded(
    query,
    streams,
    streams_batch,
    streams_tile,
    carries,
    carries_batch,
    scales,
    scales_batch,
    scales_tile,
    mean,
    mean_batch,
    heads,
    components,
    first,
    second,
    start,
    start_batch,
    step,
    cosines,
    sines,
    value_streams,
    value_streams_batch,
    value_streams_tile,
    value_carries,
    value_carries_batch,
    value_scales,
    value_scales_batch,
    value_scales_head,
    largest,
    largest_batch,
    entries,
    projected,
    projected_tiles,
    constants,
    mask,
    mask_batch,
    mask_row,
    mask_token,
    output,
    maxima,
    totals,
    scaling,
    softcap,
    num_heads,
    num_rows,
    query_length,
    key_dim,
    value_dim,
    num_pairs,
    num_tokens,
    pieces_a_split,
    first_token,
    first_split,
    num_splits,
    VALUE_DIM: tl.constexpr,
    COMPONENTS: tl.constexpr,
    PAIRS: tl.constexpr,
    VALUE_NBITS: tl.constexpr,
    KEY_STEPS: tl.constexpr,
    VALUE_STEPS: tl.constexpr,
    PIECE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    IS_BOOL: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    """Attention over one sealed block, from piece ``split * pieces_a_split`` on; ``codec.spectral.packing`` has the
    layout.

    A piece is ``PIECE`` tokens, a power of two, 16 to 128. ``projected`` has the queries for each tile, or one
    for all.
    """
    row_block, split = tl.program_id(0), tl.program_id(1)
    batch, head = tl.program_id(2) // num_heads, tl.program_id(2) % num_heads
    batch = batch.to(tl.int64)
    rows = row_block * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    queries = query + ((batch * num_heads + head) * num_rows + rows)[:, None] * key_dim
    in_basis = projected + ((batch * num_heads + head) * projected_tiles * num_rows + rows)[:, None] * COMPONENTS
    constant = tl.load(constants + (batch * num_heads + head) * num_rows + rows, mask=is_row, other=0.0)
    first_component, count = tl.load(heads + head * 2), tl.load(heads + head * 2 + 1)

    # The rotary pairs of the mean.
    if PAIRS > 0:
        pairs = tl.arange(0, PAIRS)
        is_pair = pairs < num_pairs
        real = tl.load(first + pairs, mask=is_pair, other=0)
        imaginary = tl.load(second + pairs, mask=is_pair, other=0)
        both = is_row[:, None] & is_pair[None, :]
        q_real = tl.load(queries + real[None, :], mask=both, other=0.0).to(tl.float32)
        q_imaginary = tl.load(queries + imaginary[None, :], mask=both, other=0.0).to(tl.float32)
        means = mean + batch * mean_batch + head * key_dim
        m_real = tl.load(means + real, mask=is_pair, other=0.0).to(tl.float32)
        m_imaginary = tl.load(means + imaginary, mask=is_pair, other=0.0).to(tl.float32)
        along = q_real * m_real[None, :] + q_imaginary * m_imaginary[None, :]
        across = q_imaginary * m_real[None, :] - q_real * m_imaginary[None, :]
        starts = start + batch * start_batch + pairs * 2
        start_real = tl.load(starts, mask=is_pair, other=0.0)
        start_imaginary = tl.load(starts + 1, mask=is_pair, other=0.0)
        angle_step = tl.load(step + pairs, mask=is_pair, other=0.0)

    value_dims = tl.arange(0, VALUE_DIM)
    value_rows = (head * value_dim + value_dims) * (VALUE_NBITS * 16)
    is_value = (value_dims < value_dim)[None, :]
    top = tl.load(largest + batch * largest_batch + head)
    result = tl.zeros([ROWS, VALUE_DIM], dtype=tl.float32)
    maximum = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    num_pieces = tl.cdiv(num_tokens, PIECE)
    for piece in range(split * pieces_a_split, tl.minimum((split + 1) * pieces_a_split, num_pieces)):
        tile = piece * PIECE // TILE
        place = piece * PIECE + tl.arange(0, PIECE)
        tokens = place % TILE
        scores = tl.zeros([ROWS, PIECE], dtype=tl.float32) + constant[:, None]
        in_tile = in_basis + tl.where(projected_tiles > 1, tile, 0).to(tl.int64) * num_rows * COMPONENTS
        at = streams + batch * streams_batch + tile * streams_tile
        for begin in range(0, count, CHUNK):
            slots = begin + tl.arange(0, CHUNK)
            is_slot = slots < count
            table = components + (first_component + slots) * 2
            width = tl.load(table, mask=is_slot, other=1)
            stream = at + tl.load(table + 1, mask=is_slot, other=0)
            carry = carries + batch * carries_batch + first_component + slots
            values = _entries(
                entries + (width - 1)[:, None] * 256, stream[:, None], carry[:, None], width[:, None],
                tokens[None, :], streams_tile, tile, is_slot[:, None],
            )  # fmt: skip
            scale = scales + batch * scales_batch + tile * scales_tile + first_component + slots
            scale = _decoded(tl.load(scale, mask=is_slot, other=_ZERO), KEY_STEPS)
            share = tl.load(in_tile + slots[None, :], mask=is_row[:, None] & is_slot[None, :], other=0.0)
            share *= scale[None, :]
            scores += _dot_codes(share, values)
        if PAIRS > 0:
            tile_real, tile_imaginary = _rotation_of(tile * TILE, angle_step, start_real, start_imaginary)
            within = pairs[:, None] * TILE + tokens[None, :]
            cosine = tl.load(cosines + within, mask=is_pair[:, None], other=0.0)
            sine = tl.load(sines + within, mask=is_pair[:, None], other=0.0)
            scores += _dot(along * tile_real[None, :] + across * tile_imaginary[None, :], cosine)
            scores += _dot(across * tile_real[None, :] - along * tile_imaginary[None, :], sine)
        is_real = place < num_tokens
        weights, maximum, total, fade = _weighed(
            scores, maximum, total, scaling, softcap, mask + batch * mask_batch, rows, first_token + place,
            is_real, query_length, mask_row, mask_token, HAS_CAP, HAS_MASK, IS_BOOL,
        )  # fmt: skip

        at = value_streams + batch * value_streams_batch + tile * value_streams_tile + value_rows[None, :]
        carry = value_carries + batch * value_carries_batch + head * value_dim + value_dims[None, :]
        coded = _entries(
            entries + (VALUE_NBITS - 1) * 256, at, carry, VALUE_NBITS, tokens[:, None], value_streams_tile, tile,
            is_value,
        )  # fmt: skip
        at = value_scales + batch * value_scales_batch + head * value_scales_head
        weights *= (_decoded(tl.load(at + place), VALUE_STEPS) * top)[None, :]
        result = result * fade[:, None] + _dot_codes(weights, coded)
    place = (batch * num_heads + head) * num_splits + first_split + split
    _store(output, maxima, totals, result, maximum, total, place, rows, num_rows, value_dims, value_dim)


@triton.jit(do_not_specialize=[*_CHANGING, "num_tokens", "tokens_a_split"])
def attend_exact(
    query,
    keys,
    keys_batch,
    keys_head,
    keys_token,
    values,
    values_batch,
    values_head,
    values_token,
    mask,
    mask_batch,
    mask_row,
    mask_token,
    output,
    maxima,
    totals,
    scaling,
    softcap,
    num_heads,
    num_rows,
    query_length,
    key_dim,
    value_dim,
    num_tokens,
    tokens_a_split,
    first_token,
    first_split,
    num_splits,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HAS_MASK: tl.constexpr,
    IS_BOOL: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    """Attention over one exact block, from token ``split * tokens_a_split`` on."""
    row_block, split = tl.program_id(0), tl.program_id(1)
    batch, head = tl.program_id(2) // num_heads, tl.program_id(2) % num_heads
    batch = batch.to(tl.int64)
    rows = row_block * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    dims, value_dims = tl.arange(0, KEY_DIM), tl.arange(0, VALUE_DIM)
    queries = query + ((batch * num_heads + head) * num_rows + rows)[:, None] * key_dim
    query_rows = tl.load(queries + dims[None, :], mask=is_row[:, None] & (dims < key_dim)[None, :], other=0.0)
    query_rows = query_rows.to(tl.float32)
    result = tl.zeros([ROWS, VALUE_DIM], dtype=tl.float32)
    maximum = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    last = tl.minimum((split + 1) * tokens_a_split, num_tokens)
    for begin in range(split * tokens_a_split, last, CHUNK):
        place = begin + tl.arange(0, CHUNK)
        is_real = place < last
        at = keys + batch * keys_batch + head * keys_head + place[None, :].to(tl.int64) * keys_token + dims[:, None]
        key = tl.load(at, mask=is_real[None, :] & (dims < key_dim)[:, None], other=0.0).to(tl.float32)
        weights, maximum, total, fade = _weighed(
            _dot(query_rows, key), maximum, total, scaling, softcap, mask + batch * mask_batch, rows,
            first_token + place, is_real, query_length, mask_row, mask_token, HAS_CAP, HAS_MASK, IS_BOOL,
        )  # fmt: skip
        at = values + batch * values_batch + head * values_head
        at = at + place[:, None].to(tl.int64) * values_token + value_dims[None, :]
        value = tl.load(at, mask=is_real[:, None] & (value_dims < value_dim)[None, :], other=0.0).to(tl.float32)
        result = result * fade[:, None] + _dot(weights, value)
    place = (batch * num_heads + head) * num_splits + first_split + split
    _store(output, maxima, totals, result, maximum, total, place, rows, num_rows, value_dims, value_dim)


@triton.jit(do_not_specialize=["num_coded", "num_splits"])
def merge(
    partial,
    maxima,
    totals,
    sink_logits,
    hadamard,
    output,
    num_heads,
    num_rows,
    query_length,
    value_dim,
    num_coded,
    num_splits,
    VALUE_DIM: tl.constexpr,
    HAS_SINK_LOGITS: tl.constexpr,
):
    """Merge the partial results of all splits. The first ``num_coded`` are still to be multiplied with
    ``hadamard [value_dim, value_dim]``.

    A program computes ``CHUNK`` of the output's dimensions.
    """
    row_block, batch_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    rows = row_block * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    dims = tl.arange(0, VALUE_DIM)
    is_value = is_row[:, None] & (dims < value_dim)[None, :]
    is_column = is_row[:, None] & (columns < value_dim)[None, :]
    maximum = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    if HAS_SINK_LOGITS:
        group = (num_rows // query_length) * (batch_head % num_heads) + rows // query_length
        sink = tl.load(sink_logits + group, mask=is_row, other=float("-inf")).to(tl.float32)
        maximum = tl.maximum(maximum, sink)
    for split in range(num_splits):
        at = (batch_head * num_splits + split) * num_rows + rows
        maximum = tl.maximum(maximum, tl.load(maxima + at, mask=is_row, other=float("-inf")))
    level = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.zeros([ROWS], dtype=tl.float32)
    if HAS_SINK_LOGITS:
        # A sink logit acts like a token with that score and the value zero.
        total += tl.exp(sink - level)
    rotated = tl.zeros([ROWS, VALUE_DIM], dtype=tl.float32)
    result = tl.zeros([ROWS, CHUNK], dtype=tl.float32)
    for split in range(num_splits):
        at = (batch_head * num_splits + split) * num_rows + rows
        share = tl.exp(tl.load(maxima + at, mask=is_row, other=float("-inf")) - level)
        total += share * tl.load(totals + at, mask=is_row, other=0.0)
        at = partial + at[:, None] * value_dim
        if split < num_coded:
            rotated += share[:, None] * tl.load(at + dims[None, :], mask=is_value, other=0.0)
        else:
            result += share[:, None] * tl.load(at + columns[None, :], mask=is_column, other=0.0)
    across = hadamard + dims[:, None] * value_dim + columns[None, :]
    square = (dims < value_dim)[:, None] & (columns < value_dim)[None, :]
    result += _dot(rotated, tl.load(across, mask=square, other=0.0))
    # Zeros for a row that may attend to nothing.
    result = result / tl.where(total > 0, total, 1.0)[:, None]
    at = (batch_head * num_rows + rows)[:, None] * value_dim + columns[None, :]
    tl.store(output + at, result, mask=is_column)
