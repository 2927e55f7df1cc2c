// Fitting scales, quantizing and packing: what torch does in dozens of passes, in one (codec/spectral).
//
// codec/spectral/kernel.py fills in the structures of abi.h and checks everything: nothing is checked here.
//
// Every build gives the same codes, bit for bit. So sums are of doubles, which hold a product of two floats exactly, and
// go in the same order whatever the vectors' length.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "abi.h"
#include "simd.h"
#include "trellis.h"

namespace spectral {
namespace {

constexpr float TINY = std::numeric_limits<float>::min();
constexpr float LARGEST_INVERSE = 1e30f;  // times zero it is zero
constexpr int LANES_OF_SUMS = 8;
constexpr int LANES_OF_PEAKS = 16;

// Sums of products, in an order that does not depend on the processor.
struct Total {
    double lanes[LANES_OF_SUMS] = {};

    INLINE void add(Total& total, const float* a, const float* b, int count) {
        int i = 0;
        for (; i + LANES_OF_SUMS <= count; i += LANES_OF_SUMS)
            for (int lane = 0; lane < LANES_OF_SUMS; ++lane)
                total.lanes[lane] += static_cast<double>(a[i + lane]) * static_cast<double>(b[i + lane]);
        for (int lane = 0; i + lane < count; ++lane)
            total.lanes[lane] += static_cast<double>(a[i + lane]) * static_cast<double>(b[i + lane]);
    }
    double sum() const {
        return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
    }
};

double dot(const float* a, const float* b, int count) {
    Total total;
    Total::add(total, a, b, count);
    return total.sum();
}

// Of the lanes of a loop that the compiler makes vectors of.
float peak(const float* x, int count) {
    float lanes[LANES_OF_PEAKS] = {}, most = 0.0f;
    int i = 0;
    for (; i + LANES_OF_PEAKS <= count; i += LANES_OF_PEAKS)
        for (int lane = 0; lane < LANES_OF_PEAKS; ++lane) {
            const float size = std::fabs(x[i + lane]);
            lanes[lane] = lanes[lane] < size ? size : lanes[lane];
        }
    for (; i < count; ++i) most = std::max(most, std::fabs(x[i]));
    return std::max(most, *std::max_element(lanes, lanes + LANES_OF_PEAKS));
}

int count_of_zeros(const float* x, int count) {
    int zeros = 0;
    for (int t = 0; t < count; ++t) zeros += x[t] == 0.0f;
    return zeros;
}

// What one thread works with.
struct Coder {
    Search search;
    std::vector<int16_t> inputs;
    std::vector<uint8_t> windows;
    std::vector<float> reconstructed;

