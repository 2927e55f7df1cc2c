// Attention over a run of exact tokens.
#pragma once

#include <algorithm>
#include <type_traits>

#include "numbers.h"
#include "softmax.h"
#include "worker.h"

namespace spectral {
namespace {

template <int DTYPE, int ROWS>
void score_exact(Worker& w, const Block& block, int64_t b, int64_t h, int64_t row, int64_t token, int length) {
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
        for (int r = 0; r < ROWS; ++r) store(w.scores.data() + r * RUN + t0, sums(products[r]));
    }
}

template <int DTYPE, int ROWS>
void add_exact(Worker& w, const Block& block, int64_t b, int64_t h, int64_t token, int length, Partial* partials) {
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
                    for (int r = 0; r < ROWS; ++r) totals[r][i] += value * w.scores[r * RUN + t];
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

template <int ROWS>
void attend_exact(Worker& w, const Block& block, int64_t b, int64_t h, int64_t row, int64_t token, int length,
                  int64_t column, Partial* partials) {
    with_dtype(block.exact_keys.dtype, [&](auto dtype) {
        score_exact<decltype(dtype)::value, ROWS>(w, block, b, h, row, token, length);
    });
    bool any = false;
    for (int r = 0; r < ROWS; ++r) {
        float *scores = w.scores.data() + r * RUN, unused;
        if (exponentiate<false>(w.call, scores, length, b, row + r, column, partials[r], w.value_dim, nullptr, unused))
            any = true;
        else
            std::fill(scores, scores + length, 0.0f);
    }
    if (!any) return;
    with_dtype(block.exact_values.dtype, [&](auto dtype) {
        add_exact<decltype(dtype)::value, ROWS>(w, block, b, h, token, length, partials);
    });
}

}  // namespace
}  // namespace spectral
