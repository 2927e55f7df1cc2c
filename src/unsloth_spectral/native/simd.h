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
constexpr int LANES = BYTES / 4;  // numbers in a Floats

typedef float Floats __attribute__((vector_size(BYTES)));
typedef int32_t Ints __attribute__((vector_size(BYTES)));
typedef uint32_t Words __attribute__((vector_size(BYTES)));
typedef int16_t Shorts __attribute__((vector_size(BYTES)));
typedef uint8_t Bytes __attribute__((vector_size(BYTES)));
typedef int16_t HalfShorts __attribute__((vector_size(BYTES / 2)));
typedef uint16_t Halves __attribute__((vector_size(BYTES / 2)));
typedef uint8_t QuarterLevels __attribute__((vector_size(BYTES / 4)));
typedef int8_t QuarterBytes __attribute__((vector_size(BYTES / 4)));

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
INLINE Floats choose(Ints mask, Floats a, Floats b) { return mask ? a : b; }

// The larger of each, b where one is not a number.
INLINE Floats larger(Floats a, Floats b) {
#if defined(__AVX512BW__)
    return bits<Floats>(_mm512_max_ps(bits<__m512>(a), bits<__m512>(b)));
#elif defined(__AVX2__)
    return bits<Floats>(_mm256_max_ps(bits<__m256>(a), bits<__m256>(b)));
#else
    return choose(a > b, a, b);
#endif
}

INLINE float sum(Floats v) {
#if defined(__AVX512BW__)
    return _mm512_reduce_add_ps(bits<__m512>(v));
#else
    float total[LANES];
    std::memcpy(total, &v, sizeof v);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; ++lane) total[lane] += total[lane + half];
    return total[0];
#endif
}

