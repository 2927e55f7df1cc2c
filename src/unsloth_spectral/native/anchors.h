// The queries in the space of the components. Keys are un-rotated by anchors, the first tokens of tiles, except those
// of fast rotary pairs. So the queries are un-rotated likewise, and projected anew for each tile.
//
// The products are exact integers: of the basis, whose numbers are bytes, and of the queries as weights.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "weights.h"
#include "worker.h"

namespace spectral {
namespace {

// For each dimension, whether a rotary pair from `pair` on has it.
inline std::vector<bool> dimensions_of_pairs(const Rotation& rotation, int64_t pair, int64_t dims) {
    std::vector<bool> is_rotary(dims, false);
    for (; pair < rotation.num_pairs; ++pair) is_rotary[rotation.first[pair]] = is_rotary[rotation.second[pair]] = true;
    return is_rotary;
}

// The vectors of a head's components.
struct Vectors {
    const int8_t* all;
    const int32_t* rows;  // of each component in `all`; null if component follows component

    const int8_t* at(int i, int64_t key_dim) const { return all + (rows ? rows[i] : i) * key_dim; }
};

// The columns of `dims` as bytes, four dimensions to a lane: [dims / 4, component]. 128 is added to each number.
inline void take_columns(std::vector<uint8_t>& columns, const std::vector<int32_t>& dims, const Vectors& vectors,
                         int64_t key_dim, int count, int width) {
    const int num_dims = static_cast<int>(dims.size()), quads = (num_dims + 3) / 4;
    columns.assign(static_cast<size_t>(quads) * width * 4, 128);
    for (int quad = 0; quad < quads; ++quad) {
        uint8_t* to = &columns[static_cast<size_t>(quad) * width * 4];
        const int32_t* from = &dims[4 * quad];
        const int present = std::min(4, num_dims - 4 * quad);
        // Mostly four dimensions lie together in memory.
        if (present == 4 && from[1] == from[0] + 1 && from[2] == from[0] + 2 && from[3] == from[0] + 3) {
            for (int i = 0; i < count; ++i) {
                uint32_t together;
                std::memcpy(&together, vectors.at(i, key_dim) + from[0], 4);
                together ^= 0x80808080u;
                std::memcpy(to + 4 * i, &together, 4);
            }
        } else {
            for (int i = 0; i < count; ++i)
                for (int j = 0; j < present; ++j)
                    to[4 * i + j] = static_cast<uint8_t>(vectors.at(i, key_dim)[from[j]] + 128);
        }
    }
}

// The largest magnitude of weights for `count` dimensions: sums of their products with bytes fit 32 bits.
INLINE float full_of(int64_t count) { return std::min(FULL, FULL * 512.0f / static_cast<float>(count)); }

// A row of weights for dimensions: the value of one unit, and the sum of the integers times 128; the same of the high
// bytes alone, which suffice for rough components.
struct WeighedDims {
    float worth, rough_worth;
    int32_t offset, rough_offset;
};

// Weights for the dimensions in `projection.turned`, zeros behind them, of magnitude up to `most`, as row r of a chunk.
INLINE WeighedDims weigh_dims(Worker& w, float most, int num_dims, int r) {
    Projection& projection = w.projection;
    int32_t* first = &projection.dims[0][r * projection.dims_stride];
    const float full = full_of(num_dims);
    const Weighed weighed = to_weights(projection.turned.data(), most, full, first,
                                       &projection.dims[1][r * projection.dims_stride], 4 * projection.dims_stride);
    WeighedDims result = {weighed.worth, 256.0f * weighed.worth, 128 * static_cast<int32_t>(weighed.sum), 0};
#if defined(__AVX512VNNI__)
    Ints offsets = {};
    for (int i = 0; i < projection.dims_stride; i += LANES)
        offsets = add_byte_products(offsets, load<Ints>(first + i), Bytes{} + static_cast<uint8_t>(128));
    result.rough_offset = static_cast<int32_t>(sum(to_floats(offsets)));
#endif
    return result;
}

// Rows `to`, [row, component], of `from` plus the products of the columns with ROWS rows of weights for their `num_dims`
// dimensions, which `weighed` describes.
template <int ROWS>
INLINE void add_products_of(const Worker& w, int num_dims, const WeighedDims* weighed, const float* from, float* to) {
    constexpr int TOGETHER = 2;
    const Projection& projection = w.projection;
    const int width = w.components.width, quads = (num_dims + 3) / 4, stride = projection.dims_stride;
    const auto finish = [&](int r, int place, Ints whole, float worth) {
        const Floats scale = load<Floats>(&projection.vector_scales[place]) * worth;
        store(to + r * width + place, load<Floats>(from + r * width + place) + to_floats(whole) * scale);
    };
    // The last vectors are computed twice where their number is odd.
    const auto places = [&](int i, int k) { return std::min(i + k * LANES, width - LANES); };
    int i = 0;
    for (; i < width && (i < 4 * w.components.num_fine || !ROUGH_NBITS); i += TOGETHER * LANES) {
        Sums sums[ROWS][TOGETHER] = {};
        for (int quad = 0; quad < quads; ++quad) {
            Codes codes[TOGETHER];
            for (int k = 0; k < TOGETHER; ++k)
                codes[k] = Codes::of(load<Bytes>(&projection.columns[(quad * width + places(i, k)) * 4]));
            for (int r = 0; r < ROWS; ++r) {
                const Ints first = broadcast(projection.dims[0][r * stride + quad]);
                const Ints second = broadcast(projection.dims[1][r * stride + quad]);
                for (int k = 0; k < TOGETHER; ++k) Sums::add(sums[r][k], codes[k], first, second);
            }
        }
        // The sums may wrap around where their difference does not.
        for (int k = 0; k < TOGETHER; ++k)
            for (int r = 0; r < ROWS; ++r)
                finish(r, places(i, k), Sums::whole(sums[r][k]) - weighed[r].offset, weighed[r].worth);
    }
#if defined(__AVX512VNNI__)
    for (; i < width; i += TOGETHER * LANES) {
        Ints sums[ROWS][TOGETHER] = {};
        for (int quad = 0; quad < quads; ++quad)
            for (int k = 0; k < TOGETHER; ++k) {
                const Bytes codes = load<Bytes>(&projection.columns[(quad * width + places(i, k)) * 4]);
                for (int r = 0; r < ROWS; ++r)
                    sums[r][k] = add_byte_products(sums[r][k], broadcast(projection.dims[0][r * stride + quad]), codes);
            }
        for (int k = 0; k < TOGETHER; ++k)
            for (int r = 0; r < ROWS; ++r)
                finish(r, places(i, k), sums[r][k] - weighed[r].rough_offset, weighed[r].rough_worth);
    }
#endif
}

// Rotates n pairs (a, b) back by the angle of (c, s): a' = a c + b s, b' = b c - a s. Whole vectors are read and written,
// and those of b' after those of a'.
INLINE void rotate_back(const float* a, const float* b, const float* c, const float* s, float* to_a, float* to_b,
                        int n) {
    for (int p = 0; p < n; p += LANES)
        store(to_a + p, load<Floats>(a + p) * load<Floats>(c + p) + load<Floats>(b + p) * load<Floats>(s + p));
    for (int p = 0; p < n; p += LANES)
        store(to_b + p, load<Floats>(b + p) * load<Floats>(c + p) - load<Floats>(a + p) * load<Floats>(s + p));
}

// Prepares the projection of a head's queries, and projects the dimensions that no anchor un-rotates.
void start_projection(Worker& w, const Rotation& rotation, int64_t b, const Vectors& vectors,
                      const float* vector_scales) {
    Projection& projection = w.projection;
    const int dims = static_cast<int>(w.call.key_dim), count = w.components.count, width = w.components.width;
    const int first = static_cast<int>(rotation.first_anchored), pairs = static_cast<int>(rotation.num_pairs) - first;
    std::vector<int32_t> anchored(rotation.first + first, rotation.first + first + pairs), others;
    anchored.insert(anchored.end(), rotation.second + first, rotation.second + first + pairs);
    const std::vector<bool> is_anchored = dimensions_of_pairs(rotation, first, dims);
    for (int d = 0; d < dims; ++d)
        if (!is_anchored[d]) others.push_back(d);
    const int num_others = static_cast<int>(others.size());
    const int room = round_up(std::max(2 * pairs + LANES, num_others), 4 * LANES);
    projection.turned.assign(room, 0.0f);
    projection.dims_stride = room / 4;
    for (auto& weights : projection.dims) weights.assign(ROWS_TOGETHER * projection.dims_stride, 0);
    projection.vector_scales.assign(width, 0.0f);
    std::copy(vector_scales, vector_scales + count, projection.vector_scales.begin());
    projection.projected.assign(ROWS_TOGETHER * width, 0.0f);
    projection.fixed.assign(w.call.num_rows * width, 0.0f);
    projection.most.assign(w.call.num_rows, 0.0f);
    projection.pairs_stride = round_up(pairs, LANES);
    for (auto* parts : {&projection.real, &projection.imaginary})
        parts->assign(w.call.num_rows * projection.pairs_stride, 0.0f);

    take_columns(projection.columns, others, vectors, dims, count, width);
    for (int64_t row = 0; row < w.call.num_rows; ++row) {
        const float* q = w.query.data() + row * w.key_dim;
        float most = 0.0f;
        for (int j = 0; j < num_others; ++j) {
            projection.turned[j] = q[others[j]];
            most = larger_or_nan(most, std::fabs(q[others[j]]));
        }
        const WeighedDims weighed = weigh_dims(w, most, num_others, 0);
        add_products_of<1>(w, num_others, &weighed, projection.projected.data(),
                           projection.fixed.data() + row * width);
        for (int p = 0; p < pairs; ++p) {
            // The rotations of some models also scale; anchors do not.
            const float* start = rotation.start + b * rotation.start_stride + 2 * (first + p);
            const float shorter = 1.0f / std::sqrt(start[0] * start[0] + start[1] * start[1]);
            const float real = q[anchored[p]], imaginary = q[anchored[pairs + p]];
            projection.real[row * projection.pairs_stride + p] = real * shorter;
            projection.imaginary[row * projection.pairs_stride + p] = imaginary * shorter;
            // A rotation keeps a pair's length.
            projection.most[row] = larger_or_nan(projection.most[row], std::sqrt(real * real + imaginary * imaginary));
        }
    }
    std::fill(projection.turned.begin(), projection.turned.end(), 0.0f);
    take_columns(projection.columns, anchored, vectors, dims, count, width);
}

// The projections [ROWS, component] of the rows from `row` on, for the current tile.
template <int ROWS>
INLINE const float* project(Worker& w, const Rotation& rotation, int64_t row) {
    Projection& projection = w.projection;
    const int width = w.components.width, all_pairs = static_cast<int>(rotation.num_pairs);
    const int first = static_cast<int>(rotation.first_anchored), pairs = all_pairs - first;
    const float* fixed = projection.fixed.data() + row * width;
    if (!pairs) return fixed;
    const float *cosine = w.angles.tile_float.data() + first, *sine = cosine + all_pairs;
    WeighedDims weighed[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        const int64_t place = (row + r) * projection.pairs_stride;
        rotate_back(projection.real.data() + place, projection.imaginary.data() + place, cosine, sine,
                    projection.turned.data(), projection.turned.data() + pairs, pairs);
        // A little room for rounding errors.
        weighed[r] = weigh_dims(w, projection.most[row + r] * 1.00001f, 2 * pairs, r);
    }
    add_products_of<ROWS>(w, 2 * pairs, weighed, fixed, projection.projected.data());
    return projection.projected.data();
}

}  // namespace
}  // namespace spectral
