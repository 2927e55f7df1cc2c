// Vectors as wide as the processor's registers, and the few operations on them that compilers do not find by themselves.
//
// Everything else is written with the vector extensions of GCC and Clang, so one source serves AVX-512, AVX2, NEON and
// whatever else there is: each library is this source compiled for one of them.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace spectral {

#if defined(__AVX512BW__)
constexpr int BYTES = 64;
#elif defined(__AVX2__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
constexpr int LANES = BYTES / 4;   // numbers in a Floats
constexpr int TOKENS = BYTES / 2;  // tokens expanded at a time: the numbers in a Shorts

typedef float Floats __attribute__((vector_size(BYTES)));
typedef int32_t Ints __attribute__((vector_size(BYTES)));
typedef uint32_t Words __attribute__((vector_size(BYTES)));
typedef int16_t Shorts __attribute__((vector_size(BYTES)));
typedef int16_t HalfShorts __attribute__((vector_size(BYTES / 2)));
typedef uint16_t Halves __attribute__((vector_size(BYTES / 2)));

#define INLINE static inline __attribute__((always_inline))

#if defined(__clang__)
#define SHUFFLE(type, mask_type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(type, mask_type, a, b, ...) __builtin_shuffle(a, b, (mask_type){__VA_ARGS__})
#endif

template <typename Vector>
INLINE Vector load(const void* from) {
    Vector value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <typename Vector>
INLINE void store(void* to, Vector value) {
    std::memcpy(to, &value, sizeof value);
}

INLINE Floats all(float value) { return Floats{} + value; }

template <typename To, typename From>
INLINE To bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
    To result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}

INLINE Floats to_floats(Ints value) { return __builtin_convertvector(value, Floats); }

// a where the mask is set (all bits of a lane), else b.
INLINE Floats choose(Ints mask, Floats a, Floats b) {
    return bits<Floats>((mask & bits<Ints>(a)) | (~mask & bits<Ints>(b)));
}

INLINE Floats larger(Floats a, Floats b) { return choose(a > b, a, b); }

INLINE float sum(Floats v) {
    float total[LANES];
    std::memcpy(total, &v, sizeof v);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; ++lane) total[lane] += total[lane + half];
    return total[0];
}

INLINE float largest(Floats v) {
    float found = v[0];
    for (int lane = 1; lane < LANES; ++lane) found = v[lane] > found ? v[lane] : found;
    return found;
}

