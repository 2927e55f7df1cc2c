// Scores of coded keys: preparation of a block and of a tile, and the scores of a tile.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "anchors.h"
#include "components.h"
#include "numbers.h"
#include "waves.h"
#include "worker.h"

namespace spectral {
namespace {

void read_mean(Worker& w, const Block& block, int64_t b, int64_t h) {
    w.mean.resize(w.key_dim);
    const int64_t place = (b * w.call.num_heads + h) * w.call.key_dim;
    for (int d = 0; d < w.key_dim; d += LANES)
        store(w.mean.data() + d, numbers<FLOAT16>(block.keys.mean, place + d, static_cast<int>(w.call.key_dim) - d));
}

// Prepares everything for a coded block that does not depend on the tokens.
void start_block(Worker& w, const Block& block, int64_t b, int64_t h) {
    const Call& call = w.call;
    const Rotation& rotation = block.rotation;
    const int pairs = static_cast<int>(rotation.num_pairs);
    start_components(w.components, block.keys, h);
    w.projection.scaled.assign(ROWS_TOGETHER * w.components.width, 0.0f);
    for (auto& weights : w.projection.weights) weights.assign(ROWS_TOGETHER * w.components.width / 4, 0);
    const int64_t first_component = b * block.keys.num_components + w.components.first;
    const Vectors vectors = block.keys.rows
                                ? Vectors{block.keys.vectors, block.keys.rows + w.components.first}
                                : Vectors{block.keys.vectors + first_component * call.key_dim, nullptr};
    start_projection(w, rotation, b, vectors, block.keys.vector_scales + first_component);
    read_mean(w, block, b, h);
    const float* mean = w.mean.data();
    const std::vector<bool> rotates = dimensions_of_pairs(rotation, 0, call.key_dim);
    w.angles.tile.resize(2 * pairs);
    w.angles.fixed.assign(call.num_rows, 0.0f);
    // LANES more, because whole vectors are read.
    for (auto* parts : {&w.angles.cosine, &w.angles.sine}) parts->assign(call.num_rows * pairs + LANES, 0.0f);
    for (int64_t row = 0; row < call.num_rows; ++row) {
        const float* q = w.query.data() + row * w.key_dim;
        for (int p = 0; p < pairs; ++p) {
            const int first = rotation.first[p], second = rotation.second[p];
            // q R(n) mu = cosine * cos + sine * sin.
            w.angles.cosine[row * pairs + p] = q[first] * mean[first] + q[second] * mean[second];
            w.angles.sine[row * pairs + p] = q[second] * mean[first] - q[first] * mean[second];
        }
        for (int d = 0; d < call.key_dim; ++d)
            if (!rotates[d]) w.angles.fixed[row] += q[d] * mean[d];
    }
    w.angles.tile_cosine = w.angles.cosine;
    w.angles.tile_sine = w.angles.sine;
    w.waves.unit.assign(call.num_rows, 0.0f);
    if (pairs) start_waves(w, rotation, b);
    w.next_tile = -1;
}

INLINE const uint8_t* levels_of(const Worker& w, const Block& block, int64_t b, int64_t tile) {
    const int64_t tiles = (block.num_tokens + TILE - 1) / TILE;
    return block.keys.scales + (b * tiles + tile) * block.keys.num_components + w.components.first;
}

// Prepares a tile for `num_rows` rows from `first_row` on: the rotation of its first token, the mean's term relative to
// that rotation, and the tile's scales.
void start_tile(Worker& w, const Block& block, int64_t b, int64_t tile, int64_t first_row, int num_rows) {
    Angles& a = w.angles;
    const int pairs = static_cast<int>(block.rotation.num_pairs);
    if (pairs) {
        double *__restrict real = a.tile.data(), *__restrict imaginary = real + pairs;
        if (tile == w.next_tile) {
            const double *__restrict c = block.rotation.tile_step, *__restrict s = c + pairs;
            for (int p = 0; p < pairs; ++p) {
                const double next = real[p] * c[p] - imaginary[p] * s[p];
                imaginary[p] = real[p] * s[p] + imaginary[p] * c[p];
                real[p] = next;
            }
        } else {
            const float* start = block.rotation.start + b * block.rotation.start_stride;
            for (int p = 0; p < pairs; ++p) {
                const double angle = block.rotation.step[p] * static_cast<double>(tile * TILE);
                const double c = std::cos(angle), s = std::sin(angle);
                real[p] = start[2 * p] * c - start[2 * p + 1] * s;
                imaginary[p] = start[2 * p] * s + start[2 * p + 1] * c;
            }
        }
        a.tile_float.resize(2 * pairs + LANES);
        for (int p = 0; p < 2 * pairs; ++p) a.tile_float[p] = static_cast<float>(a.tile[p]);
        // (a - io)(c + is) = a' - io'.
        for (int64_t row = first_row; row < first_row + num_rows; ++row)
            rotate_back(a.cosine.data() + row * pairs, a.sine.data() + row * pairs, a.tile_float.data(),
                        a.tile_float.data() + pairs, a.tile_cosine.data() + row * pairs,
                        a.tile_sine.data() + row * pairs, pairs);
    }
    w.next_tile = tile + 1;
    scales_of(levels_of(w, block, b, tile), w.components.count, w.call.key_levels, 1.0f, w.components.scales.data());
}

// Scores of the current tile for ROWS rows from `row` on.
template <int ROWS>
void score_tile(Worker& w, const Block& block, int64_t row, int length, float* scores) {
    const int vectors = round_up(length, BYTES) / LANES, lanes = w.components.width / 4;
    const int waves = static_cast<int>(block.rotation.num_waves);
    const int64_t room = heights_per_row(block.rotation);
    if (waves) weigh_waves<ROWS>(w, block.rotation, row);
    constexpr int TOGETHER = 2;
    Worth worths[ROWS];
    weigh_components<ROWS>(w, project<ROWS>(w, block.rotation, row), row, worths);
    for (int v = 0; v < vectors; v += TOGETHER) {
        w.next_values.fetch(LANES / 2);
        Floats products[ROWS][TOGETHER];
        Sums fine[ROWS][TOGETHER] = {};
        for (int quad = 0; quad < w.components.num_fine; ++quad) {
            Codes codes[TOGETHER];
            for (int k = 0; k < TOGETHER; ++k) codes[k] = Codes::of(w.components.codes[quad * VECTORS + v + k]);
            for (int r = 0; r < ROWS; ++r) {
                const Ints first = broadcast(w.projection.weights[0][r * lanes + quad]);
                const Ints second = broadcast(w.projection.weights[1][r * lanes + quad]);
                for (int k = 0; k < TOGETHER; ++k) Sums::add(fine[r][k], codes[k], first, second);
            }
        }
        for (int r = 0; r < ROWS; ++r)
            for (int k = 0; k < TOGETHER; ++k) products[r][k] = Sums::total(fine[r][k]) * worths[r].fine;
#if defined(__AVX512VNNI__)
        Ints rough[ROWS][TOGETHER] = {};
        for (int quad = w.components.num_fine; quad < w.components.num_quads; ++quad)
            for (int r = 0; r < ROWS; ++r) {
                const Ints weights = broadcast(w.projection.weights[0][r * lanes + quad]);
                for (int k = 0; k < TOGETHER; ++k)
                    rough[r][k] = add_byte_products(rough[r][k], weights, w.components.codes[quad * VECTORS + v + k]);
            }
        for (int r = 0; r < ROWS; ++r)
            for (int k = 0; k < TOGETHER; ++k) products[r][k] += worths[r].rough * to_floats(rough[r][k]);
#endif
        Ints means[ROWS][TOGETHER] = {};
        for (int j = 0; j < waves; ++j)
            for (int k = 0; k < TOGETHER; ++k) {
                const Shorts wave = load<Shorts>(block.rotation.waves + 2 * (j * TILE + (v + k) * LANES));
                for (int r = 0; r < ROWS; ++r)
                    means[r][k] =
                        add_products(means[r][k], wave, bits<Shorts>(broadcast(w.waves.heights[r * room + j])));
            }
        for (int r = 0; r < ROWS; ++r)
            for (int k = 0; k < TOGETHER; ++k)
                store(scores + r * RUN + (v + k) * LANES,
                      products[r][k] + (to_floats(means[r][k]) * w.waves.unit[row + r] + worths[r].constant));
    }
}

}  // namespace
}  // namespace spectral
