// Floats as integer weights, which codes are multiplied with.
#pragma once

#include "simd.h"

namespace spectral {
namespace {

// What makes numbers of up to `most` in magnitude such of up to `full`; 0 where they are all next to nothing.
INLINE float factor_to(float full, float most) {
    // Below this the quotient is infinite, and zeros times it are not numbers.
    return most > 1e-33f ? full / most : 0.0f;
}

struct Weighed {
    float worth;  // of one of the integers
    float sum;    // of the integers, each times its offset
};

// n floats, none above `most` in magnitude, as weights, that one as FULL; n is a multiple of LANES. Without offsets
// each is 1.
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

// n shares of tokens as weights of a byte. What rounding takes from one token is given to one behind it, so that
// the many whose share is less than one weight keep what they have together.
INLINE Weighed to_byte_weights(const float* from, float most, int32_t* to, int n) {
    const float factor = factor_to(FULL_BYTE, most);
    constexpr int TOGETHER = 4;  // each waits for the one before it in its own place only
    Floats rest[TOGETHER] = {}, sums = {};
    for (int t = 0; t < n; t += TOGETHER * LANES)
        for (int k = 0; k < TOGETHER; ++k) {
            const Floats exact = load<Floats>(from + t + k * LANES) * factor + rest[k];
            const Ints whole = rounded(exact);
            const Floats kept = to_floats(whole);
            rest[k] = exact - kept;
            sums += kept;
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
