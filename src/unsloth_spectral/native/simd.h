// 64-byte vectors and the few operations on them that compilers do not find by themselves.
//
// Everything else is written with the vector extensions of GCC and Clang, so one source serves AVX-512, AVX2, NEON and
// whatever else there is: each library is this source compiled for one of them.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace spectral {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int16_t Shorts __attribute__((vector_size(64)));

constexpr int LANES = 16;   // numbers in a Floats
constexpr int TOKENS = 32;  // tokens expanded at a time: the numbers in a Shorts

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
    typedef float Half __attribute__((vector_size(32)));
    typedef float Quarter __attribute__((vector_size(16)));
    Half low, high;
    std::memcpy(&low, &v, 32);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + 32, 32);
    low += high;
    Quarter a, b;
    std::memcpy(&a, &low, 16);
    std::memcpy(&b, reinterpret_cast<const char*>(&low) + 16, 16);
    a += b;
    return (a[0] + a[1]) + (a[2] + a[3]);
}

INLINE float largest(Floats v) {
    float found = v[0];
    for (int lane = 1; lane < LANES; ++lane) found = v[lane] > found ? v[lane] : found;
    return found;
}

// The sums of sixteen vectors, one a lane: a quarter of the work of sixteen single sums.
INLINE Floats sums(const Floats (&v)[LANES]) {
    Floats a[8], b[4], c[2];
    for (int i = 0; i < 8; ++i)
        a[i] = SHUFFLE(Floats, Ints, v[i], v[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               SHUFFLE(Floats, Ints, v[i], v[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < 4; ++i)
        b[i] = SHUFFLE(Floats, Ints, a[i], a[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
               SHUFFLE(Floats, Ints, a[i], a[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int i = 0; i < 2; ++i)
        c[i] = SHUFFLE(Floats, Ints, b[i], b[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               SHUFFLE(Floats, Ints, b[i], b[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return SHUFFLE(Floats, Ints, c[0], c[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           SHUFFLE(Floats, Ints, c[0], c[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
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

// 32 tokens' codes of one component as odd integers 2 * code + 1 - 2^nbits, from planes 16 bytes apart.
template <int NBITS>
INLINE Shorts expand(const uint8_t* planes) {
#if defined(__AVX512BW__)
    __m512i value = _mm512_set1_epi16(1 - (1 << NBITS));
    for (int plane = 0; plane < NBITS; ++plane) {
        uint32_t mask;
        std::memcpy(&mask, planes + 16 * plane, 4);
        value = _mm512_mask_add_epi16(value, mask, value, _mm512_set1_epi16(static_cast<short>(2 << plane)));
    }
    return bits<Shorts>(value);
#else
    const Shorts select = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768,
                           1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768};
    Shorts value = Shorts{} + static_cast<int16_t>(1 - (1 << NBITS));
    for (int plane = 0; plane < NBITS; ++plane) {
        int16_t low, high;
        std::memcpy(&low, planes + 16 * plane, 2);
        std::memcpy(&high, planes + 16 * plane + 2, 2);
        const Shorts words = {low,  low,  low,  low,  low,  low,  low,  low,  low,  low,  low,
                              low,  low,  low,  low,  low,  high, high, high, high, high, high,
                              high, high, high, high, high, high, high, high, high, high};
        value += ((words & select) == select) & static_cast<int16_t>(2 << plane);
    }
    return value;
#endif
}

// Lanes of two neighbouring numbers, a token a lane, in the order that `in_order` undoes.
INLINE Shorts pairs_low(Shorts a, Shorts b) {
#if defined(__AVX512BW__)
    return bits<Shorts>(_mm512_unpacklo_epi16(bits<__m512i>(a), bits<__m512i>(b)));
#else
    return SHUFFLE(Shorts, Shorts, a, b, 0, 32, 1, 33, 2, 34, 3, 35, 8, 40, 9, 41, 10, 42, 11, 43, 16, 48, 17, 49, 18,
                   50, 19, 51, 24, 56, 25, 57, 26, 58, 27, 59);
#endif
}

INLINE Shorts pairs_high(Shorts a, Shorts b) {
#if defined(__AVX512BW__)
    return bits<Shorts>(_mm512_unpackhi_epi16(bits<__m512i>(a), bits<__m512i>(b)));
#else
    return SHUFFLE(Shorts, Shorts, a, b, 4, 36, 5, 37, 6, 38, 7, 39, 12, 44, 13, 45, 14, 46, 15, 47, 20, 52, 21, 53, 22,
                   54, 23, 55, 28, 60, 29, 61, 30, 62, 31, 63);
#endif
}

// What came of `pairs_low` and `pairs_high`, as tokens 0 to 15 and 16 to 31.
INLINE void in_order(Floats low, Floats high, Floats& first, Floats& second) {
    first = SHUFFLE(Floats, Ints, low, high, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    second = SHUFFLE(Floats, Ints, low, high, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
}

// total + a[2i] * b[2i] + a[2i+1] * b[2i+1]
INLINE Ints dot(Ints total, Shorts a, Shorts b) {
#if defined(__AVX512VNNI__)
    return bits<Ints>(_mm512_dpwssd_epi32(bits<__m512i>(total), bits<__m512i>(a), bits<__m512i>(b)));
#elif defined(__AVX2__)
    __m256i left[2], right[2], held[2];
    std::memcpy(left, &a, 64);
    std::memcpy(right, &b, 64);
    std::memcpy(held, &total, 64);
    for (int half = 0; half < 2; ++half)
        held[half] = _mm256_add_epi32(held[half], _mm256_madd_epi16(left[half], right[half]));
    std::memcpy(&total, held, 64);
    return total;
#else
    const Ints left = bits<Ints>(a), right = bits<Ints>(b);
    return total + (left >> 16) * (right >> 16) + ((left << 16) >> 16) * ((right << 16) >> 16);
#endif
}

// Two weights for every lane.
INLINE Shorts pair(const int16_t* weights) { return bits<Shorts>(Ints{} + load<int32_t>(weights)); }

}  // namespace spectral
