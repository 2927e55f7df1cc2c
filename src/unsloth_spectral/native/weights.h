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

// The larger of a and b; not a number if either is not.
INLINE float larger_or_nan(float a, float b) { return a != a || a >= b ? a : b; }

struct Weighed {
    float worth;  // the value of one unit of the integers
    float sum;    // the sum of the integers
};

// Converts n floats of magnitude up to `most` to weights up to `full`, FULL or less; n is a multiple of LANES.
INLINE Weighed to_weights(const float* from, float most, float full, int32_t* first, int32_t* second, int n) {
    Floats sums = {};
    const float factor = factor_to(full, most);
    for (int i = 0; i < n; i += LANES) {
        const Ints whole = rounded(load<Floats>(from + i) * factor);
        sums += to_floats(whole);
        store_weights(whole, first + i / 4, second + i / 4);
    }
    return {most / full, sum(sums)};
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

}  // namespace
}  // namespace spectral
