// Scores of un-rotated keys, which are rebuilt and rotated in registers.
#pragma once

#include <algorithm>

#include "weights.h"
#include "worker.h"

namespace spectral {
namespace {

// Prepares the basis that rebuilds keys, and the tables of their rotation.
void start_rebuilding(Worker& w, const Rotation& rotation, const int8_t* vectors, const float* vector_scales) {
    const int dims = static_cast<int>(w.call.key_dim), pairs = static_cast<int>(rotation.num_pairs);
    const int width = w.components.width;
    w.rebuilt.columns.assign(static_cast<size_t>(dims + 1) * w.components.width, 0.0f);
    for (int i = 0; i < w.components.count; ++i)
        for (int d = 0; d < dims; ++d)
            w.rebuilt.columns[d * width + i] = vector_scales[i] * static_cast<float>(vectors[i * dims + d]);
    for (auto& rows : w.rebuilt.rows) rows.assign(static_cast<size_t>(dims + 1) * w.components.width / 4, 0);
    w.rebuilt.worths.assign(dims + 1, 0.0f);
    w.rebuilt.constants.assign(dims + 1, 0.0f);
    // Dimensions that do not rotate have the angle zero.
    w.rebuilt.cosines.assign(w.rebuilt.first.size() * TILE, 1.0f);
    w.rebuilt.sines.assign(w.rebuilt.first.size() * TILE, 0.0f);
    std::copy(rotation.cosines, rotation.cosines + pairs * TILE, w.rebuilt.cosines.begin());
    std::copy(rotation.sines, rotation.sines + pairs * TILE, w.rebuilt.sines.begin());
}

// The basis under the tile's scales, as integer weights: one row per dimension.
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

// Scores of the current tile, whose keys are rebuilt and rotated one pair of dimensions at a time.
template <int ROWS>
void score_rebuilt(Worker& w, int64_t row, int length, float* scores) {
    const int pairs = static_cast<int>(w.rebuilt.first.size()), lanes = w.components.width / 4;
    for (int part = 0; part * BYTES < length; ++part) {
        Floats totals[ROWS][4] = {};
        for (int p = 0; p < pairs; ++p) {
            const int first = w.rebuilt.first[p], second = w.rebuilt.second[p];
            const int32_t* first_high = &w.rebuilt.rows[0][first * lanes];
            const int32_t* first_low = &w.rebuilt.rows[1][first * lanes];
            const int32_t* second_high = &w.rebuilt.rows[0][second * lanes];
            const int32_t* second_low = &w.rebuilt.rows[1][second * lanes];
            Sums real[4] = {}, imaginary[4] = {};
            for (int quad = 0; quad < w.components.num_quads; ++quad) {
                const Ints a = broadcast(first_high[quad]), b = broadcast(first_low[quad]);
                const Ints c = broadcast(second_high[quad]), d = broadcast(second_low[quad]);
                for (int k = 0; k < 4; ++k) {
                    const Codes codes = Codes::of(w.components.codes[quad * VECTORS + 4 * part + k]);
                    Sums::add(real[k], codes, a, b);
                    Sums::add(imaginary[k], codes, c, d);
                }
            }
            for (int k = 0; k < 4; ++k) {
                const Floats x = Sums::total(real[k]) * w.rebuilt.worths[first] + w.rebuilt.constants[first];
                const Floats y = Sums::total(imaginary[k]) * w.rebuilt.worths[second] + w.rebuilt.constants[second];
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
