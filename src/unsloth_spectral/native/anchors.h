// The queries in the space of the components. Keys are un-rotated by anchors, so the queries are un-rotated likewise: a
// rotary pair with a span of 128 tokens once a tile, and the faster ones, with 64 and 32, twice and four times.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "worker.h"

namespace spectral {
namespace {

// Adds to ROWS rows of `to`, [row, component], the products of the columns of the `count` dimensions in `dims` with
// `weights`, of which a row's lie `stride` apart.
template <int ROWS>
INLINE void add_columns(const Worker& w, const int32_t* dims, int count, const float* weights, int64_t stride,
                        float* to) {
    const int width = w.components.width;
    const float* columns = w.projection.columns.data();
    // Several vectors at a time, so that sums do not wait for each other.
    const auto add = [&](auto together, int i) {
        constexpr int TOGETHER = decltype(together)::value;
        Floats totals[ROWS][TOGETHER];
        for (int r = 0; r < ROWS; ++r)
            for (int k = 0; k < TOGETHER; ++k) totals[r][k] = load<Floats>(to + r * width + i + k * LANES);
        for (int j = 0; j < count; ++j) {
            const float* column = columns + dims[j] * width + i;
            for (int r = 0; r < ROWS; ++r) {
                const Floats weight = all(weights[r * stride + j]);
                for (int k = 0; k < TOGETHER; ++k) totals[r][k] += weight * load<Floats>(column + k * LANES);
            }
        }
        for (int r = 0; r < ROWS; ++r)
            for (int k = 0; k < TOGETHER; ++k) store(to + r * width + i + k * LANES, totals[r][k]);
    };
    int i = 0;
    for (; i + 4 * LANES <= width; i += 4 * LANES) add(std::integral_constant<int, 4>(), i);
    for (; i < width; i += LANES) add(std::integral_constant<int, 1>(), i);
}

// For each dimension, whether a rotary pair from `pair` on has it.
inline std::vector<bool> dimensions_of_pairs(const Rotation& rotation, int64_t pair, int64_t dims) {
    std::vector<bool> is_rotary(dims, false);
    for (; pair < rotation.num_pairs; ++pair) is_rotary[rotation.first[pair]] = is_rotary[rotation.second[pair]] = true;
    return is_rotary;
}

// The basis of a head by columns, and the products of all rows with the dimensions that no anchor un-rotates.
void start_projection(Worker& w, const Rotation& rotation, int64_t b, const int8_t* vectors,
                      const float* vector_scales) {
    Projection& projection = w.projection;
    const int dims = static_cast<int>(w.call.key_dim), width = w.components.width;
    const int pairs = static_cast<int>(rotation.num_pairs);
    projection.columns.assign(static_cast<size_t>(dims) * width, 0.0f);
    for (int i = 0; i < w.components.count; ++i)
        for (int d = 0; d < dims; ++d)
            projection.columns[d * width + i] = vector_scales[i] * static_cast<float>(vectors[i * dims + d]);
    for (int k = 0; k < NUM_SPANS; ++k)
        projection.borders[k] = static_cast<int>(
            std::lower_bound(rotation.spans, rotation.spans + pairs, LEAST_SPAN << k) - rotation.spans);
    projection.borders[NUM_SPANS] = pairs;
    projection.piece = TILE;
    for (int k = NUM_SPANS; k-- > 0;)
        if (projection.borders[k] < projection.borders[k + 1]) projection.piece = LEAST_SPAN << k;

    const int first = projection.borders[0], anchored = pairs - first;
    const std::vector<bool> is_anchored = dimensions_of_pairs(rotation, first, dims);
    std::vector<int32_t> others;
    for (int d = 0; d < dims; ++d)
        if (!is_anchored[d]) others.push_back(d);
    projection.fixed.assign(w.call.num_rows * width, 0.0f);
    for (auto* parts : {&projection.real, &projection.imaginary}) parts->assign(w.call.num_rows * anchored, 0.0f);
    std::vector<float> weights(others.size());
    for (int64_t row = 0; row < w.call.num_rows; ++row) {
        const float* q = w.query.data() + row * w.key_dim;
        for (size_t j = 0; j < others.size(); ++j) weights[j] = q[others[j]];
        add_columns<1>(w, others.data(), static_cast<int>(others.size()), weights.data(), 0,
                       projection.fixed.data() + row * width);
        for (int p = first; p < pairs; ++p) {
            // The rotations of some models also scale; anchors do not.
            const float* start = rotation.start + b * rotation.start_stride + 2 * p;
            const float shorter = 1.0f / std::sqrt(start[0] * start[0] + start[1] * start[1]);
            projection.real[row * anchored + p - first] = q[rotation.first[p]] * shorter;
            projection.imaginary[row * anchored + p - first] = q[rotation.second[p]] * shorter;
        }
    }
    for (auto& level : projection.levels) level.assign(4 * width, 0.0f);
    projection.turned.assign(8 * anchored, 0.0f);
    projection.angle.assign(2 * anchored, 0.0f);
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

// The projections [ROWS, component] of the rows from `row` on, for the tokens from `token` of the current tile on. It is
// called for one piece of the tile after another.
template <int ROWS>
INLINE const float* project(Worker& w, const Rotation& rotation, int64_t row, int token) {
    Projection& projection = w.projection;
    const int width = w.components.width, pairs = static_cast<int>(rotation.num_pairs);
    const int first = projection.borders[0], anchored = pairs - first;
    const float* before = projection.fixed.data() + row * width;
    for (int k = NUM_SPANS; k-- > 0;) {
        const int begin = projection.borders[k], count = projection.borders[k + 1] - begin;
        if (!count) continue;
        float* to = projection.levels[k].data();
        if (token % (LEAST_SPAN << k) == 0) {
            std::copy(before, before + ROWS * width, to);
            const int64_t within = static_cast<int64_t>(token / LEAST_SPAN) * pairs + begin;
            const float *c = w.angles.tile_float.data() + begin, *s = c + pairs;
            float *cosine = projection.angle.data(), *sine = cosine + anchored;
            for (int p = 0; p < count; ++p) {
                cosine[p] = c[p] * rotation.cosines[within + p] - s[p] * rotation.sines[within + p];
                sine[p] = s[p] * rotation.cosines[within + p] + c[p] * rotation.sines[within + p];
            }
            float *real = projection.turned.data(), *imaginary = real + 4 * anchored;
            for (int r = 0; r < ROWS; ++r) {
                const int64_t place = (row + r) * anchored + begin - first;
                rotate_back(projection.real.data() + place, projection.imaginary.data() + place, cosine, sine,
                            real + r * anchored, imaginary + r * anchored, count);
            }
            add_columns<ROWS>(w, rotation.first + begin, count, real, anchored, to);
            add_columns<ROWS>(w, rotation.second + begin, count, imaginary, anchored, to);
        }
        before = to;
    }
    return before;
}

}  // namespace
}  // namespace spectral
