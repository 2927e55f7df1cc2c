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

// Adds the values of a run, weighted by the shares that `weighed` describes. Streams go on from `carries` or, where that
// is null, from the tile before the run.
template <int NBITS, int ROWS>
void add_values(Worker& w, const uint8_t* rows, int64_t tile_stride, const uint8_t* carries, int length,
                const Weighed* weighed, const Partial* partials) {
    constexpr bool ROUGH = NBITS <= ROUGH_NBITS;
    constexpr int TOGETHER = ROUGH ? 4 : 2;  // dimensions at a time, so that shares are read less often
    const int tiles = round_up(length, TILE) / TILE;
    const int64_t dims = w.call.value_dim;
    constexpr int STREAM = NBITS * ROW;
    const Table table(w.call.parts, std::min(NBITS, MAX_TRELLIS_NBITS), ROUGH);
    for (int64_t d0 = 0; d0 < dims; d0 += LANES) {
        Floats totals[ROWS][LANES];
        const int count = static_cast<int>(std::min<int64_t>(LANES, dims - d0));
        for (int k = count; k < LANES; ++k)
            for (int r = 0; r < ROWS; ++r) totals[r][k] = Floats{};
        for (int k = 0; k < count; k += TOGETHER) {
            std::conditional_t<ROUGH, Ints, Sums> sums[ROWS][TOGETHER] = {};
            const uint8_t* from = rows + (d0 + k) * STREAM;
            w.next_keys.fetch(TOGETHER / 2);
            int next[TOGETHER];  // the last dimension again for lanes beyond it, which are not used
            for (int i = 0; i < TOGETHER; ++i) next[i] = std::min(i, count - 1 - k) * STREAM;
            for (int tile = 0; tile < tiles; ++tile, from += tile_stride) {
                uint8_t before[TOGETHER];
                for (int i = 0; i < TOGETHER; ++i)
                    before[i] = tile || !carries ? (from - tile_stride)[next[i] + STREAM - 1]
                                                 : carries[d0 + k + next[i] / STREAM];
                for (int part = 0; part < PARTS; ++part) {
                    const int share = (tile * TILE + part * BYTES) / 4;
                    Bytes codes[TOGETHER];
                    for (int i = 0; i < TOGETHER; ++i)
                        codes[i] = read_codes<NBITS, false>(table, from + next[i], before[i], part);
                    for (int r = 0; r < ROWS; ++r) {
                        const Ints first = load<Ints>(&w.shares[0][r * RUN / 4 + share]);
                        if constexpr (ROUGH) {
                            for (int i = 0; i < TOGETHER; ++i)
                                sums[r][i] = add_byte_products(sums[r][i], bits<Ints>(codes[i]), bits<Bytes>(first));
                        } else {
                            const Ints second = load<Ints>(&w.shares[1][r * RUN / 4 + share]);
                            for (int i = 0; i < TOGETHER; ++i)
                                Sums::add(sums[r][i], Codes::of(codes[i]), first, second);
                        }
                    }
                }
            }
            for (int r = 0; r < ROWS; ++r)
                for (int i = 0; i < TOGETHER; ++i) {
                    if constexpr (ROUGH)
                        totals[r][k + i] = to_floats(sums[r][i]);
                    else
                        totals[r][k + i] = Sums::total(sums[r][i]);
                }
        }
        const float offset = ROUGH ? 0.0f : zero_code(NBITS);
        for (int r = 0; r < ROWS; ++r) {
            float* to = partials[r].coded + d0;
            store(to, load<Floats>(to) + (spectral::sums(totals[r]) - offset * weighed[r].sum) * weighed[r].worth);
        }
    }
}

}  // namespace
}  // namespace spectral
