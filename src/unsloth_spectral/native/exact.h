// Attention over a run of exact tokens.
#pragma once

#include <algorithm>
#include <type_traits>

#include "numbers.h"
#include "softmax.h"
#include "worker.h"

namespace spectral {
namespace {

// Scores of ROWS rows from `row` on; scores and partial results are those of these rows.
template <int DTYPE, int ROWS>
void score_exact(const Worker& w, const Block& block, int64_t b, int64_t h, int64_t row, int64_t token, int length,
                 float* scores) {
    const ExactTokens& keys = block.exact_keys;
    const int64_t first_key = b * keys.batch_stride + h * keys.head_stride + token * keys.token_stride;
    const float* query = w.query.data() + row * w.key_dim;
    const int key_dim = static_cast<int>(w.call.key_dim);
    for (int t0 = 0; t0 < length; t0 += LANES) {
        Floats products[ROWS][LANES] = {};
        for (int k = 0; k < std::min(LANES, length - t0); ++k) {
            Floats product[ROWS] = {};
            for (int d = 0; d < key_dim; d += LANES) {
                const int64_t place = first_key + (t0 + k) * keys.token_stride + d;
                const Floats key = numbers<DTYPE>(keys.data, place, key_dim - d);
                for (int r = 0; r < ROWS; ++r) product[r] += key * load<Floats>(query + r * w.key_dim + d);
            }
            for (int r = 0; r < ROWS; ++r) products[r][k] = product[r];
        }
        for (int r = 0; r < ROWS; ++r) store(scores + r * RUN + t0, sums(products[r]));
    }
}

template <int DTYPE, int ROWS>
void add_exact(const Worker& w, const Block& block, int64_t b, int64_t h, int64_t token, int length,
               const float* shares, const Partial* partials) {
    const ExactTokens& values = block.exact_values;
    const int64_t first_value = b * values.batch_stride + h * values.head_stride + token * values.token_stride;
    const int value_dim = static_cast<int>(w.call.value_dim);
    constexpr int TOGETHER = 4;  // vectors of a token at a time, so that sums do not wait for each other
    for (int d0 = 0; d0 < value_dim; d0 += TOGETHER * LANES) {
        const int vectors = std::min(TOGETHER, round_up(value_dim - d0, LANES) / LANES);
        Floats totals[ROWS][TOGETHER] = {};
        const auto add = [&](auto count) {
            for (int t = 0; t < length; ++t)
                for (int i = 0; i < count; ++i) {
                    const int d = d0 + i * LANES;
                    const int64_t place = first_value + t * values.token_stride + d;
                    const Floats value = numbers<DTYPE>(values.data, place, value_dim - d);
                    for (int r = 0; r < ROWS; ++r) totals[r][i] += value * shares[r * RUN + t];
                }
        };
        // With a constant count, the sums stay in registers.
        if (vectors == TOGETHER)
            add(std::integral_constant<int, TOGETHER>());
        else
            add(vectors);
        for (int r = 0; r < ROWS; ++r)
            for (int i = 0; i < vectors; ++i) {
                float* to = partials[r].exact + d0 + i * LANES;
                store(to, load<Floats>(to) + totals[r][i]);
            }
    }
}

// Attention of `num_rows` rows from `first_row` on, MOST_ROWS at most.
inline void attend_exact(Worker& w, const Block& block, int64_t b, int64_t h, int64_t first_row, int num_rows,
                         int64_t token, int length, int64_t column, Partial* partials) {
    with_dtype(block.exact_keys.dtype, [&](auto dtype) {
        by_rows(num_rows, [&](auto rows, int row) {
            score_exact<decltype(dtype)::value, decltype(rows)::value>(w, block, b, h, first_row + row, token, length,
                                                                       w.scores.data() + row * RUN);
        });
    });
    bool any = false;
    for (int r = 0; r < num_rows; ++r) {
        float *scores = w.scores.data() + r * RUN, unused;
        if (exponentiate<false>(w.call, scores, length, b, first_row + r, column, partials[r], w.value_dim, nullptr,
                                unused))
            any = true;
        else
            std::fill(scores, scores + length, 0.0f);
    }
    if (!any) return;
    with_dtype(block.exact_values.dtype, [&](auto dtype) {
        by_rows(num_rows, [&](auto rows, int row) {
            add_exact<decltype(dtype)::value, decltype(rows)::value>(w, block, b, h, token, length,
                                                                     w.scores.data() + row * RUN, partials + row);
        });
    });
}

}  // namespace
}  // namespace spectral
