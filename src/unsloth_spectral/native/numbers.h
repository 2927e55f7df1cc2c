// Reading stored numbers of any dtype as vectors of floats.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "abi.h"
#include "simd.h"

namespace spectral {
namespace {

// LANES numbers from `from + place` on; zeros if only `count` fewer exist.
template <int DTYPE>
INLINE Floats numbers(const void* from, int64_t place, int count) {
    if constexpr (DTYPE == FLOAT32) {
        const float* values = static_cast<const float*>(from) + place;
        if (count >= LANES) return load<Floats>(values);
        Floats result = {};
        for (int i = 0; i < count; ++i) result[i] = values[i];
        return result;
    } else {
        const uint16_t* values = static_cast<const uint16_t*>(from) + place;
        Halves halves = {};
        if (count >= LANES)
            halves = load<Halves>(values);
        else
            for (int i = 0; i < count; ++i) halves[i] = values[i];
        const Words wide = __builtin_convertvector(halves, Words);
        if constexpr (DTYPE == BFLOAT16) return bits<Floats>(wide << 16);
        // Half precision: the exponent's bias differs by 112, except for infinities and NaN.
        const Floats value = bits<Floats>((wide & 0x7fffu) << 13) * 5.192296858534828e+33f;
        const Words special = bits<Words>((wide & 0x7c00u) == 0x7c00u) & 0x7f800000u;
        return bits<Floats>(bits<Words>(value) | special | ((wide & 0x8000u) << 16));
    }
}

// Calls `function` with the dtype as a compile-time constant.
template <typename Function>
void with_dtype(int64_t dtype, const Function& function) {
    switch (dtype) {
        case FLOAT32: return function(std::integral_constant<int, FLOAT32>());
        case BFLOAT16: return function(std::integral_constant<int, BFLOAT16>());
        default: return function(std::integral_constant<int, FLOAT16>());
    }
}

// The scales of n bytes, times a factor. Whole vectors are written.
INLINE void scales_of(const uint8_t* levels, int n, const float* meanings, float factor, float* to) {
    // Levels fall by a constant ratio, except the last one, which is zero.
    const float step = std::log(meanings[1]);
    uint8_t rest[LANES] = {};
    for (int i = 0; i < n; i += LANES) {
        const bool is_whole = n - i >= LANES;
        if (!is_whole) std::copy(levels + i, levels + n, rest);
        const Ints level = widen(is_whole ? levels + i : rest);
        store(to + i, choose(level == 255, Floats{}, exponential(to_floats(level) * step) * factor));
    }
}

}  // namespace
}  // namespace spectral
