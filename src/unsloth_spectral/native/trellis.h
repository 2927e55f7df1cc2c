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
constexpr int WORDS = STATES / 64;     // the decisions of a step: a bit less than one for each state

// LENGTH numbers of 16 bits: a register of them, or half of one where there are no more.
template <int LENGTH>
struct CostsOf {
    typedef int16_t type __attribute__((vector_size(2 * LENGTH)));
};

// What one thread needs for a search.
struct Search {
    std::vector<uint64_t> decisions = std::vector<uint64_t>(MOST_STEPS * WORDS);
    uint8_t windows[MOST_STEPS];
};

// The bits of a byte in reverse order.
INLINE uint8_t reversed(uint8_t byte) {
    byte = static_cast<uint8_t>(byte >> 4 | byte << 4);
    byte = static_cast<uint8_t>((byte & 0xcc) >> 2 | (byte & 0x33) << 2);
    return static_cast<uint8_t>((byte & 0xaa) >> 1 | (byte & 0x55) << 1);
}

// Keeps the lower costs, of equal ones those that are there; writes a bit for each, set where `other` was lower.
template <typename Costs>
INLINE void keep_lower(Costs& least, Costs other, uint8_t* is_other) {
    constexpr int LENGTH = sizeof(Costs) / 2;
#if defined(__AVX512BW__)
    if constexpr (LENGTH == 32) {
        const __m512i a = bits<__m512i>(least), b = bits<__m512i>(other);
        store(is_other, _mm512_cmplt_epi16_mask(b, a));
        least = bits<Costs>(_mm512_min_epi16(a, b));
    } else {
        const __m256i a = bits<__m256i>(least), b = bits<__m256i>(other);
        store(is_other, _mm256_cmplt_epi16_mask(b, a));
        least = bits<Costs>(_mm256_min_epi16(a, b));
    }
    // Else the compiler gathers the bits in a vector register, which takes longer than storing them.
    asm volatile("" ::: "memory");
#else
    const Costs is_lower = other < least;
    least = is_lower ? other : least;
#if defined(__AVX2__)
    const __m256i mask = bits<__m256i>(is_lower);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(mask), _mm256_extracti128_si256(mask, 1));
    store(is_other, static_cast<uint16_t>(_mm_movemask_epi8(bytes)));
#elif defined(__SSE2__)
    const __m128i mask = bits<__m128i>(is_lower);
    store(is_other, static_cast<uint8_t>(_mm_movemask_epi8(_mm_packs_epi16(mask, mask))));
#else
    const Costs places = is_lower & Costs{1, 2, 4, 8, 16, 32, 64, 128};
    int sum = 0;
    for (int lane = 0; lane < LENGTH; ++lane) sum += places[lane];
    store(is_other, static_cast<uint8_t>(sum));
#endif
#endif
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
#pragma GCC unroll 16
    for (int i = COUNT - 1; i >= 0; --i) {
        const Costs v = costs[i];
#pragma GCC unroll 16
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
#pragma GCC unroll 16
        for (int i = COUNT - 1; i >= 0; --i) {
            const Costs v = costs[i];
            twice(v, costs[2 * i], costs[2 * i + 1]);
        }
        repeat<NBITS - 1, 2 * COUNT>(costs);
    }
#endif
}

// The lower costs of neighbours, 2^LEVEL of them by GROUPS groups, in place, and so on until one is left. A round with
// 2^LEVEL / 2 winners writes a bit for each winner and group, set where it was the second of the two.
template <int LEVEL, int VECTORS, typename Costs>
INLINE void play(Costs* costs, uint8_t* decisions) {
    if constexpr (LEVEL > 0) {
        constexpr int WINNERS = 1 << (LEVEL - 1), BYTES_OF_BITS = sizeof(Costs) / 16;
#pragma GCC unroll 16
        for (int i = 0; i < WINNERS * VECTORS; ++i) {
            const int first = i / VECTORS * 2 * VECTORS + i % VECTORS;
            Costs least = costs[first];
            keep_lower(least, costs[first + VECTORS], decisions + i * BYTES_OF_BITS);
            costs[i] = least;
        }
        play<LEVEL - 1, VECTORS>(costs, decisions + WINNERS * VECTORS * BYTES_OF_BITS);
    }
}

