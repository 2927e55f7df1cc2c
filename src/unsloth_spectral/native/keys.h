// Scores of coded keys: preparation of a block and of a tile, and the scores of a tile.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "components.h"
#include "numbers.h"
#include "rebuilt.h"
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

// Pairs of dimensions to rebuild: those that rotate, then the others two by two.
void pair_dimensions(Rebuilding& rebuilt, const Rotation& rotation, const std::vector<bool>& rotates) {
    rebuilt.first.assign(rotation.first, rotation.first + rotation.num_pairs);
    rebuilt.second.assign(rotation.second, rotation.second + rotation.num_pairs);
    const int none = static_cast<int>(rotates.size());
    for (int d = 0; d < none; ++d) {
        if (rotates[d]) continue;
        if (rebuilt.first.size() > rebuilt.second.size())
            rebuilt.second.push_back(d);
        else
            rebuilt.first.push_back(d);
    }
    rebuilt.second.resize(rebuilt.first.size(), none);
}

// Prepares everything for a coded block that does not depend on the tokens.
void start_block(Worker& w, const Block& block, int64_t b, int64_t h) {
    const Call& call = w.call;
    const int pairs = static_cast<int>(block.rotation.num_pairs);
    start_components(w.components, block.keys, h);
    w.projection.scaled.assign(4 * w.components.width, 0.0f);
    for (auto& weights : w.projection.weights) weights.assign(w.components.width, 0);
    read_mean(w, block, b, h);
    const float* mean = w.mean.data();
    const bool rebuilds = !block.keys.is_rotated && pairs > 0;
    const int64_t first_component = b * block.keys.num_components + w.components.first;
    const int8_t* vectors = block.keys.vectors + first_component * call.key_dim;
    const float* vector_scales = block.keys.vector_scales + first_component;
    std::vector<bool> rotates(call.key_dim, false);
    for (int p = 0; p < pairs; ++p) rotates[block.rotation.first[p]] = rotates[block.rotation.second[p]] = true;
    w.angles.tile.resize(2 * pairs);
    w.projection.fixed.assign(call.num_rows, 0.0f);
    if (rebuilds) {
        pair_dimensions(w.rebuilt, block.rotation, rotates);
        start_rebuilding(w, block.rotation, vectors, vector_scales);
    } else {
        project(w, vectors, vector_scales);
    }
    const int per_row = rebuilds ? static_cast<int>(w.rebuilt.first.size()) : pairs;
    // LANES more, because whole vectors are read.
    for (auto* parts : {&w.angles.cosine, &w.angles.sine}) parts->assign(call.num_rows * per_row + LANES, 0.0f);
    for (int64_t row = 0; row < call.num_rows; ++row) {
        const float* q = w.query.data() + row * w.key_dim;
        for (int p = 0; p < per_row; ++p) {
            const int first = rebuilds ? w.rebuilt.first[p] : block.rotation.first[p];
            const int second = rebuilds ? w.rebuilt.second[p] : block.rotation.second[p];
            const bool alone = second >= call.key_dim;
            const float real = q[first], imaginary = alone ? 0.0f : q[second];
            const float m_real = mean[first], m_imaginary = alone ? 0.0f : mean[second];
            // Rotated frame: q R(n) mu = cosine * cos + sine * sin. Else the query itself, which each tile rotates.
            w.angles.cosine[row * per_row + p] = rebuilds ? real : real * m_real + imaginary * m_imaginary;
            w.angles.sine[row * per_row + p] = rebuilds ? imaginary : imaginary * m_real - real * m_imaginary;
        }
        for (int d = 0; d < call.key_dim && !rebuilds; ++d)
            if (!rotates[d]) w.projection.fixed[row] += q[d] * mean[d];
    }
    w.angles.tile_cosine = w.angles.cosine;
    w.angles.tile_sine = w.angles.sine;
    w.waves.unit.assign(call.num_rows, 0.0f);
    if (!rebuilds && pairs) start_waves(w, block.rotation, b);
    w.next_tile = -1;
}

// Rotates the pairs (a, b) back by the angle of (c, s): a' = a c + b s, b' = b c - a s.
INLINE void rotate_back(const float* a, const float* b, const float* c, const float* s, float* to_a, float* to_b,
                        int n) {
    for (int p = 0; p < n; ++p) {
        const float first = a[p] * c[p] + b[p] * s[p], second = b[p] * c[p] - a[p] * s[p];
        to_a[p] = first;
        to_b[p] = second;
    }
}

