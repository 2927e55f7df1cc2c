// The components of coded keys: their codes, and the queries as integer weights for them.
#pragma once

#include <algorithm>
#include <numeric>
#include <type_traits>
#include <vector>

#include "weights.h"
#include "worker.h"

namespace spectral {
namespace {

// Sets the places of the components of head h.
void start_components(Components& c, const CodedKeys& keys, int64_t h) {
    c.first = c.first_plane = 0;
    for (int64_t before = 0; before < h; ++before)
        for (int nbits = 1; nbits <= 8; ++nbits) {
            c.first += keys.counts[9 * before + nbits];
            c.first_plane += nbits * keys.counts[9 * before + nbits];
        }
    c.nbits.clear();
    c.offsets.clear();
    for (int nbits = 8; nbits >= 1; --nbits)
        for (int i = 0; i < keys.counts[9 * h + nbits]; ++i) {
            c.nbits.push_back(static_cast<uint8_t>(nbits));
            c.offsets.push_back(0.5f * static_cast<float>((1 << nbits) - 1));
        }
    // Room for one vector, even in a block without components.
    c.count = static_cast<int>(c.nbits.size());
    c.width = std::max(LANES, round_up(c.count, LANES));
    c.num_quads = (c.count + 3) / 4;
    c.num_planes = std::accumulate(c.nbits.begin(), c.nbits.end(), int64_t{0});
    c.nbits.resize(c.width, 0);
    c.places.assign(c.num_quads, 0);
    for (int quad = 1; quad < c.num_quads; ++quad) {
        const uint8_t* before = &c.nbits[4 * quad - 4];
        c.places[quad] = c.places[quad - 1] + before[0] + before[1] + before[2] + before[3];
    }
    c.further.clear();
    c.first_further.assign(1, 0);
    for (int quad = 0; quad < c.num_quads; ++quad) {
        const uint8_t* nbits = &c.nbits[4 * quad];
        int place = 4 * nbits[3] * PLANE;
        for (int k = 0; k < 4; ++k)
            for (int bit = nbits[3]; bit < nbits[k]; ++bit, place += PLANE)
                c.further.push_back({place, static_cast<int32_t>(1u << (8 * k + bit))});
        c.first_further.push_back(static_cast<int>(c.further.size()));
    }
    c.num_fine = 0;
    while (c.num_fine < c.num_quads && c.nbits[4 * c.num_fine] > ROUGH_NBITS) ++c.num_fine;
    c.is_fine.assign(c.width, 0);
    std::fill(c.is_fine.begin(), c.is_fine.begin() + 4 * c.num_fine, -1);
    c.offsets.resize(c.width, 0.0f);
    c.scales.assign(c.width, 0.0f);
    c.codes.resize(static_cast<size_t>(c.num_quads) * VECTORS);
}

// The queries in the basis of the head's components.
void project(Worker& w, const int8_t* vectors, const float* vector_scales) {
    const int count = w.components.count, width = w.components.width;
    w.projection.projected.assign(w.call.num_rows * width, 0.0f);
    std::vector<float> axis(w.key_dim, 0.0f);
    for (int i = 0; i < count; ++i) {
        for (int64_t d = 0; d < w.call.key_dim; ++d) axis[d] = vectors[i * w.call.key_dim + d];
        for (int64_t row = 0; row < w.call.num_rows; ++row) {
            Floats total = {};
            for (int d = 0; d < w.key_dim; d += LANES)
                total += load<Floats>(axis.data() + d) * load<Floats>(w.query.data() + row * w.key_dim + d);
            w.projection.projected[row * width + i] = vector_scales[i] * sum(total);
        }
    }
}

// Expands the planes of a head in one tile (codec/spectral/packing.py has their order) to codes: of all quads, or of
// all except those that `add_rough` expands itself.
void expand_tile(Worker& w, const uint8_t* planes, bool all) {
    for (int quad = 0; quad < w.components.num_quads; ++quad) {
        const uint8_t* nbits = &w.components.nbits[4 * quad];
        w.next_keys.fetch(1);
        if (!all && quad >= w.components.num_fine && nbits[0] == nbits[3]) continue;
        const uint8_t* from = planes + w.components.places[quad] * PLANE;
        const int shared = nbits[3];  // the smallest, as widths fall
        Bytes* to = &w.components.codes[quad * VECTORS];
        const Plane* further = w.components.further.data() + w.components.first_further[quad];
        const int count = w.components.first_further[quad + 1] - w.components.first_further[quad];
        const auto expand_all = [from, to, further, count](auto constant) {
            constexpr int NBITS = decltype(constant)::value, PER_RUN = QUAD_TOKENS / LANES;
            for (int v = 0; v < VECTORS; ++v) {
                Bytes codes = {};
                if constexpr (NBITS > 0)
                    codes = expand<NBITS, QUAD_PLANE>(from + v / PER_RUN * NBITS * QUAD_PLANE, v % PER_RUN);
                for (int i = 0; i < count; ++i) codes = with_plane(codes, from + further[i].place, v, further[i].worth);
                to[v] = codes;
            }
        };
        if (shared)
            with_nbits(shared, expand_all);
        else
            expand_all(std::integral_constant<int, 0>());
    }
}

// Integer weights of the components under the tile's scales for ROWS rows, the value of one unit of them (worth), and
// the part of the score that does not depend on the codes (constant).
template <int ROWS>
INLINE void weigh_components(Worker& w, int64_t row, float* worth, float* constant) {
    const int lanes = w.components.width / 4;
    Floats peaks[ROWS] = {}, sums[ROWS] = {};
    float factor[ROWS];
    for (int i = 0; i < w.components.width; i += LANES) {
        const Floats scale = load<Floats>(&w.components.scales[i]);
        for (int r = 0; r < ROWS; ++r) {
            const Floats value = load<Floats>(&w.projection.projected[(row + r) * w.components.width + i]) * scale;
            peaks[r] = larger(peaks[r], magnitude(value));
            store(&w.projection.scaled[r * w.components.width + i], value);
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        const float most = largest(peaks[r]);
        factor[r] = factor_to(FULL, most);
        worth[r] = most / FULL;
    }
    for (int i = 0; i < w.components.width; i += LANES) {
        const Floats offset = load<Floats>(&w.components.offsets[i]);
        const Ints is_fine = load<Ints>(&w.components.is_fine[i]);
        for (int r = 0; r < ROWS; ++r) {
            const Ints whole = rounded(load<Floats>(&w.projection.scaled[r * w.components.width + i]) * factor[r]);
            const int place = r * lanes + i / 4;
            store_weights(whole, &w.projection.weights[0][place], &w.projection.weights[1][place]);
            sums[r] += to_floats(ROUGH_NBITS ? keep_low(whole, is_fine) : whole) * offset;
        }
    }
    for (int r = 0; r < ROWS; ++r) constant[r] = w.projection.fixed[row + r] - worth[r] * sum(sums[r]);
}

// Adds the products of the quads behind the fine ones with their weights' high bytes. Codes go from planes into
// products without being stored.
template <int ROWS>
INLINE void add_rough(Worker& w, const uint8_t* planes, Floats (&products)[ROWS][VECTORS]) {
    constexpr int TOGETHER = ROWS == 4 ? VECTORS / 2 : VECTORS;  // limited by the registers for sums
    constexpr int PER_RUN = QUAD_TOKENS / LANES;
    const int lanes = w.components.width / 4;
    for (int v0 = 0; v0 < VECTORS; v0 += TOGETHER) {
        Ints sums[ROWS][TOGETHER] = {};
        for (int quad = w.components.num_fine; quad < w.components.num_quads; ++quad) {
            Ints weights[ROWS];
            for (int r = 0; r < ROWS; ++r) weights[r] = broadcast(w.projection.weights[0][r * lanes + quad]);
            const auto add = [&](auto codes_of) {
                for (int v = 0; v < TOGETHER; ++v) {
                    const Bytes codes = codes_of(v0 + v);
                    for (int r = 0; r < ROWS; ++r) sums[r][v] = add_byte_products(sums[r][v], weights[r], codes);
                }
            };
            const uint8_t* quad_planes = planes + w.components.places[quad] * PLANE;
            const uint8_t* nbits = &w.components.nbits[4 * quad];
            w.next_keys.fetch(1);
            w.next_values.fetch(1);
            const auto add_planes = [&](auto constant) {
                constexpr int NBITS = decltype(constant)::value;
                add([quad_planes](int v) {
                    return expand<NBITS, QUAD_PLANE>(quad_planes + v / PER_RUN * NBITS * QUAD_PLANE, v % PER_RUN);
                });
            };
            if (nbits[0] != nbits[3])
                add([&](int v) { return w.components.codes[quad * VECTORS + v]; });
            else if (nbits[0] == 1)
                add_planes(std::integral_constant<int, 1>());
            else if (nbits[0] == 2)
                add_planes(std::integral_constant<int, 2>());
            else
                add_planes(std::integral_constant<int, 3>());
        }
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < TOGETHER; ++v) products[r][v0 + v] += 256.0f * to_floats(sums[r][v]);
    }
}

}  // namespace
}  // namespace spectral