    explicit Coder(int64_t num_tokens)
        : inputs(num_tokens), windows(num_tokens), reconstructed(num_tokens) {}
};

// `count` numbers in the unit of the tables: the nearest integers to x times their inverses, halves away from zero,
// bounded; the lowest one for NaN.
template <typename Inverse>
INLINE void inputs_of(const float* x, const Inverse& inverse_of, int64_t count, int16_t* inputs) {
    constexpr float LIMIT = LARGEST_INPUT;
    for (int64_t t = 0; t < count; ++t) {
        float scaled = x[t] * inverse_of(t);
        scaled = scaled > -LIMIT ? scaled : -LIMIT;
        scaled = scaled < LIMIT ? scaled : LIMIT;
        const int twice = static_cast<int>(2.0f * scaled), sign = twice >> 31;
        // Rounded down by a shift, of a number that is not negative.
        inputs[t] = static_cast<int16_t>(((((twice ^ sign) - sign + 1) >> 1) ^ sign) - sign);
    }
}

// Windows and reconstructions of the coder's inputs at 1 to 4 bits; returns the carry.
uint8_t search_all(Coder& coder, const Trellis& trellis, int nbits, int64_t count, int carry) {
    const int16_t* distances = trellis.distances + static_cast<int64_t>(nbits - 1) * (2 * LARGEST_INPUT + 1) * STATES;
    const float* entries = trellis.entries + (nbits - 1) * STATES;
    int first_carry = carry;
    for (int64_t first = 0; first < count; first += MOST_STEPS) {
        const int64_t steps = std::min(MOST_STEPS, count - first);
        const int16_t* inputs = coder.inputs.data() + first;
        uint8_t before = 0;
        with_nbits(nbits, [&](auto constant) {
            constexpr int NBITS = decltype(constant)::value;
            if constexpr (NBITS <= MAX_TRELLIS_NBITS)
                before = search<NBITS>(coder.search, inputs, steps, distances, carry);
        });
        if (!first) first_carry = before;
        std::copy(coder.search.windows, coder.search.windows + steps, coder.windows.begin() + first);
        carry = coder.windows[first + steps - 1];
    }
    for (int64_t t = 0; t < count; ++t) coder.reconstructed[t] = entries[coder.windows[t]];
    return static_cast<uint8_t>(first_carry);
}

// The code of x under a uniform quantizer of 2 * half steps of 1 / inverse; the lowest one if x is NaN.
INLINE int uniform_code(float x, float inverse, float half) {
    float scaled = x * inverse;
    scaled = scaled > -half ? scaled : -half;
    scaled = scaled < half ? scaled : half;
    // Rounded down by a conversion that rounds to zero, of a number that is not negative.
    return std::min(static_cast<int>(scaled + half), static_cast<int>(2.0f * half) - 1);
}

// A full tile of one component: uniform codes at the clipping point of least error, as windows, and what they stand for.
// A tile that is not full gets its step from the standard deviation, because of the tokens that are still to come.
void quantize_uniformly(const float* x, int nbits, const float* clips, int64_t num_clips, uint8_t* windows,
                        float* reconstructed) {
    constexpr int count = TILE;
    const float half = static_cast<float>(1 << (nbits - 1));
    const float most = peak(x, count);
    double best = -1.0;
    float trials[TILE];
    for (int64_t i = 0; i < num_clips; ++i) {
        const float inverse = 1.0f / std::max(most * clips[i] / half, TINY);
        for (int t = 0; t < count; ++t)
            trials[t] = static_cast<float>(uniform_code(x[t], inverse, half)) - half + 0.5f;
        // The error once the scale is the least-squares one for these codes.
        const double overlap = dot(x, trials, count), along = overlap * overlap / dot(trials, trials, count);
        // The first one in any case: nothing is larger than NaN, and larger than it.
        if (!i || along > best) best = along, std::copy(trials, trials + count, reconstructed);
    }
    for (int t = 0; t < count; ++t)
        windows[t] = static_cast<uint8_t>(static_cast<int>(reconstructed[t] + half - 0.5f) << (8 - nbits));
}

// The newest NBITS bits of `count` tokens' windows as a tile's stream, zeros behind.
template <int NBITS>
INLINE void pack(const uint8_t* windows, int count, uint8_t* stream) {
    uint8_t padded[TILE] = {};
    if (count < TILE) windows = static_cast<const uint8_t*>(std::memcpy(padded, windows, count));
    for (int t = 0; t < TILE; t += 8, stream += NBITS) {
        uint64_t codes;
        std::memcpy(&codes, windows + t, sizeof codes);
        // The second of two neighbours moves to the end of the first: of codes, then of pairs of them, then of fours.
        constexpr uint64_t ONE = (1u << NBITS) - 1, TWO = (1u << 2 * NBITS) - 1, FOUR = (1ull << 4 * NBITS) - 1;
        codes >>= 8 - NBITS;
        codes = (codes & ONE * 0x0001000100010001u) | (codes & ONE * 0x0100010001000100u) >> (8 - NBITS);
        codes = (codes & TWO * 0x0000000100000001u) | (codes & TWO * 0x0001000000010000u) >> 2 * (8 - NBITS);
        codes = (codes & FOUR) | (codes & FOUR << 32) >> 4 * (8 - NBITS);
        std::memcpy(stream, &codes, NBITS);
    }
}

void pack(const uint8_t* windows, int count, int nbits, uint8_t* stream) {
    with_nbits(nbits, [&](auto constant) { pack<decltype(constant)::value>(windows, count, stream); });
}

}  // namespace

extern "C" void spectral_encode_keys(const KeyEncoding* given) {
    const KeyEncoding& call = *given;
    const int64_t tiles = (call.num_tokens + TILE - 1) / TILE, rows = call.batch * call.num_components;
#if defined(_OPENMP)
#pragma omp parallel num_threads(static_cast<int>(call.num_threads))
#endif
    {
        Coder coder(call.num_tokens);
#if defined(_OPENMP)
#pragma omp for schedule(dynamic, 4)
#endif
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t b = row / call.num_components, c = row % call.num_components;
            const float* x = call.coefficients + row * call.num_tokens;
            const int nbits = call.widths[c];
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const float* from = x + tile * TILE;
                const int count = static_cast<int>(std::min<int64_t>(TILE, call.num_tokens - tile * TILE));
                const double energy = dot(from, from, count);
                call.energies[row * tiles + tile] = static_cast<float>(energy);
                const bool is_uniform = nbits > MAX_TRELLIS_NBITS, is_given = call.inverses && !tile;
                if (is_uniform && !is_given && count == TILE) {
                    quantize_uniformly(from, nbits, call.clips, call.num_clips, coder.windows.data() + tile * TILE,
                                       coder.reconstructed.data() + tile * TILE);
                    continue;
                }
                // Padding is zero.
                const double numbers = std::max(count - count_of_zeros(from, count), 1);
                const float deviation = static_cast<float>(std::sqrt(energy / numbers));
                const float half = static_cast<float>(1 << (nbits - 1));
                const float reach = is_uniform ? half : call.trellis.reaches[nbits - 1];
                const float suited = std::min({call.trellis.units[nbits - 1] / std::max(deviation, TINY),
                                               reach / std::max(peak(from, count), TINY), LARGEST_INVERSE});
                const float inverse = is_given ? call.inverses[row] : suited;
                if (!is_uniform) {
                    inputs_of(from, [&](int64_t) { return inverse; }, count, coder.inputs.data() + tile * TILE);
                    continue;
                }
                for (int t = 0; t < count; ++t) {
                    const int code = uniform_code(from[t], inverse, half);
                    coder.windows[tile * TILE + t] = static_cast<uint8_t>(code << (8 - nbits));
                    coder.reconstructed[tile * TILE + t] = static_cast<float>(code) - half + 0.5f;
                }
            }
            if (nbits <= MAX_TRELLIS_NBITS) {
                const uint8_t carry =
                    search_all(coder, call.trellis, nbits, call.num_tokens, call.is_free ? -1 : call.carries[row]);
                if (call.is_free) call.carries[row] = carry;
            } else if (call.is_free) {
                call.carries[row] = 0;
            }
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const int count = static_cast<int>(std::min<int64_t>(TILE, call.num_tokens - tile * TILE));
                const float* reconstructed = coder.reconstructed.data() + tile * TILE;
                call.overlaps[row * tiles + tile] = static_cast<float>(dot(x + tile * TILE, reconstructed, count));
                call.squares[row * tiles + tile] = static_cast<float>(dot(reconstructed, reconstructed, count));
                pack(coder.windows.data() + tile * TILE, count, nbits,
                     call.streams + ((b * tiles + tile) * call.num_rows + call.rows[c]) * ROW);
            }
        }
    }
}

