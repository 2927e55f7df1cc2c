// The state of one thread of spectral_attend: the query, the current head, and buffers for a run of tokens.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "abi.h"
#include "simd.h"
#include "streams.h"

namespace spectral {
namespace {

constexpr int RUN = 4 * TILE;     // tokens between two updates of the running maximum
constexpr int ROWS_TOGETHER = 4;  // query rows whose sums are kept in registers
constexpr int MOST_ROWS = 128;    // query rows that share a pass over a run
constexpr int LINE = 64;          // bytes of a cache line

INLINE int round_up(int64_t n, int64_t unit) { return static_cast<int>((n + unit - 1) / unit * unit); }

// Prefetches memory that will be read soon. Codes lie head by head within each tile, so a head reads separate pieces,
// which no processor prefetches by itself: waiting for them took half of the time.
struct Ahead {
    const uint8_t *place = nullptr, *end = nullptr;

    void expect(const uint8_t* from, int64_t bytes) {
        // From the beginning of the first line, wherever in it the memory begins.
        place = from - reinterpret_cast<uintptr_t>(from) % LINE;
        end = from + bytes;
    }
    // A few lines at a time, between the sums: a processor has a limited number of outstanding fetches.
    void fetch(int lines) {
        for (; lines > 0 && place < end; --lines, place += LINE) __builtin_prefetch(place);
    }
    void fetch_rest() {
        for (; place < end; place += LINE) __builtin_prefetch(place);
    }
};

INLINE void fetch(const uint8_t* from, int64_t bytes) {
    Ahead ahead;
    ahead.expect(from, bytes);
    ahead.fetch_rest();
}

// The components of one head of a coded block, filled up to whole vectors.
struct Components {
    int count = 0, width = 0, num_quads = 0;
    int num_fine = 0;                // the number of leading quads whose weights are not rounded to bytes
    int64_t first = 0;               // among the block's components
    int64_t first_row = 0, num_rows = 0;  // of the head's streams in a tile
    std::vector<uint8_t> nbits;      // [component] 0 in the filling
    std::vector<int> rows;           // [component] its first row, counted from the head's first
    std::vector<float> offsets;      // [component] the code of zero
    std::vector<int32_t> is_fine;    // [component] all bits or none
    std::vector<float> scales;       // [component] of the current tile
    std::vector<Bytes> codes;        // [quad, VECTORS] of the current tile, four components per lane
};

// The queries in the space of the components. An anchored pair is one that anchors un-rotate.
struct Projection {
    std::vector<uint8_t> columns;       // [anchored dim / 4, component, 4] the basis
    std::vector<float> vector_scales;   // [component] of the basis
    std::vector<float> fixed;           // [row, component] of dimensions that no anchor un-rotates
    std::vector<float> real, imaginary; // [row, anchored pair] the queries, for anchors of length 1; zeros behind
    int pairs_stride;                   // between rows, whole vectors
    std::vector<float> most;            // [row] the length of the longest of these pairs
    std::vector<float> turned;          // [anchored dim] a row un-rotated
    std::vector<int32_t> dims[2];       // [row of a chunk, anchored dim / 4] these as integer weights
    int dims_stride;                    // between rows
    std::vector<float> projected;       // [row of a chunk, component]
    std::vector<float> scaled;          // [row of a chunk, component] under the tile's scales
    std::vector<int32_t> weights[2];    // [row of a chunk, component / 4]
};

// The rotation of the current tile's first token, and the mean's term relative to it.
struct Angles {
    std::vector<double> tile;                   // [2, rotary pair] cosine and sine
    std::vector<float> tile_float;              // the same as floats
    std::vector<float> cosine, sine;            // [row, rotary pair]: the mean's term, from place 0
    std::vector<float> tile_cosine, tile_sine;  // [row, rotary pair]: the same from the tile's first token
    std::vector<float> fixed;                   // [row]: the mean's term of dimensions that do not rotate
};

// The mean's term as integers.
struct Waves {
    std::vector<float> unit;       // [row] the value of one unit of the integers; `cosine` and `sine` are divided by it
    std::vector<int32_t> heights;  // [row of a chunk, wave] heights in the mean's term, two integers of 16 bits each
};

// Calls function(count, row) for the rows from 0 on, ROWS_TOGETHER or fewer at a time; `count` is a constant.
template <typename Function>
INLINE void by_rows(int num_rows, const Function& function) {
    int row = 0;
    for (; row + ROWS_TOGETHER <= num_rows; row += ROWS_TOGETHER)
        function(std::integral_constant<int, ROWS_TOGETHER>(), row);
    switch (num_rows - row) {
        case 1: return function(std::integral_constant<int, 1>(), row);
        case 2: return function(std::integral_constant<int, 2>(), row);
        case 3: return function(std::integral_constant<int, 3>(), row);
        default: return;
    }
}

// The state of one thread.
struct Worker {
    const Call& call;
    const int key_dim, value_dim;     // padded to whole vectors
    std::vector<float> query;         // [row, key dim] scaled
    std::vector<float> scores;        // [row of a pass, RUN]
    std::vector<int32_t> shares[2];   // [row of a pass, RUN / 4] probabilities times scales, as integer weights
    std::vector<Bytes> values;        // [LANES dimensions, RUN / BYTES] codes of the current run
    std::vector<float> token_scales;  // [RUN]
    std::vector<float> mean;          // [key dim]
    std::vector<Table> tables;        // [nbits of the trellis, from 1 on] of keys
    Components components;
    Projection projection;
    Angles angles;
    Waves waves;
    int64_t next_tile = -1;           // the tile after the current one
    Ahead next_keys, next_values;     // the next tile's keys, and the values of the current run

    explicit Worker(const Call& c)
        : call(c), key_dim(round_up(c.key_dim, LANES)), value_dim(round_up(c.value_dim, LANES)) {
        query.assign(c.num_rows * key_dim, 0.0f);
        const int64_t rows = std::min<int64_t>(MOST_ROWS, c.num_rows);
        scores.assign(rows * RUN, 0.0f);
        for (auto& row_shares : shares) row_shares.assign(rows * RUN / 4, 0);
        values.resize(LANES * RUN / BYTES);
        token_scales.assign(RUN, 0.0f);
        for (int nbits = 1; nbits <= MAX_TRELLIS_NBITS; ++nbits) tables.emplace_back(c.parts, nbits, false);
    }
};

}  // namespace
}  // namespace spectral