INLINE const uint8_t* levels_of(const Worker& w, const Block& block, int64_t b, int64_t tile) {
    const int64_t tiles = (block.num_tokens + TILE - 1) / TILE;
    return block.keys.scales + (b * tiles + tile) * block.keys.num_components + w.components.first;
}

// Prepares a tile: the rotation of its first token, the rows relative to that rotation, and the tile's scales.
void start_tile(Worker& w, const Block& block, int64_t b, int64_t tile) {
    Angles& a = w.angles;
    const int pairs = static_cast<int>(block.rotation.num_pairs);
    const int64_t per_row = static_cast<int64_t>(a.cosine.size() - LANES) / w.call.num_rows;
    if (pairs) {
        double* real = a.tile.data();
        double* imaginary = real + pairs;
        if (tile == w.next_tile) {
            const double *c = block.rotation.tile_step, *s = c + pairs;
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
        a.tile_float.resize(2 * pairs);
        for (int p = 0; p < 2 * pairs; ++p) a.tile_float[p] = static_cast<float>(a.tile[p]);
        // Mean: (a - io)(c + is) = a' - io'. Query: conj(q)(c + is) is conj(q'), the query rotated back.
        for (int64_t row = 0; row < w.call.num_rows; ++row)
            rotate_back(a.cosine.data() + row * per_row, a.sine.data() + row * per_row, a.tile_float.data(),
                        a.tile_float.data() + pairs, a.tile_cosine.data() + row * per_row,
                        a.tile_sine.data() + row * per_row, pairs);
    }
    w.next_tile = tile + 1;
    scales_of(levels_of(w, block, b, tile), w.components.count, w.call.key_levels, 1.0f, w.components.scales.data());
}

// Scores of the current tile for ROWS rows from `row` on, with keys in the rotated frame or without rotation.
template <int ROWS>
void score_tile(Worker& w, const Block& block, int64_t row, int length, float* scores) {
    const int vectors = round_up(length, BYTES) / LANES, lanes = w.components.width / 4;
    const int waves = static_cast<int>(block.rotation.num_waves);
    const int64_t room = heights_per_row(block.rotation);
    Worth worths[ROWS];
    weigh_components<ROWS>(w, row, worths);
    if (waves) weigh_waves<ROWS>(w, block.rotation, row);
    Floats products[ROWS][VECTORS];
    constexpr int TOGETHER = 2;
    for (int v = 0; v < vectors; v += TOGETHER) {
        Sums sums[ROWS][TOGETHER] = {};
        for (int quad = 0; quad < w.components.num_fine; ++quad) {
            Codes codes[TOGETHER];
            for (int k = 0; k < TOGETHER; ++k) codes[k] = Codes::of(w.components.codes[quad * VECTORS + v + k]);
            for (int r = 0; r < ROWS; ++r) {
                const Ints first = broadcast(w.projection.weights[0][r * lanes + quad]);
                const Ints second = broadcast(w.projection.weights[1][r * lanes + quad]);
                for (int k = 0; k < TOGETHER; ++k) Sums::add(sums[r][k], codes[k], first, second);
            }
        }
        for (int r = 0; r < ROWS; ++r)
            for (int k = 0; k < TOGETHER; ++k) products[r][v + k] = Sums::total(sums[r][k]) * worths[r].fine;
    }
#if defined(__AVX512VNNI__)
    add_rough<ROWS>(w, worths, products);
#endif
    for (int v = 0; v < vectors; v += TOGETHER) {
        Ints sums[ROWS][TOGETHER] = {};
        for (int j = 0; j < waves; ++j)
            for (int k = 0; k < TOGETHER; ++k) {
                const Shorts wave = load<Shorts>(block.rotation.waves + 2 * (j * TILE + (v + k) * LANES));
                for (int r = 0; r < ROWS; ++r)
                    sums[r][k] =
                        add_products(sums[r][k], wave, bits<Shorts>(broadcast(w.waves.heights[r * room + j])));
            }
        for (int r = 0; r < ROWS; ++r)
            for (int k = 0; k < TOGETHER; ++k)
                store(scores + r * RUN + (v + k) * LANES,
                      products[r][v + k] + (to_floats(sums[r][k]) * w.waves.unit[row + r] + worths[r].constant));
    }
}

}  // namespace
}  // namespace spectral