// One step: the least cost of the predecessors of each state, which are 2^NBITS and those of as many states, plus the
// state's own distance. Writes which predecessor it was.
template <int NBITS, typename Costs>
INLINE void advance(Costs* costs, const int16_t* distances, uint64_t* decisions) {
    constexpr int LENGTH = sizeof(Costs) / 2, VECTORS = (STATES >> NBITS) / LENGTH;
    play<NBITS, VECTORS>(costs, reinterpret_cast<uint8_t*>(decisions));
    repeat<NBITS, VECTORS>(costs);
#pragma GCC unroll 32
    for (int v = 0; v < STATES / LENGTH; ++v) costs[v] += load<Costs>(distances + v * LENGTH);
}

// The predecessor that `advance` chose for a group of states.
template <int NBITS>
INLINE int predecessor(const uint64_t* decisions, int group) {
    constexpr int GROUPS = STATES >> NBITS;
    const auto is_second = [&](int bit) { return static_cast<int>(decisions[bit / 64] >> (bit % 64)) & 1; };
    int winner = 0;
    // The last round's bits are behind those of the rounds before.
    if constexpr (NBITS > 3) winner = is_second(224 + group);
    if constexpr (NBITS > 2) winner = 2 * winner + is_second(192 + winner * GROUPS + group);
    if constexpr (NBITS > 1) winner = 2 * winner + (static_cast<int>(decisions[2] >> (winner * GROUPS + group)) & 1);
    const int bit = winner * GROUPS + group;
    return 2 * winner + (static_cast<int>((bit < 64 ? decisions[0] : decisions[1]) >> (bit % 64)) & 1);
}

// The windows of least cost for at most MOST_STEPS inputs, after a window `before`, or any where that is negative;
// returns the window that they follow. `distances` are [511, 256], by input and state.
template <int NBITS>
uint8_t search(Search& s, const int16_t* inputs, int64_t count, const int16_t* distances, int before) {
    constexpr int GROUPS = STATES >> NBITS, ALL = BYTES / 2, LENGTH = GROUPS < ALL ? GROUPS : ALL;
    typedef typename CostsOf<LENGTH>::type Costs;
    alignas(64) int16_t numbers[STATES];
    for (auto& cost : numbers) cost = before < 0 ? 0 : UNREACHABLE;
    if (before >= 0) numbers[reversed(static_cast<uint8_t>(before))] = 0;
    Costs costs[STATES / LENGTH];
    std::memcpy(costs, numbers, sizeof costs);
    uint64_t* const decisions = s.decisions.data();
    for (int64_t t = 0; t < count; ++t) {
        advance<NBITS>(costs, distances + (inputs[t] + LARGEST_INPUT) * STATES, decisions + t * WORDS);
        if (t % STEPS_BETWEEN == STEPS_BETWEEN - 1) {
            const Costs base = Costs{} + costs[0][0];
#pragma GCC unroll 32
            for (int v = 0; v < STATES / LENGTH; ++v) costs[v] -= base;
        }
    }
    std::memcpy(numbers, costs, sizeof costs);
    int state = 0;
    for (int i = 1; i < STATES; ++i)
        if (numbers[i] < numbers[state]) state = i;
    for (int64_t t = count - 1; t >= 0; --t) {
        s.windows[t] = static_cast<uint8_t>(state);
        const int group = state >> NBITS;
        state = predecessor<NBITS>(decisions + t * WORDS, group) << (8 - NBITS) | group;
    }
    for (int64_t t = 0; t < count; ++t) s.windows[t] = reversed(s.windows[t]);
    return reversed(static_cast<uint8_t>(state));
}

}  // namespace
}  // namespace spectral
