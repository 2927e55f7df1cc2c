// The mean's part of the scores of rotated keys: a few waves of integers, each with a height for every query row.
#pragma once

#include <algorithm>
#include <cmath>

#include "weights.h"
#include "worker.h"

namespace spectral {
namespace {

// Of a row, with room for whole vectors behind.
INLINE int64_t heights_per_row(const Rotation& rotation) { return rotation.num_waves + 2 * LANES; }

// The unit in which the mean's term becomes integers. A pair rotates from tile to tile but keeps its length, so lengths
// bound all that comes: each integer has 16 bits, and every whole sum of products with waves 32. Sums on the way there
// may wrap around.
void start_waves(Worker& w, const Rotation& rotation, int64_t b) {
    const int pairs = static_cast<int>(rotation.num_pairs), fast = static_cast<int>(rotation.num_fast);
    const int slow = pairs - fast;
    w.waves.heights.assign(4 * heights_per_row(rotation), 0);
    for (int64_t row = 0; row < w.call.num_rows; ++row) {
        float *cosine = &w.angles.cosine[row * pairs], *sine = &w.angles.sine[row * pairs];
        float total = 0.0f, most = 0.0f, smooth[MAX_SMOOTH] = {};
        for (int p = 0; p < pairs; ++p) {
            // Some models' rotations stretch.
            const float *start = rotation.start + b * rotation.start_stride + 2 * p;
            const float length = std::sqrt((cosine[p] * cosine[p] + sine[p] * sine[p]) *
                                           (start[0] * start[0] + start[1] * start[1]));
            total += length;
            if (p < fast) most = std::max(most, length);
            for (int j = 0; j < MAX_SMOOTH && p >= fast; ++j)
                smooth[j] += length * rotation.reach[(p - fast) * MAX_SMOOTH + j];
        }
        for (int j = 0; j < MAX_SMOOTH && slow; ++j) most = std::max(most, smooth[j]);
        // A little room for what rounding adds.
        most = std::max(most, 0.5f * total) * 1.002f;
        const float factor = factor_to(FULL_WAVE, most);
        for (int p = 0; p < pairs; ++p) cosine[p] *= factor, sine[p] *= factor;
        w.waves.unit[row] = most / (FULL_WAVE * FULL_WAVE);
    }
}

// What the mean's term of ROWS rows has of each wave in the tile at hand.
template <int ROWS>
INLINE void weigh_waves(Worker& w, const Rotation& rotation, int64_t row) {
    const int pairs = static_cast<int>(rotation.num_pairs), fast = static_cast<int>(rotation.num_fast);
    const float *cosine = &w.angles.tile_cosine[row * pairs], *sine = &w.angles.tile_sine[row * pairs];
    Floats smooth[ROWS][MAX_SMOOTH / LANES] = {}, other[ROWS][MAX_SMOOTH / LANES] = {};
    for (int p = fast; p < pairs; ++p)
        for (int j = 0; j < MAX_SMOOTH / LANES; ++j) {
            const Floats c = load<Floats>(rotation.mixing + (p - fast) * MAX_SMOOTH + j * LANES);
            const Floats s = load<Floats>(rotation.mixing + (pairs - fast + p - fast) * MAX_SMOOTH + j * LANES);
            for (int r = 0; r < ROWS; ++r) {
                smooth[r][j] += c * cosine[r * pairs + p];
                other[r][j] += s * sine[r * pairs + p];
            }
        }
    for (int r = 0; r < ROWS; ++r) {
        int32_t* heights = &w.waves.heights[r * heights_per_row(rotation)];
        for (int p = 0; p < fast; p += LANES) {
            const Ints c = rounded(load<Floats>(cosine + r * pairs + p));
            const Ints s = rounded(load<Floats>(sine + r * pairs + p));
            store(heights + p, (c & 0xffff) | bits<Ints>(bits<Words>(s) << 16));
        }
        // Behind the fast pairs, over what whole vectors left there.
        for (int j = 0; j < MAX_SMOOTH / LANES; ++j)
            store(heights + fast + j * LANES / 2,
                  __builtin_convertvector(rounded(smooth[r][j] + other[r][j]), HalfShorts));
    }
}

}  // namespace
}  // namespace spectral
