// The running softmax of one query row.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "worker.h"

namespace spectral {
namespace {

constexpr float NOTHING = -std::numeric_limits<float>::infinity();

// Attention of one query row over some tokens, before the division by the softmax's denominator.
struct Partial {
    float maximum, total;
    float* coded;  // [value dim, padded] sum of coded values, still to be multiplied with the Hadamard matrix
    float* exact;  // [value dim, padded] sum of exact values
};

// Updates the softmax with a run: scores become exp(score - maximum) in place, times their factors if SCALED. Returns
// false if every token is masked.
template <bool SCALED>
bool exponentiate(const Call& call, float* scores, int length, int64_t b, int64_t row, int64_t column,
                  Partial& partial, int value_dim, const float* factors, float& most_scaled) {
    const int padded = round_up(length, TILE);
    if (call.softcap > 0.0f)
        for (int t = 0; t < padded; t += LANES) {
            Floats x = load<Floats>(scores + t) * (2.0f / call.softcap);
            x = choose(x > all(40.0f), all(40.0f), choose(x < all(-40.0f), all(-40.0f), x));
            store(scores + t, call.softcap * (1.0f - 2.0f / (exponential(x) + 1.0f)));
        }
    if (call.mask) {
        const float* mask = call.mask + b * call.mask_batch + row % call.query_length * call.mask_query + column;
        for (int t = 0; t < length; ++t) scores[t] += mask[t];
    }
    for (int t = length; t < padded; ++t) scores[t] = NOTHING;
    Floats peak = all(NOTHING);
    for (int t = 0; t < padded; t += LANES) peak = larger(load<Floats>(scores + t), peak);
    const float most = largest(peak);
    const float maximum = std::max(partial.maximum, most);
    if (maximum == NOTHING) {
        // All scores are masked, or some are not a number.
        bool clean = true;
        for (int t = 0; t < length; ++t) clean = clean && scores[t] == scores[t];
        if (clean) return false;
    }
    const float reference = maximum == NOTHING ? 0.0f : maximum;
    if (partial.maximum != reference) {
        const float shrink = partial.maximum == NOTHING ? 0.0f : std::exp(partial.maximum - reference);
        partial.total *= shrink;
        for (int d = 0; d < value_dim; d += LANES) {
            store(partial.coded + d, load<Floats>(partial.coded + d) * shrink);
            store(partial.exact + d, load<Floats>(partial.exact + d) * shrink);
        }
        partial.maximum = reference;
    }
    Floats total = {}, top = {};
    for (int t = 0; t < padded; t += LANES) {
        Floats share = exponential(load<Floats>(scores + t) - reference);
        total += share;
        if constexpr (SCALED) {
            share *= load<Floats>(factors + t);
            top = larger(share, top);
        }
        store(scores + t, share);
    }
    partial.total += sum(total);
    if constexpr (SCALED) most_scaled = largest(top);
    return true;
}

}  // namespace
}  // namespace spectral