// The sums of as many vectors as there are lanes, one a lane: a quarter of the work of single sums.
INLINE Floats sums(const Floats (&v)[LANES]) {
#if defined(__AVX512BW__)
    Floats a[8], b[4];
    for (int i = 0; i < 8; ++i)
        a[i] = SHUFFLE(Floats, Ints, v[i], v[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               SHUFFLE(Floats, Ints, v[i], v[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < 4; ++i)
        b[i] = SHUFFLE(Floats, Ints, a[i], a[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
               SHUFFLE(Floats, Ints, a[i], a[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    Floats c[2];
    for (int i = 0; i < 2; ++i)
        c[i] = SHUFFLE(Floats, Ints, b[i], b[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               SHUFFLE(Floats, Ints, b[i], b[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return SHUFFLE(Floats, Ints, c[0], c[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           SHUFFLE(Floats, Ints, c[0], c[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
#elif defined(__AVX2__)
    Floats a[4], b[2];
    for (int i = 0; i < 4; ++i)
        a[i] = SHUFFLE(Floats, Ints, v[i], v[i + 4], 0, 1, 2, 3, 8, 9, 10, 11) +
               SHUFFLE(Floats, Ints, v[i], v[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    for (int i = 0; i < 2; ++i)
        b[i] = SHUFFLE(Floats, Ints, a[i], a[i + 2], 0, 1, 8, 9, 4, 5, 12, 13) +
               SHUFFLE(Floats, Ints, a[i], a[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    return SHUFFLE(Floats, Ints, b[0], b[1], 0, 8, 2, 10, 4, 12, 6, 14) +
           SHUFFLE(Floats, Ints, b[0], b[1], 1, 9, 3, 11, 5, 13, 7, 15);
#else
    Floats a[2];
    for (int i = 0; i < 2; ++i)
        a[i] = SHUFFLE(Floats, Ints, v[i], v[i + 2], 0, 1, 4, 5) + SHUFFLE(Floats, Ints, v[i], v[i + 2], 2, 3, 6, 7);
    return SHUFFLE(Floats, Ints, a[0], a[1], 0, 4, 2, 6) + SHUFFLE(Floats, Ints, a[0], a[1], 1, 5, 3, 7);
#endif
}

// e^x to about 1e-7, relative; 0 below -87, NaN of NaN.
INLINE Floats exponential(Floats x) {
    const Floats bounded = choose(x < all(-87.0f), all(-87.0f), x);
    const Floats octaves = bounded * 1.44269504088896341f;
    const Floats shifted = octaves + 12582912.0f;  // 1.5 * 2^23: rounds to an integer that sits in the low bits
    const Floats part = octaves - (shifted - 12582912.0f);
    Floats power = all(1.5403530e-4f);
    power = power * part + 1.3333558e-3f;
    power = power * part + 9.6181291e-3f;
    power = power * part + 5.5504109e-2f;
    power = power * part + 2.4022651e-1f;
    power = power * part + 6.9314718e-1f;
    power = power * part + 1.0f;
    const Floats scaled = bits<Floats>(bits<Ints>(power) + (bits<Ints>(shifted) << 23));
    return choose(x < all(-87.0f), Floats{}, choose(x == x, scaled, x));
}

// TOKENS codes of one component as odd integers 2 * code + 1 - 2^nbits, from planes 16 bytes apart.
template <int NBITS>
INLINE Shorts expand(const uint8_t* planes) {
#if defined(__AVX512BW__)
    __m512i value = _mm512_set1_epi16(1 - (1 << NBITS));
    for (int plane = 0; plane < NBITS; ++plane) {
        const __mmask32 mask = load<uint32_t>(planes + 16 * plane);
        value = _mm512_mask_add_epi16(value, mask, value, _mm512_set1_epi16(static_cast<short>(2 << plane)));
    }
    return bits<Shorts>(value);
#else
#if defined(__AVX2__)
    const Shorts select = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768};
#else
    const Shorts select = {1, 2, 4, 8, 16, 32, 64, 128};
#endif
    Shorts value = Shorts{} + static_cast<int16_t>(1 - (1 << NBITS));
    for (int plane = 0; plane < NBITS; ++plane) {
#if defined(__AVX2__)
        const int16_t word = load<int16_t>(planes + 16 * plane);
#else
        const int16_t word = planes[16 * plane];
#endif
        const int16_t worth = static_cast<int16_t>(2 << plane);
        value += (((Shorts{} + word) & select) == select) & worth;
    }
    return value;
#endif
}

// Lanes of two neighbouring numbers, a token a lane, in the order that `in_order` undoes.
INLINE Shorts pairs_low(Shorts a, Shorts b) {
#if defined(__AVX512BW__)
    return bits<Shorts>(_mm512_unpacklo_epi16(bits<__m512i>(a), bits<__m512i>(b)));
#elif defined(__AVX2__)
    return bits<Shorts>(_mm256_unpacklo_epi16(bits<__m256i>(a), bits<__m256i>(b)));
#else
    return SHUFFLE(Shorts, Shorts, a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#endif
}

INLINE Shorts pairs_high(Shorts a, Shorts b) {
#if defined(__AVX512BW__)
    return bits<Shorts>(_mm512_unpackhi_epi16(bits<__m512i>(a), bits<__m512i>(b)));
#elif defined(__AVX2__)
    return bits<Shorts>(_mm256_unpackhi_epi16(bits<__m256i>(a), bits<__m256i>(b)));
#else
    return SHUFFLE(Shorts, Shorts, a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#endif
}

// What came of `pairs_low` and `pairs_high`, as the first and the second half of the tokens.
INLINE void in_order(Floats low, Floats high, Floats& first, Floats& second) {
#if defined(__AVX512BW__)
    first = SHUFFLE(Floats, Ints, low, high, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    second = SHUFFLE(Floats, Ints, low, high, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
#elif defined(__AVX2__)
    first = SHUFFLE(Floats, Ints, low, high, 0, 1, 2, 3, 8, 9, 10, 11);
    second = SHUFFLE(Floats, Ints, low, high, 4, 5, 6, 7, 12, 13, 14, 15);
#else
    first = low;
    second = high;
#endif
}

// total + a[2i] * b[2i] + a[2i+1] * b[2i+1]
INLINE Ints dot(Ints total, Shorts a, Shorts b) {
#if defined(__AVX512VNNI__)
    return bits<Ints>(_mm512_dpwssd_epi32(bits<__m512i>(total), bits<__m512i>(a), bits<__m512i>(b)));
#elif defined(__AVX2__)
    return total + bits<Ints>(_mm256_madd_epi16(bits<__m256i>(a), bits<__m256i>(b)));
#elif defined(__SSE2__)
    return total + bits<Ints>(_mm_madd_epi16(bits<__m128i>(a), bits<__m128i>(b)));
#else
    const Ints left = bits<Ints>(a), right = bits<Ints>(b);
    return total + (left >> 16) * (right >> 16) + ((left << 16) >> 16) * ((right << 16) >> 16);
#endif
}

// Two weights for every lane.
INLINE Shorts pair(const int16_t* weights) { return bits<Shorts>(Ints{} + load<int32_t>(weights)); }

}  // namespace spectral
