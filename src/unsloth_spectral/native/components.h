// The components of coded keys: their codes, and the queries as integer weights for them.
#pragma once

#include <algorithm>
#include <numeric>
#include <type_traits>
#include <vector>

#include "streams.h"
#include "weights.h"
#include "worker.h"

namespace spectral {
namespace {

// Sets the places of the components of head h.
void start_components(Components& c, const CodedKeys& keys, int64_t h) {
    c.first = c.first_row = 0;
    for (int64_t before = 0; before < h; ++before)
        for (int nbits = 1; nbits <= 8; ++nbits) {
            c.first += keys.counts[9 * before + nbits];
            c.first_row += nbits * keys.counts[9 * before + nbits];
        }
    c.nbits.clear();
    c.offsets.clear();
    for (int nbits = 8; nbits >= 1; --nbits)
        for (int i = 0; i < keys.counts[9 * h + nbits]; ++i) {
            c.nbits.push_back(static_cast<uint8_t>(nbits));
            c.offsets.push_back(zero_code(nbits));
        }
    // Room for one vector, even in a block without components.
    c.count = static_cast<int>(c.nbits.size());
    c.width = std::max(LANES, round_up(c.count, LANES));
    c.num_quads = (c.count + 3) / 4;
    c.num_rows = std::accumulate(c.nbits.begin(), c.nbits.end(), int64_t{0});
    c.nbits.resize(c.width, 0);
    c.rows.assign(c.width, 0);
    for (int i = 1; i < c.count; ++i) c.rows[i] = c.rows[i - 1] + c.nbits[i - 1];
    c.num_fine = 0;
    while (c.num_fine < c.num_quads && c.nbits[4 * c.num_fine] > ROUGH_NBITS) ++c.num_fine;
    c.is_fine.assign(c.width, 0);
    std::fill(c.is_fine.begin(), c.is_fine.begin() + 4 * c.num_fine, -1);
    c.offsets.resize(c.width, 0.0f);
    c.scales.assign(c.width, 0.0f);
    c.codes.resize(static_cast<size_t>(c.num_quads) * VECTORS);
}

// The codes of the quads [quad, end), all of whose components have NBITS.
template <int NBITS>
INLINE void read_quads(Worker& w, const uint8_t* rows, const uint8_t* rows_before, const uint8_t* carries, int quad,
                       int end) {
    constexpr int STREAM = NBITS * ROW;
    const Components& c = w.components;
    const Table& table = table_of(w.tables.data(), NBITS);
    const uint8_t* stream = rows + c.rows[4 * quad] * ROW;
    // The bytes that streams go on from, and how far apart these lie.
    const uint8_t* carry = rows_before ? rows_before + c.rows[4 * quad] * ROW + STREAM - 1 : carries + 4 * quad;
    const int stride = rows_before ? STREAM : 1;
    for (; quad < end; ++quad, stream += 4 * STREAM, carry += 4 * stride) {
        w.next_keys.fetch(1);
#if defined(__AVX512BW__)
        if constexpr (NBITS <= 2) {
            read_woven<NBITS>(table, stream, carry, stride, &w.components.codes[quad * VECTORS]);
            continue;
        }
#endif
        for (int part = 0; part < PARTS; ++part) {
            Bytes apart[4];
            for (int k = 0; k < 4; ++k)
                apart[k] = read_codes<NBITS, true>(table, stream + k * STREAM, carry[k * stride], part);
            weave(apart[0], apart[1], apart[2], apart[3], &w.components.codes[quad * VECTORS + 4 * part]);
        }
    }
}

// The codes of a head in one tile, whose streams begin at `rows` and go on from those of the tile before, at
// `rows_before`, or from `carries` where that is null.
void read_components(Worker& w, const uint8_t* rows, const uint8_t* rows_before, const uint8_t* carries) {
    const Components& c = w.components;
    for (int quad = 0; quad < c.num_quads;) {
        // Widths fall, so quads whose components have one width lie together.
        const int nbits = c.nbits[4 * quad];
        int end = quad;
        while (end < c.num_quads && c.nbits[4 * end + 3] == nbits) ++end;
        if (end > quad) {
            with_nbits(nbits, [&](auto constant) {
                read_quads<decltype(constant)::value>(w, rows, rows_before, carries, quad, end);
            });
            quad = end;
            continue;
        }
        w.next_keys.fetch(1);
        Stream streams[4];
        for (int k = 0; k < 4; ++k) {
            const int i = 4 * quad + k;
            streams[k] = {rows + c.rows[i] * ROW, 0, c.nbits[i]};
            if (i < c.count) streams[k].carry = rows_before ? rows_before[(c.rows[i] + c.nbits[i]) * ROW - 1] : carries[i];
        }
        read_quad(w.tables.data(), streams, &w.components.codes[quad++ * VECTORS]);
    }
}

// The components' weights of one row, as integers: values of one unit, for fine components and for rough ones, and the
// part of the score that does not depend on the codes.
struct Worth {
    float fine, rough, constant;
};

// Integer weights of the components for ROWS rows: their projections [ROWS, component] under the tile's scales.
template <int ROWS>
INLINE void weigh_components(Worker& w, const float* projected, int64_t row, Worth* worths) {
    const int lanes = w.components.width / 4;
    Floats peaks[2][ROWS] = {}, sums[2][ROWS] = {};
    float factors[2][ROWS];
    for (int i = 0; i < w.components.width; i += LANES) {
        const Floats scale = load<Floats>(&w.components.scales[i]);
        const Ints is_fine = load<Ints>(&w.components.is_fine[i]);
        for (int r = 0; r < ROWS; ++r) {
            const Floats value = load<Floats>(projected + r * w.components.width + i) * scale;
            const Floats size = magnitude(value);
            peaks[0][r] = larger(peaks[0][r], choose(is_fine, size, Floats{}));
            if (ROUGH_NBITS) peaks[1][r] = larger(peaks[1][r], choose(is_fine, Floats{}, size));
            store(&w.projection.scaled[r * w.components.width + i], value);
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        const float fine = largest(peaks[0][r]), rough = ROUGH_NBITS ? largest(peaks[1][r]) : 0.0f;
        factors[0][r] = factor_to(FULL, fine);
        factors[1][r] = factor_to(FULL_ROUGH, rough);
        worths[r] = {fine / FULL, rough / FULL_ROUGH, 0.0f};
    }
    for (int i = 0; i < w.components.width; i += LANES) {
        const Floats offset = load<Floats>(&w.components.offsets[i]);
        const Ints is_fine = load<Ints>(&w.components.is_fine[i]);
        for (int r = 0; r < ROWS; ++r) {
            const Floats value = load<Floats>(&w.projection.scaled[r * w.components.width + i]);
            const Ints whole = rounded(value * choose(is_fine, all(factors[0][r]), all(factors[1][r])));
            const int place = r * lanes + i / 4;
            // Rough weights are a high byte.
            store_weights(ROUGH_NBITS ? (whole & is_fine) | (whole << 8 & ~is_fine) : whole,
                          &w.projection.weights[0][place], &w.projection.weights[1][place]);
            const Floats product = to_floats(whole) * offset;
            sums[0][r] += choose(is_fine, product, Floats{});
            if (ROUGH_NBITS) sums[1][r] += choose(is_fine, Floats{}, product);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        worths[r].constant = w.angles.fixed[row + r] - worths[r].fine * sum(sums[0][r]) -
                             (ROUGH_NBITS ? worths[r].rough * sum(sums[1][r]) : 0.0f);
}

}  // namespace
}  // namespace spectral
