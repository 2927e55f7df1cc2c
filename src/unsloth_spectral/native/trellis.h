// The encoder's search: the path of least cost through a trellis of 256 states (codec/spectral/trellis.py).
//
// All in integers, and of equal costs the first state wins: every build finds the same path.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "simd.h"

namespace spectral {
namespace {

constexpr int STATES = 256;
constexpr int LARGEST_INPUT = 255;
constexpr int UNREACHABLE = 8 * 2047;  // above the cost of any path to the same place
constexpr int STEPS_BETWEEN = 8;       // after which costs are brought near zero again
constexpr int64_t MOST_STEPS = 1024;   // of one search: as many decisions as a processor's cache holds

// LENGTH numbers of 16 bits: a register of them, or half of one where there are no more.
template <int LENGTH>
struct CostsOf {
    typedef int16_t type __attribute__((vector_size(2 * LENGTH)));
    typedef uint8_t bytes __attribute__((vector_size(LENGTH)));
};

// What one thread needs for a search.
struct Search {
    std::vector<uint8_t> decisions;
    uint8_t windows[MOST_STEPS];
};

// The bits of a byte in reverse order.
INLINE uint8_t reversed(uint8_t byte) {
    return static_cast<uint8_t>((byte * 0x0202020202ull & 0x010884422010ull) % 1023);
}

// Keeps the lower cost and its place; of equal ones those that are there.
template <typename Costs>
INLINE void keep_lower(Costs& least, Costs& place, Costs other, Costs other_place) {
#if defined(__AVX512BW__)
    if constexpr (sizeof least == 64) {
        const __m512i a = bits<__m512i>(least), b = bits<__m512i>(other);
        const __mmask32 is_lower = _mm512_cmplt_epi16_mask(b, a);
        least = bits<Costs>(_mm512_min_epi16(a, b));
        place = bits<Costs>(_mm512_mask_mov_epi16(bits<__m512i>(place), is_lower, bits<__m512i>(other_place)));
        return;
    }
#endif
    const Costs is_lower = other < least;
    least = is_lower ? other : least;
    place = is_lower ? other_place : place;
}

#if !defined(__AVX512BW__)
// Of each number two, side by side: the lower half of the vector and the upper half.
template <typename Costs>
INLINE void twice(Costs v, Costs& lower, Costs& upper) {
    if constexpr (sizeof v == 16) {
        lower = SHUFFLE(Costs, Costs, v, v, 0, 0, 1, 1, 2, 2, 3, 3);
        upper = SHUFFLE(Costs, Costs, v, v, 4, 4, 5, 5, 6, 6, 7, 7);
    } else {
        lower = SHUFFLE(Costs, Costs, v, v, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
        upper = SHUFFLE(Costs, Costs, v, v, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15);
    }
}
#endif

// Each of COUNT vectors' numbers 2^NBITS times, in place: COUNT * 2^NBITS vectors.
template <int NBITS, int COUNT, typename Costs>
INLINE void repeat(Costs* costs) {
#if defined(__AVX512BW__)
    constexpr int LENGTH = sizeof(Costs) / 2, TIMES = 1 << NBITS;
    typedef typename CostsOf<32>::type Places;
    Places places;
    for (int lane = 0; lane < 32; ++lane) places[lane] = static_cast<int16_t>(lane >> NBITS);
    for (int i = COUNT - 1; i >= 0; --i) {
        const Costs v = costs[i];
        for (int part = TIMES - 1; part >= 0; --part) {
            const int16_t first = static_cast<int16_t>(part * LENGTH / TIMES);
            const __m512i place = bits<__m512i>(places + first);
            if constexpr (LENGTH == 32)
                costs[TIMES * i + part] = bits<Costs>(_mm512_permutexvar_epi16(place, bits<__m512i>(v)));
            else
                costs[TIMES * i + part] = bits<Costs>(
                    _mm256_permutexvar_epi16(_mm512_castsi512_si256(place), bits<__m256i>(v)));
        }
    }
#else
    if constexpr (NBITS > 0) {
        for (int i = COUNT - 1; i >= 0; --i) {
            const Costs v = costs[i];
            twice(v, costs[2 * i], costs[2 * i + 1]);
        }
        repeat<NBITS - 1, 2 * COUNT>(costs);
    }
#endif
}

// One step: the least cost of the predecessors of each state, which are 2^NBITS and those of as many states, plus the
// state's own distance. Writes which predecessor it was, a byte for each.
template <int NBITS>
INLINE void advance(int16_t* costs, const int16_t* distances, uint8_t* decisions) {
    constexpr int GROUPS = STATES >> NBITS, ALL = BYTES / 2, LENGTH = GROUPS < ALL ? GROUPS : ALL;
    constexpr int VECTORS_OF_LEAST = GROUPS / LENGTH;
    typedef typename CostsOf<LENGTH>::type Costs;
    Costs least[STATES / LENGTH];
    for (int v = 0; v < VECTORS_OF_LEAST; ++v) {
        Costs place = {};
        if constexpr (GROUPS < ALL) {
            // Two groups a register: even predecessors in its lower half, odd ones in its upper half.
            typedef typename CostsOf<ALL>::type Wide;
            Wide wide = load<Wide>(costs), places = {};
            for (int h = 2; h < 1 << NBITS; h += 2)
                keep_lower(wide, places, load<Wide>(costs + h * GROUPS), Wide{} + static_cast<int16_t>(h));
            Costs halves[2], of_halves[2];
            std::memcpy(halves, &wide, sizeof wide);
            std::memcpy(of_halves, &places, sizeof places);
            of_halves[1] += 1;
            const Costs is_upper =
                (halves[1] < halves[0]) | ((halves[1] == halves[0]) & (of_halves[1] < of_halves[0]));
            least[v] = is_upper ? halves[1] : halves[0];
            place = is_upper ? of_halves[1] : of_halves[0];
        } else {
            least[v] = load<Costs>(costs + v * LENGTH);
            for (int h = 1; h < 1 << NBITS; ++h)
                keep_lower(least[v], place, load<Costs>(costs + h * GROUPS + v * LENGTH),
                           Costs{} + static_cast<int16_t>(h));
        }
        store(decisions + v * LENGTH, __builtin_convertvector(place, typename CostsOf<LENGTH>::bytes));
    }
    repeat<NBITS, VECTORS_OF_LEAST>(least);
    for (int v = 0; v < STATES / LENGTH; ++v) store(costs + v * LENGTH, least[v] + load<Costs>(distances + v * LENGTH));
}

// The windows of least cost for at most MOST_STEPS inputs, after a window `before`, or any where that is negative;
// returns the window that they follow. `distances` are [511, 256], by input and state.
template <int NBITS>
uint8_t search(Search& s, const int16_t* inputs, int64_t count, const int16_t* distances, int before) {
    constexpr int GROUPS = STATES >> NBITS;
    s.decisions.resize(MOST_STEPS * STATES / 2);
    alignas(64) int16_t costs[STATES];
    for (auto& cost : costs) cost = before < 0 ? 0 : UNREACHABLE;
    if (before >= 0) costs[reversed(static_cast<uint8_t>(before))] = 0;
    for (int64_t t = 0; t < count; ++t) {
        advance<NBITS>(costs, distances + (inputs[t] + LARGEST_INPUT) * STATES, s.decisions.data() + t * GROUPS);
        if (t % STEPS_BETWEEN == STEPS_BETWEEN - 1) {
            const int16_t base = costs[0];
            for (auto& cost : costs) cost = static_cast<int16_t>(cost - base);
        }
    }
    int state = 0;
    for (int i = 1; i < STATES; ++i)
        if (costs[i] < costs[state]) state = i;
    for (int64_t t = count - 1; t >= 0; --t) {
        s.windows[t] = reversed(static_cast<uint8_t>(state));
        const int low = state >> NBITS;
        state = s.decisions[t * GROUPS + low] << (8 - NBITS) | low;
    }
    return reversed(static_cast<uint8_t>(state));
}

}  // namespace
}  // namespace spectral
