// The mean's term in the scores of rotated keys: a few integer waves, each with a height for every query row.
#pragma once

#include <algorithm>
#include <cmath>

#include "weights.h"
#include "worker.h"

namespace spectral {
namespace {

// Heights per row, with room for whole vectors.
INLINE int64_t heights_per_row(const Rotation& rotation) { return rotation.num_waves + 2 * LANES; }

// Chooses the unit in which the mean's term becomes integers. A pair rotates from tile to tile but keeps its length, so
// lengths bound all later terms: each integer fits 16 bits, and each complete sum of products with waves fits 32.
// Intermediate sums may wrap around.
void start_waves(Worker& w, const Rotation& rotation, int64_t b) {
    const int pairs = static_cast<int>(rotation.num_pairs), fast = static_cast<int>(rotation.num_fast);
    const int slow = pairs - fast;
    w.waves.heights.assign(ROWS_TOGETHER * heights_per_row(rotation), 0);
    for (int64_t row = 0; row < w.call.num_rows; ++row) {
        float *cosine = &w.angles.cosine[row * pairs], *sine = &w.angles.sine[row * pairs];
        float total = 0.0f, most = 0.0f, smooth[MAX_SMOOTH] = {};
        for (int p = 0; p < pairs; ++p) {
            // The rotations of some models also scale.
            const float *start = rotation.start + b * rotation.start_stride + 2 * p;
            const float length = std::sqrt((cosine[p] * cosine[p] + sine[p] * sine[p]) *
                                           (start[0] * start[0] + start[1] * start[1]));
            total += length;
            if (p < fast) most = std::max(most, length);
            for (int j = 0; j < MAX_SMOOTH && p >= fast; ++j)
                smooth[j] += length * rotation.reach[(p - fast) * MAX_SMOOTH + j];
        }
        for (int j = 0; j < MAX_SMOOTH && slow; ++j) most = std::max(most, smooth[j]);
        // A little room for rounding errors.
        most = std::max(most, 0.5f * total) * 1.002f;
        const float factor = factor_to(FULL_WAVE, most);
        for (int p = 0; p < pairs; ++p) cosine[p] *= factor, sine[p] *= factor;
        w.waves.unit[row] = most / (FULL_WAVE * FULL_WAVE);
    }
}

// The heights of each wave in the mean's term of ROWS rows, in the current tile.
template <int ROWS>
INLINE void weigh_waves(Worker& w, const Rotation& rotation, int64_t row) {
    const int pairs = static_cast<int>(rotation.num_pairs), fast = static_cast<int>(rotation.num_fast);
    const float *cosine = &w.angles.tile_cosine[row * pairs], *sine = &w.angles.tile_sine[row * pairs];
    Floats smooth_cosines[ROWS][MAX_SMOOTH / LANES] = {}, smooth_sines[ROWS][MAX_SMOOTH / LANES] = {};
    for (int p = fast; p < pairs; ++p)
        for (int j = 0; j < MAX_SMOOTH / LANES; ++j) {
            const Floats c = load<Floats>(rotation.mixing + (p - fast) * MAX_SMOOTH + j * LANES);
            const Floats s = load<Floats>(rotation.mixing + (pairs - fast + p - fast) * MAX_SMOOTH + j * LANES);
            for (int r = 0; r < ROWS; ++r) {
                smooth_cosines[r][j] += c * cosine[r * pairs + p];
                smooth_sines[r][j] += s * sine[r * pairs + p];
            }
        }
    for (int r = 0; r < ROWS; ++r) {
        int32_t* heights = &w.waves.heights[r * heights_per_row(rotation)];
        for (int p = 0; p < fast; p += LANES) {
            const Ints c = rounded(load<Floats>(cosine + r * pairs + p));
            const Ints s = rounded(load<Floats>(sine + r * pairs + p));
            store(heights + p, (c & 0xffff) | bits<Ints>(bits<Words>(s) << 16));
        }
        // Behind the fast pairs; this overwrites the excess of whole vectors.
        for (int j = 0; j < MAX_SMOOTH / LANES; ++j)
            store(heights + fast + j * LANES / 2,
                  __builtin_convertvector(rounded(smooth_cosines[r][j] + smooth_sines[r][j]), HalfShorts));
    }
}

}  // namespace
}  // namespace spectral
