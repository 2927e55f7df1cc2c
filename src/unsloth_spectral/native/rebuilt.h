// Scores of un-rotated keys, which are rebuilt and rotated in registers.
#pragma once

#include <algorithm>

#include "weights.h"
#include "worker.h"

namespace spectral {
namespace {

// A basis to rebuild keys with, and the tables of their rotation.
void start_rebuilding(Worker& w, const Rotation& rotation, const int8_t* vectors, const float* vector_scales) {
    const int dims = static_cast<int>(w.call.key_dim), pairs = static_cast<int>(rotation.num_pairs);
    const int width = w.components.width;
    w.rebuilt.columns.assign(static_cast<size_t>(dims + 1) * w.components.width, 0.0f);
    for (int i = 0; i < w.components.count; ++i)
        for (int d = 0; d < dims; ++d)
            w.rebuilt.columns[d * width + i] = vector_scales[i] * static_cast<float>(vectors[i * dims + d]);
    for (auto& each : w.rebuilt.rows) each.assign(static_cast<size_t>(dims + 1) * w.components.width / 4, 0);
    w.rebuilt.worths.assign(dims + 1, 0.0f);
    w.rebuilt.constants.assign(dims + 1, 0.0f);
    // Dimensions that do not rotate have the angle zero.
    w.rebuilt.cosines.assign(w.rebuilt.first.size() * TILE, 1.0f);
    w.rebuilt.sines.assign(w.rebuilt.first.size() * TILE, 0.0f);
    std::copy(rotation.cosines, rotation.cosines + pairs * TILE, w.rebuilt.cosines.begin());
    std::copy(rotation.sines, rotation.sines + pairs * TILE, w.rebuilt.sines.begin());
}

// The basis under the tile's scales, as weights: one row a dimension.
void scale_basis(Worker& w) {
    const int width = w.components.width;
    float* scaled = w.projection.scaled.data();
    for (int64_t d = 0; d < w.call.key_dim; ++d) {
        const float most = multiply(w.rebuilt.columns.data() + d * width, w.components.scales.data(), scaled, width);
        int32_t *first = &w.rebuilt.rows[0][d * width / 4], *second = &w.rebuilt.rows[1][d * width / 4];
        const Weighed weighed = to_weights<true>(scaled, most, w.components.offsets.data(), first, second, width);
        w.rebuilt.worths[d] = weighed.worth;
        w.rebuilt.constants[d] = w.mean[d] - weighed.worth * weighed.sum;
    }
}

// Scores of the tile at hand, whose keys are rebuilt and rotated a pair of dimensions at a time.
template <int ROWS>
void score_rebuilt(Worker& w, int64_t row, int length, float* scores) {
    const int pairs = static_cast<int>(w.rebuilt.first.size()), lanes = w.components.width / 4;
    for (int part = 0; part * BYTES < length; ++part) {
        Floats totals[ROWS][4] = {};
        for (int p = 0; p < pairs; ++p) {
            const int one = w.rebuilt.first[p], other = w.rebuilt.second[p];
            const int32_t *one_high = &w.rebuilt.rows[0][one * lanes], *one_low = &w.rebuilt.rows[1][one * lanes];
            const int32_t* other_high = &w.rebuilt.rows[0][other * lanes];
            const int32_t* other_low = &w.rebuilt.rows[1][other * lanes];
            Sums real[4] = {}, imaginary[4] = {};
            for (int quad = 0; quad < w.components.num_quads; ++quad) {
                const Ints a = broadcast(one_high[quad]), b = broadcast(one_low[quad]);
                const Ints c = broadcast(other_high[quad]), d = broadcast(other_low[quad]);
                for (int k = 0; k < 4; ++k) {
                    const Codes codes = Codes::of(w.components.codes[quad * VECTORS + 4 * part + k]);
                    Sums::add(real[k], codes, a, b);
                    Sums::add(imaginary[k], codes, c, d);
                }
            }
            for (int k = 0; k < 4; ++k) {
                const Floats x = Sums::total(real[k]) * w.rebuilt.worths[one] + w.rebuilt.constants[one];
                const Floats y = Sums::total(imaginary[k]) * w.rebuilt.worths[other] + w.rebuilt.constants[other];
                const Floats c = load<Floats>(&w.rebuilt.cosines[p * TILE + (4 * part + k) * LANES]);
                const Floats s = load<Floats>(&w.rebuilt.sines[p * TILE + (4 * part + k) * LANES]);
                const Floats rotated_x = x * c - y * s, rotated_y = x * s + y * c;
                for (int r = 0; r < ROWS; ++r) {
                    totals[r][k] += rotated_x * w.angles.tile_cosine[(row + r) * pairs + p];
                    totals[r][k] += rotated_y * w.angles.tile_sine[(row + r) * pairs + p];
                }
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            for (int k = 0; k < 4; ++k) store(scores + r * RUN + part * BYTES + k * LANES, totals[r][k]);
        }
    }
}

}  // namespace
}  // namespace spectral
