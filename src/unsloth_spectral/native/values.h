// Sums of coded values.
#pragma once

#include <algorithm>
#include <type_traits>

#include "softmax.h"
#include "streams.h"
#include "weights.h"
#include "worker.h"

namespace spectral {
namespace {

// The codes of a head's values in a run, as stored: streams that go on from `carries` or, where that is null, from the
// tile before.
template <int NBITS>
struct ValueStreams {
    static constexpr int STREAM = NBITS * ROW;
    const Table& table;
    const uint8_t* streams;
    int64_t tile_stride;
    const uint8_t* carries;

    INLINE Bytes codes(const ValueStreams& from, int dim, int tile, int part) {
        const uint8_t* stream = from.streams + tile * from.tile_stride + dim * STREAM;
        const uint8_t before = tile || !from.carries ? (stream - from.tile_stride)[STREAM - 1] : from.carries[dim];
        return read_codes<NBITS, false>(from.table, stream, before, part);
    }
};

// The codes of the dimensions from `first` on in a run, already read into `values`.
struct ReadValues {
    const Bytes* values;
    int first;

    INLINE Bytes codes(const ReadValues& from, int dim, int tile, int part) {
        return from.values[((dim - from.first) * RUN + tile * TILE) / BYTES + part];
    }
};

// Adds the values of `count` dimensions from d0 on in a run, weighted by the shares of ROWS rows from `row` on, which
// `weighed` describes.
template <bool IS_ROUGH, int ROWS, typename Source>
INLINE void add_dimensions(Worker& w, const Source& source, int d0, int count, int tiles, float zero, int row,
                           const Weighed* weighed, const Partial* partials) {
    constexpr int TOGETHER = IS_ROUGH ? 4 : 2;  // dimensions at a time, so that shares are read less often
    Floats totals[ROWS][LANES];
    for (int k = count; k < LANES; ++k)
        for (int r = 0; r < ROWS; ++r) totals[r][k] = Floats{};
    for (int k = 0; k < count; k += TOGETHER) {
        std::conditional_t<IS_ROUGH, Ints, Sums> sums[ROWS][TOGETHER] = {};
        w.next_keys.fetch(TOGETHER / 2);
        int dims[TOGETHER];  // the last dimension again for lanes beyond it, which are not used
        for (int i = 0; i < TOGETHER; ++i) dims[i] = d0 + std::min(k + i, count - 1);
        for (int tile = 0; tile < tiles; ++tile)
            for (int part = 0; part < PARTS; ++part) {
                const int share = (tile * TILE + part * BYTES) / 4;
                Bytes codes[TOGETHER];
                for (int i = 0; i < TOGETHER; ++i) codes[i] = Source::codes(source, dims[i], tile, part);
                for (int r = 0; r < ROWS; ++r) {
                    const Ints first = load<Ints>(&w.shares[0][(row + r) * RUN / 4 + share]);
                    if constexpr (IS_ROUGH) {
                        for (int i = 0; i < TOGETHER; ++i)
                            sums[r][i] = add_byte_products(sums[r][i], bits<Ints>(codes[i]), bits<Bytes>(first));
                    } else {
                        const Ints second = load<Ints>(&w.shares[1][(row + r) * RUN / 4 + share]);
                        for (int i = 0; i < TOGETHER; ++i) Sums::add(sums[r][i], Codes::of(codes[i]), first, second);
                    }
                }
            }
        for (int r = 0; r < ROWS; ++r)
            for (int i = 0; i < TOGETHER; ++i) {
                if constexpr (IS_ROUGH)
                    totals[r][k + i] = to_floats(sums[r][i]);
                else
                    totals[r][k + i] = Sums::total(sums[r][i]);
            }
    }
    for (int r = 0; r < ROWS; ++r) {
        float* to = partials[row + r].coded + d0;
        const Weighed& share = weighed[row + r];
        store(to, load<Floats>(to) + (sums(totals[r]) - zero * share.sum) * share.worth);
    }
}

// Adds the values of a run to all of `num_rows` rows. Codes are read once, before the products, if there are more than
// ROWS_TOGETHER rows.
template <int NBITS>
void add_values(Worker& w, const uint8_t* streams, int64_t tile_stride, const uint8_t* carries, int length,
                int num_rows, const Weighed* weighed, const Partial* partials) {
    constexpr bool IS_ROUGH = NBITS <= ROUGH_NBITS;
    const int tiles = round_up(length, TILE) / TILE, dims = static_cast<int>(w.call.value_dim);
    const float zero = IS_ROUGH ? 0.0f : zero_code(NBITS);
    const Table table(w.call.parts, std::min(NBITS, MAX_TRELLIS_NBITS), IS_ROUGH);
    const ValueStreams<NBITS> stored{table, streams, tile_stride, carries};
    for (int d0 = 0; d0 < dims; d0 += LANES) {
        const int count = std::min(LANES, dims - d0);
        const auto add = [&](const auto& source) {
            by_rows(num_rows, [&](auto rows, int row) {
                add_dimensions<IS_ROUGH, decltype(rows)::value>(w, source, d0, count, tiles, zero, row, weighed,
                                                                partials);
            });
        };
        if (num_rows <= ROWS_TOGETHER) {
            add(stored);
            continue;
        }
        for (int k = 0; k < count; ++k)
            for (int tile = 0; tile < tiles; ++tile)
                for (int part = 0; part < PARTS; ++part)
                    w.values[(k * RUN + tile * TILE) / BYTES + part] =
                        ValueStreams<NBITS>::codes(stored, d0 + k, tile, part);
        add(ReadValues{w.values.data(), d0});
    }
}

}  // namespace
}  // namespace spectral
