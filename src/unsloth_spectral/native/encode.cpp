// Fits scales, quantizes and packs in one pass; torch needs dozens of passes (codec/spectral).
//
// codec/spectral/kernel.py fills in the structures of abi.h and checks everything: nothing is checked here.
#include <algorithm>
#include <cmath>
#include <limits>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "abi.h"
#include "simd.h"

namespace spectral {
namespace {

constexpr float TINY = std::numeric_limits<float>::min();

INLINE Floats floor(Floats x) {
    const Floats whole = __builtin_convertvector(__builtin_convertvector(x, Ints), Floats);
    return whole + __builtin_convertvector(bits<Ints>(whole > x), Floats);  // a comparison that holds is -1
}

INLINE Floats bounded(Floats x, float most) {
    x = choose(x > all(most), all(most), x);
    return choose(x < all(-most), all(-most), x);
}

// The bits of 128 codes, each below 2^nbits, as planes of 16 bytes.
void pack(const uint8_t* codes, int nbits, uint8_t* planes) {
    for (int plane = 0; plane < nbits; ++plane)
        for (int byte = 0; byte < PLANE; ++byte) {
            const uint64_t bit = load<uint64_t>(codes + 8 * byte) >> plane & 0x0101010101010101u;
            // Byte i has bit i of the sum's highest byte.
            planes[plane * PLANE + byte] = static_cast<uint8_t>(bit * 0x0102040810204080u >> 56);
        }
}

// Moves bit i of 16 bits to bit 4 i.
INLINE uint64_t every_fourth(uint64_t bits) {
    bits = (bits | bits << 24) & 0x000000ff000000ffu;
    bits = (bits | bits << 12) & 0x000f000f000f000fu;
    bits = (bits | bits << 6) & 0x0303030303030303u;
    return (bits | bits << 3) & 0x1111111111111111u;
}

// Reorders the planes of four components in place: first their common planes, for every QUAD_TOKENS tokens plane by
// plane, with the four bits of a token side by side; then the others.
void join_quad(uint8_t* planes, const int32_t* widths) {
    const int shared = std::min({widths[0], widths[1], widths[2], widths[3]});
    uint8_t apart[4 * 8 * PLANE];
    const uint8_t* quad[4];
    for (int k = 0, place = 0; k < 4; place += widths[k++]) {
        quad[k] = apart + place * PLANE;
        std::memcpy(apart + place * PLANE, planes + place * PLANE, static_cast<size_t>(widths[k]) * PLANE);
    }
    for (int run = 0; run < TILE / QUAD_TOKENS; ++run)
        for (int plane = 0; plane < shared; ++plane, planes += QUAD_PLANE) {
            uint64_t joined = 0;
            for (int k = 0; k < 4; ++k) joined |= every_fourth(load<uint16_t>(quad[k] + plane * PLANE + 2 * run)) << k;
            store(planes, joined);
        }
    for (int k = 0; k < 4; planes += (widths[k++] - shared) * PLANE)
        std::memcpy(planes, quad[k] + shared * PLANE, static_cast<size_t>(widths[k] - shared) * PLANE);
}

struct Quantized {
    float scale, energy, square;
};

// Quantizes a tile of one component, with `count` tokens and zeros behind: finds the clipping point of least error, the
// unbiased scale, the codes, and the squared lengths of the coefficients and of their codes around zero.
Quantized quantize(const float* from, int count, int nbits, const float* clips, int num_clips, uint8_t* codes) {
    const float half = static_cast<float>(1 << (nbits - 1)), most = half - 0.5f;
    Floats peaks = {}, squares = {};
    for (int t = 0; t < TILE; t += LANES) {
        const Floats x = load<Floats>(from + t);
        peaks = larger(peaks, larger(x, -x));
        squares += x * x;
    }
    const float peak = largest(peaks);
    float best = -1.0f, step = 1.0f;
    // At one bit every clipping point gives the same codes.
    for (int i = 0; i < (nbits == 1 ? 1 : num_clips); ++i) {
        const float trial = std::max(peak * clips[i] / half, TINY), inverse = 1.0f / trial;
        Floats overlap = {}, energy = {};
        for (int t = 0; t < TILE; t += LANES) {
            const Floats x = load<Floats>(from + t);
            const Floats value = bounded(floor(bounded(x * inverse, 2 * half)) + 0.5f, most);
            overlap += x * value;
            energy += value * value;
        }
        // The error once the scale is the least-squares one for these codes.
        const float product = sum(overlap), along = product * product / sum(energy);
        if (along > best) best = along, step = trial;
    }
    const float inverse = 1.0f / step;
    Floats overlap = {}, energy = {};
    for (int t = 0; t < TILE; t += LANES) {
        const Floats x = load<Floats>(from + t);
        const Floats value = bounded(floor(bounded(x * inverse, 2 * half)) + 0.5f, most);
        overlap += x * value;
        energy += value * value;
        const Ints code = __builtin_convertvector(value + most, Ints);
        for (int lane = 0; lane < LANES; ++lane) codes[t + lane] = static_cast<uint8_t>(code[lane]);
    }
    // The filling zeros have the code 0.5 around zero.
    const float square = sum(energy) - 0.25f * static_cast<float>(TILE - count);
    return {sum(squares) / std::max(sum(overlap), TINY), sum(squares), square};
}

}  // namespace

extern "C" void spectral_encode_keys(const KeyEncoding* given) {
    const KeyEncoding& call = *given;
    const int64_t tiles = (call.num_tokens + TILE - 1) / TILE, rows = call.batch * call.num_components;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(static_cast<int>(call.num_threads)) schedule(static)
#endif
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t b = row / call.num_components, c = row % call.num_components;
        const float* from = call.coefficients + row * call.num_tokens;
        float filled[TILE];
        uint8_t codes[TILE];
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const float* place = from + tile * TILE;
            const int count = static_cast<int>(std::min<int64_t>(TILE, call.num_tokens - tile * TILE));
            if (count < TILE) {
                std::fill(std::copy(place, place + count, filled), filled + TILE, 0.0f);
                place = filled;
            }
            const Quantized quantized =
                quantize(place, count, call.widths[c], call.clips, static_cast<int>(call.num_clips), codes);
            call.scales[row * tiles + tile] = quantized.scale;
            call.energies[row * tiles + tile] = quantized.energy;
            call.squares[row * tiles + tile] = quantized.square;
            pack(codes, call.widths[c], call.planes + ((b * tiles + tile) * call.num_planes + call.places[c]) * PLANE);
        }
    }