extern "C" void spectral_encode_values(const ValueEncoding* given) {
    const ValueEncoding& call = *given;
    const int64_t tiles = (call.num_tokens + TILE - 1) / TILE, heads = call.batch * call.num_heads;
    const int64_t n = call.num_tokens, dims = call.head_dim;
    const int nbits = static_cast<int>(call.nbits);
    const float half = static_cast<float>(1 << (nbits - 1));
    std::vector<float> inverse(heads * n);
    std::vector<float> reconstructed(heads * dims * n);
#if defined(_OPENMP)
#pragma omp parallel num_threads(static_cast<int>(call.num_threads))
#endif
    {
        Coder coder(n);
        // A token's sums take its dimensions one after another, tile by tile so that they stay in the cache.
        const auto over_tokens = [&](const float* factors, auto&& finish) {
#if defined(_OPENMP)
#pragma omp for schedule(static)
#endif
            for (int64_t part = 0; part < heads * tiles; ++part) {
                const int64_t head = part / tiles, first = part % tiles * TILE;
                const int count = static_cast<int>(std::min<int64_t>(TILE, n - first));
                double products[TILE] = {}, squares[TILE] = {};
                for (int64_t d = 0; d < dims; ++d) {
                    const float* x = call.values + (head * dims + d) * n + first;
                    const float* y = factors + (head * dims + d) * n + first;
                    for (int t = 0; t < count; ++t) {
                        products[t] += static_cast<double>(x[t]) * static_cast<double>(y[t]);
                        squares[t] += static_cast<double>(y[t]) * static_cast<double>(y[t]);
                    }
                }
                for (int t = 0; t < count; ++t) finish(head * n + first + t, products[t], squares[t]);
            }
        };
        over_tokens(call.values, [&](int64_t token, double energy, double) {
            call.energies[token] = static_cast<float>(energy);
            const float deviation = static_cast<float>(std::sqrt(energy / static_cast<double>(dims)));
            inverse[token] = std::min(call.trellis.units[nbits - 1] / std::max(deviation, TINY), LARGEST_INVERSE);
        });
#if defined(_OPENMP)
#pragma omp for schedule(dynamic, 4)
#endif
        for (int64_t row = 0; row < heads * dims; ++row) {
            const int64_t head = row / dims, b = head / call.num_heads, h = head % call.num_heads, d = row % dims;
            const float* x = call.values + row * n;
            const float* scale = inverse.data() + head * n;
            uint8_t carry = 0;
            if (nbits <= MAX_TRELLIS_NBITS) {
                inputs_of(x, [&](int64_t t) { return scale[t]; }, n, coder.inputs.data());
                carry = search_all(coder, call.trellis, nbits, n, call.is_free ? -1 : call.carries[row]);
            } else {
                for (int64_t t = 0; t < n; ++t) {
                    const int code = uniform_code(x[t], scale[t], half);
                    coder.windows[t] = static_cast<uint8_t>(code << (8 - nbits));
                    coder.reconstructed[t] = static_cast<float>(code) - half + 0.5f;
                }
            }
            if (call.is_free) call.carries[row] = carry;
            std::copy(coder.reconstructed.begin(), coder.reconstructed.begin() + n, reconstructed.begin() + row * n);
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const int64_t place = ((b * tiles + tile) * call.num_heads + h) * dims + d;
                pack(coder.windows.data() + tile * TILE, static_cast<int>(std::min<int64_t>(TILE, n - tile * TILE)),
                     nbits, call.streams + place * nbits * ROW);
            }
        }
        over_tokens(reconstructed.data(), [&](int64_t token, double overlap, double square) {
            call.overlaps[token] = static_cast<float>(overlap);
            call.squares[token] = static_cast<float>(square);
        });
    }
}

}  // namespace spectral
