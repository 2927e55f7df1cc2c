// Floats as integer weights for products with codes.
#pragma once

#include "simd.h"

namespace spectral {
namespace {

// The factor that scales numbers of magnitude up to `most` to magnitude up to `full`; 0 if `most` is next to nothing.
INLINE float factor_to(float full, float most) {
    // Below this the quotient is infinite, and zero times it is not a number.
    return most > 1e-33f ? full / most : 0.0f;
}

struct Weighed {
    float worth;  // the value of one unit of the integers
    float sum;    // the sum of the integers, each times its offset
};

// Converts n floats of magnitude up to `most` to weights up to FULL; n is a multiple of LANES. Without OFFSETS each
// offset is 1.
template <bool OFFSETS>
INLINE Weighed to_weights(const float* from, float most, const float* offsets, int32_t* first, int32_t* second, int n) {
    Floats sums = {};
    const float factor = factor_to(FULL, most);
    for (int i = 0; i < n; i += LANES) {
        const Ints whole = rounded(load<Floats>(from + i) * factor);
        if constexpr (OFFSETS)
            sums += to_floats(whole) * load<Floats>(offsets + i);
        else
            sums += to_floats(whole);
        store_weights(whole, first + i / 4, second + i / 4);
    }
    return {most / FULL, sum(sums)};
}

// Converts n shares of tokens to byte weights. The rounding error of a token is added to a later one, so that many
// tokens with shares below one unit keep their total.
INLINE Weighed to_byte_weights(const float* from, float most, int32_t* to, int n) {
    const float factor = factor_to(FULL_BYTE, most);
    constexpr int TOGETHER = 4;  // independent chains of rounding errors
    Floats errors[TOGETHER] = {}, sums = {};
    for (int t = 0; t < n; t += TOGETHER * LANES)
        for (int k = 0; k < TOGETHER; ++k) {
            const Floats exact = load<Floats>(from + t + k * LANES) * factor + errors[k];
            const Ints whole = rounded(exact);
            const Floats rounded_share = to_floats(whole);
            errors[k] = exact - rounded_share;
            sums += rounded_share;
            store_byte_weights(whole, to + (t + k * LANES) / 4);
        }
    return {most / FULL_BYTE, sum(sums)};
}

// to = a * b, and the largest magnitude.
INLINE float multiply(const float* a, const float* b, float* to, int n) {
    Floats peak = {};
    for (int i = 0; i < n; i += LANES) {
        const Floats value = load<Floats>(a + i) * load<Floats>(b + i);
        peak = larger(peak, magnitude(value));
        store(to + i, value);
    }
    return largest(peak);
}

}  // namespace
}  // namespace spectral