#if defined(_OPENMP)
#pragma omp parallel for num_threads(static_cast<int>(call.num_threads)) schedule(static)
#endif
    for (int64_t tile = 0; tile < call.batch * tiles; ++tile)
        for (int64_t head = 0, first = 0; head < call.num_heads; first += call.counts[head++])
            for (int64_t c = first; c + 4 <= first + call.counts[head]; c += 4)
                join_quad(call.planes + (tile * call.num_planes + call.places[c]) * PLANE, call.widths + c);
}

extern "C" void spectral_encode_values(const ValueEncoding* given) {
    const ValueEncoding& call = *given;
    const int64_t tiles = (call.num_tokens + TILE - 1) / TILE, rows = call.batch * call.num_heads * tiles;
    const float half = static_cast<float>(1 << (call.nbits - 1)), most = half - 0.5f;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(static_cast<int>(call.num_threads)) schedule(static)
#endif
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t head = row / tiles, tile = row % tiles, b = head / call.num_heads, h = head % call.num_heads;
        const float* from = call.values + head * call.head_dim * call.num_tokens + tile * TILE;
        const int count = static_cast<int>(std::min<int64_t>(TILE, call.num_tokens - tile * TILE));
        float energy[TILE] = {}, inverse[TILE], overlap[TILE] = {}, square[TILE] = {}, buffer[TILE] = {};
        uint8_t codes[TILE];
        for (int64_t d = 0; d < call.head_dim; ++d) {
            const float* x = from + d * call.num_tokens;
            for (int t = 0; t < count; ++t) energy[t] += x[t] * x[t];
        }
        for (int t = 0; t < TILE; ++t)
            inverse[t] = 1.0f / std::max(std::sqrt(energy[t] / static_cast<float>(call.head_dim)) * call.step, TINY);
        for (int64_t d = 0; d < call.head_dim; ++d) {
            const float* x = from + d * call.num_tokens;
            if (count < TILE) std::copy(x, x + count, buffer), x = buffer;
            for (int t = 0; t < TILE; t += LANES) {
                const Floats value = load<Floats>(x + t);
                const Floats code =
                    bounded(floor(bounded(value * load<Floats>(inverse + t), 2 * half)) + 0.5f, most);
                store(overlap + t, load<Floats>(overlap + t) + value * code);
                store(square + t, load<Floats>(square + t) + code * code);
                const Ints whole = __builtin_convertvector(code + most, Ints);
                for (int lane = 0; lane < LANES; ++lane) codes[t + lane] = static_cast<uint8_t>(whole[lane]);
            }
            std::fill(codes + count, codes + TILE, 0);
            const int64_t place = ((b * tiles + tile) * call.num_heads + h) * call.head_dim + d;
            pack(codes, static_cast<int>(call.nbits), call.planes + place * call.nbits * PLANE);
        }
        for (int t = 0; t < count; ++t) {
            const int64_t place = head * call.num_tokens + tile * TILE + t;
            call.overlaps[place] = overlap[t];
            call.squares[place] = square[t];
            call.energies[place] = energy[t];
        }
    }
}

}  // namespace spectral
