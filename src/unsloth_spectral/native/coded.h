// Attention over a run of coded tokens: scores from the codes, the softmax, sums of the values' codes.
#pragma once

#include <algorithm>

#include "keys.h"
#include "numbers.h"
#include "softmax.h"
#include "values.h"
#include "weights.h"
#include "worker.h"

namespace spectral {
namespace {

// Attention of `num_rows` rows from `first_row` on, MOST_ROWS at most. Codes are read once for all of them.
inline void attend_coded(Worker& w, const Block& block, int64_t b, int64_t h, int64_t first_row, int num_rows,
                         int64_t token, int length, int64_t column, Partial* partials) {
    const Call& call = w.call;
    const int64_t tiles = (block.num_tokens + TILE - 1) / TILE;
    const int64_t first_tile = token / TILE;
    const int64_t value_bytes = call.value_dim * block.values.nbits * ROW;
    const int64_t value_stride = call.num_heads * value_bytes;
    const uint8_t* value_streams = block.values.streams + (b * tiles + first_tile) * value_stride + h * value_bytes;
    const uint8_t* scale_codes = block.values.scales + (b * call.num_heads + h) * tiles * TILE + token;
    const int padded = round_up(length, TILE);
    fetch(scale_codes, padded);
    for (int done = 0; done < length; done += TILE) {
        const int64_t tile = first_tile + done / TILE;
        const int64_t stream_row = (b * tiles + tile) * block.keys.num_rows + w.components.first_row;
        const int64_t tile_bytes = block.keys.num_rows * ROW;
        const uint8_t* streams = block.keys.streams + stream_row * ROW;
        const uint8_t* carries = block.keys.carries + b * block.keys.num_components + w.components.first;
        if (tile + 1 < tiles) {
            w.next_keys.expect(streams + tile_bytes, w.components.num_rows * ROW);
            fetch(levels_of(w, block, b, tile + 1), w.components.count);
        }
        w.next_values.expect(value_streams + done / TILE * value_stride, value_bytes);
        start_tile(w, block, b, tile, first_row, num_rows);
        read_components(w, streams, tile ? streams - tile_bytes : nullptr, carries);
        by_rows(num_rows, [&](auto rows, int row) {
            score_tile<decltype(rows)::value>(w, block, first_row + row, std::min(TILE, length - done),
                                              w.scores.data() + row * RUN + done);
        });
        w.next_values.fetch_rest();
        if (done + TILE < length) w.next_keys.fetch_rest();
    }
    const float largest_scale = block.values.largest[b * call.num_heads + h];
    scales_of(scale_codes, padded, call.value_levels, largest_scale, w.token_scales.data());
    Weighed weighed[MOST_ROWS];
    bool any = false;
    for (int r = 0; r < num_rows; ++r) {
        float* scores = w.scores.data() + r * RUN;
        weighed[r] = {};
        int32_t *first = &w.shares[0][r * RUN / 4], *second = &w.shares[1][r * RUN / 4];
        float most = 0.0f;
        if (!exponentiate<true>(call, scores, length, b, first_row + r, column, partials[r], w.value_dim,
                                w.token_scales.data(), most)) {
            std::fill(first, first + padded / 4, 0);
            std::fill(second, second + padded / 4, 0);
            continue;
        }
        any = true;
        if (block.values.nbits <= ROUGH_NBITS)
            weighed[r] = to_byte_weights(scores, most, first, padded);
        else
            weighed[r] = to_weights(scores, most, FULL, first, second, padded);
    }
    if (!any) return;
    const uint8_t* carries = first_tile ? nullptr : block.values.carries + (b * call.num_heads + h) * call.value_dim;
    with_nbits(static_cast<int>(block.values.nbits), [&](auto constant) {
        add_values<decltype(constant)::value>(w, value_streams, value_stride, carries, length, num_rows, weighed,
                                              partials);
    });
    w.next_keys.fetch_rest();
}

}  // namespace
}  // namespace spectral