INLINE float largest(Floats v) {
#if defined(__AVX512BW__)
    return _mm512_reduce_max_ps(bits<__m512>(v));
#else
    float found = v[0];
    for (int lane = 1; lane < LANES; ++lane) found = v[lane] > found ? v[lane] : found;
    return found;
#endif
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

constexpr int TILE = 128;             // tokens that share scales and lie together in memory
constexpr int PLANE = TILE / 8;       // bytes
constexpr int PARTS = TILE / BYTES;   // of a tile, expanded one by one, a byte a token
constexpr int VECTORS = TILE / LANES; // of a tile, a number a token

#if defined(__AVX512BW__)
// COUNT planes, 1 to 4, and anything or zeros behind.
template <int COUNT>
INLINE __m512i load_planes(const uint8_t* planes) {
    if constexpr (COUNT == 1) return _mm512_zextsi128_si512(load<__m128i>(planes));
    if constexpr (COUNT == 2) return _mm512_zextsi256_si512(load<__m256i>(planes));
    if constexpr (COUNT == 3)
        return _mm512_inserti64x4(_mm512_zextsi256_si512(load<__m256i>(planes)),
                                  _mm256_zextsi128_si256(load<__m128i>(planes + 2 * PLANE)), 1);
    return load<__m512i>(planes);
}
#endif

// Codes of one component's tokens BYTES * part to BYTES * (part + 1), from its planes, 16 bytes each.
template <int NBITS>
INLINE Bytes expand(const uint8_t* planes, int part) {
#if defined(__AVX512BW__)
    // Eight bytes of eight tokens are the transpose of eight planes' bytes: gathered here, last plane first, and turned
    // by the multiplication with a matrix of bits.
    constexpr uint64_t FIRST = 0x0010203040506070u, EACH = 0x0101010101010101u;
    constexpr uint64_t PRESENT = (((1u << NBITS) - 1u) << (8 - NBITS)) * EACH;
    const __m512i index = _mm512_add_epi8(
        _mm512_set_epi64(FIRST + 7 * EACH, FIRST + 6 * EACH, FIRST + 5 * EACH, FIRST + 4 * EACH, FIRST + 3 * EACH,
                         FIRST + 2 * EACH, FIRST + EACH, FIRST),
        _mm512_set1_epi8(static_cast<char>(8 * part)));
    __m512i gathered;
    if constexpr (NBITS <= 4)
        gathered = _mm512_maskz_permutexvar_epi8(PRESENT, index, load_planes<NBITS>(planes));
    else
        gathered = _mm512_maskz_permutex2var_epi8(PRESENT, load_planes<4>(planes), index,
                                                  load_planes<NBITS - 4>(planes + 4 * PLANE));
    return bits<Bytes>(
        _mm512_gf2p8affine_epi64_epi8(_mm512_set1_epi64(0x8040201008040201), gathered, 0));
#else
    Bytes select, value = {};
    for (int i = 0; i < BYTES; ++i) select[i] = static_cast<uint8_t>(1 << i % 8);
    for (int plane = 0; plane < NBITS; ++plane) {
        const uint8_t* from = planes + PLANE * plane + BYTES / 8 * part;
#if defined(__AVX2__)
        const __m256i spread = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
        const Bytes word = bits<Bytes>(_mm256_shuffle_epi8(_mm256_set1_epi32(load<int32_t>(from)), spread));
#else
        typedef uint64_t Pair __attribute__((vector_size(16)));
        const Bytes word = bits<Bytes>(Pair{from[0] * 0x0101010101010101u, from[1] * 0x0101010101010101u});
#endif
        const uint8_t worth = static_cast<uint8_t>(1 << plane);
        value |= bits<Bytes>((word & select) == select) & worth;
    }
    return value;
#endif
}

// Bytes, or pairs of bytes, of a and b in turn: the first and the second half of each 16 bytes.
INLINE Bytes bytes_low(Bytes a, Bytes b) {
#if defined(__AVX512BW__)
    return bits<Bytes>(_mm512_unpacklo_epi8(bits<__m512i>(a), bits<__m512i>(b)));
#elif defined(__AVX2__)
    return bits<Bytes>(_mm256_unpacklo_epi8(bits<__m256i>(a), bits<__m256i>(b)));
#else
    typedef int8_t Places __attribute__((vector_size(16)));
    return SHUFFLE(Bytes, Places, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#endif
}

INLINE Bytes bytes_high(Bytes a, Bytes b) {
#if defined(__AVX512BW__)
    return bits<Bytes>(_mm512_unpackhi_epi8(bits<__m512i>(a), bits<__m512i>(b)));
#elif defined(__AVX2__)
    return bits<Bytes>(_mm256_unpackhi_epi8(bits<__m256i>(a), bits<__m256i>(b)));
#else
    typedef int8_t Places __attribute__((vector_size(16)));
    return SHUFFLE(Bytes, Places, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#endif
}

INLINE Bytes pairs_low(Bytes a, Bytes b) {
#if defined(__AVX512BW__)
    return bits<Bytes>(_mm512_unpacklo_epi16(bits<__m512i>(a), bits<__m512i>(b)));
#elif defined(__AVX2__)
    return bits<Bytes>(_mm256_unpacklo_epi16(bits<__m256i>(a), bits<__m256i>(b)));
#else
    return bits<Bytes>(SHUFFLE(Shorts, Shorts, bits<Shorts>(a), bits<Shorts>(b), 0, 8, 1, 9, 2, 10, 3, 11));
#endif
}

INLINE Bytes pairs_high(Bytes a, Bytes b) {
#if defined(__AVX512BW__)
    return bits<Bytes>(_mm512_unpackhi_epi16(bits<__m512i>(a), bits<__m512i>(b)));
#elif defined(__AVX2__)
    return bits<Bytes>(_mm256_unpackhi_epi16(bits<__m256i>(a), bits<__m256i>(b)));
#else
    return bits<Bytes>(SHUFFLE(Shorts, Shorts, bits<Shorts>(a), bits<Shorts>(b), 4, 12, 5, 13, 6, 14, 7, 15));
#endif
}

// Four components' codes, BYTES tokens each, as vectors with the four codes of a token in a lane, in the order that
// `in_order` undoes.
INLINE void interleave(const Bytes (&from)[4], Bytes* to) {
    const Bytes ab0 = bytes_low(from[0], from[1]), ab1 = bytes_high(from[0], from[1]);
    const Bytes cd0 = bytes_low(from[2], from[3]), cd1 = bytes_high(from[2], from[3]);
    to[0] = pairs_low(ab0, cd0);
    to[1] = pairs_high(ab0, cd0);
    to[2] = pairs_low(ab1, cd1);
    to[3] = pairs_high(ab1, cd1);
}

// What was found of `interleave`'s four vectors, as the tokens follow each other.
INLINE void in_order(const Floats* from, Floats* to) {
#if defined(__AVX512BW__)
    const __m512 a = bits<__m512>(from[0]), b = bits<__m512>(from[1]);
    const __m512 c = bits<__m512>(from[2]), d = bits<__m512>(from[3]);
    const __m512 ab0 = _mm512_shuffle_f32x4(a, b, 0x44), ab1 = _mm512_shuffle_f32x4(a, b, 0xee);
    const __m512 cd0 = _mm512_shuffle_f32x4(c, d, 0x44), cd1 = _mm512_shuffle_f32x4(c, d, 0xee);
    to[0] = bits<Floats>(_mm512_shuffle_f32x4(ab0, cd0, 0x88));
    to[1] = bits<Floats>(_mm512_shuffle_f32x4(ab0, cd0, 0xdd));
    to[2] = bits<Floats>(_mm512_shuffle_f32x4(ab1, cd1, 0x88));
    to[3] = bits<Floats>(_mm512_shuffle_f32x4(ab1, cd1, 0xdd));
#elif defined(__AVX2__)
    const __m256 a = bits<__m256>(from[0]), b = bits<__m256>(from[1]);
    const __m256 c = bits<__m256>(from[2]), d = bits<__m256>(from[3]);
    to[0] = bits<Floats>(_mm256_permute2f128_ps(a, b, 0x20));
    to[1] = bits<Floats>(_mm256_permute2f128_ps(c, d, 0x20));
    to[2] = bits<Floats>(_mm256_permute2f128_ps(a, b, 0x31));
    to[3] = bits<Floats>(_mm256_permute2f128_ps(c, d, 0x31));
#else
    for (int i = 0; i < 4; ++i) to[i] = from[i];
#endif
}

// Weights are integers of 15 bits and a sign, in two rows of lanes: the high and the low bytes of four where the
// processor multiplies bytes, else the even and the odd ones of four. So both rows have a lane for every four.
constexpr float FULL = 32639.0f;  // the largest: 127 * 256 + 127

INLINE void store_weights(Ints whole, int32_t* first, int32_t* second) {
#if defined(__AVX512VNNI__)
    const Ints high = (whole + 128) >> 8;
    store(first, __builtin_convertvector(high, QuarterBytes));
    store(second, __builtin_convertvector(whole - (high << 8), QuarterBytes));
#else
    const HalfShorts narrow = __builtin_convertvector(whole, HalfShorts);
#if defined(__AVX2__)
    const HalfShorts split = SHUFFLE(HalfShorts, HalfShorts, narrow, narrow, 0, 2, 4, 6, 1, 3, 5, 7);
#else
    const HalfShorts split = SHUFFLE(HalfShorts, HalfShorts, narrow, narrow, 0, 2, 1, 3);
#endif
    std::memcpy(first, &split, BYTES / 4);
    std::memcpy(second, reinterpret_cast<const char*>(&split) + BYTES / 4, BYTES / 4);
#endif
}

// Codes ready to be multiplied with weights.
struct Codes {
#if defined(__AVX512VNNI__)
    Bytes all;
    INLINE Codes of(Bytes codes) { return {codes}; }
#else
    Shorts even, odd;
    INLINE Codes of(Bytes codes) {
        typedef uint16_t Pairs __attribute__((vector_size(BYTES)));
        return {bits<Shorts>(codes) & 255, bits<Shorts>(bits<Pairs>(codes) >> 8)};
    }
#endif
};

// total + a[2i] * b[2i] + a[2i+1] * b[2i+1]
INLINE Ints add_products(Ints total, Shorts a, Shorts b) {
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

// Sums of products of codes with weights, lane by lane.
struct Sums {
#if defined(__AVX512VNNI__)
    Ints high, low;
    INLINE void add(Sums& sums, const Codes& codes, Ints first, Ints second) {
        sums.high = bits<Ints>(_mm512_dpbusd_epi32(bits<__m512i>(sums.high), bits<__m512i>(codes.all), bits<__m512i>(first)));
        sums.low = bits<Ints>(_mm512_dpbusd_epi32(bits<__m512i>(sums.low), bits<__m512i>(codes.all), bits<__m512i>(second)));
    }
    INLINE Floats total(const Sums& sums) { return to_floats(sums.high) * 256.0f + to_floats(sums.low); }
#else
    Ints both;
    INLINE void add(Sums& sums, const Codes& codes, Ints first, Ints second) {
        sums.both = add_products(add_products(sums.both, codes.even, bits<Shorts>(first)), codes.odd, bits<Shorts>(second));
    }
    INLINE Floats total(const Sums& sums) { return to_floats(sums.both); }
#endif
};

}  // namespace spectral
