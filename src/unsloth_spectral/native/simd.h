// Vectors as wide as the processor's registers, and the few operations on them that compilers do not generate well.
//
// Everything else uses the vector extensions of GCC and Clang, so one source serves AVX-512, AVX2, NEON and others.
// Each library is this source, compiled for one of them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
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
typedef uint16_t Pairs __attribute__((vector_size(BYTES)));
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

INLINE Ints broadcast(int32_t value) { return Ints{} + value; }

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

// The larger of a and b in each lane; b if either is not a number.
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
    float most = v[0];
    for (int lane = 1; lane < LANES; ++lane) most = v[lane] > most ? v[lane] : most;
    return most;
#endif
}

// The sums of LANES vectors, one per lane, with a quarter of the work of single sums.
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

// LANES bytes as integers.
INLINE Ints widen(const uint8_t* from) {
#if defined(__AVX512BW__)
    return bits<Ints>(_mm512_cvtepu8_epi32(load<__m128i>(from)));
#elif defined(__AVX2__)
    return bits<Ints>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
    return __builtin_convertvector(load<QuarterLevels>(from), Ints);
#endif
}

INLINE Floats magnitude(Floats x) { return bits<Floats>(bits<Words>(x) & 0x7fffffffu); }

// The nearest integers of numbers between -32768 and 32767; an arbitrary integer for NaN.
INLINE Ints rounded(Floats x) {
#if defined(__AVX512BW__)
    return bits<Ints>(_mm512_cvtps_epi32(bits<__m512>(x)));
#elif defined(__AVX2__)
    return bits<Ints>(_mm256_cvtps_epi32(bits<__m256>(x)));
#else
    // Shifted to be positive, so that dropping the fraction rounds down.
    return bits<Ints>(bits<Words>(__builtin_convertvector(x + 32768.5f, Ints)) - 32768u);
#endif
}

// 2^x for x between -0.5 and 0.5 with a relative error of 1e-7, by the minimax polynomial.
INLINE Floats power_of_two(Floats x) {
    Floats power = all(1.3276472e-3f);
    power = power * x + 9.6755415e-3f;
    power = power * x + 5.5507133e-2f;
    power = power * x + 2.4022120e-1f;
    power = power * x + 6.9314697e-1f;
    return power * x + 1.0000001f;
}

// e^x with a relative error of about 1e-7, for x up to 88; 0 far below -87, NaN for NaN.
INLINE Floats exponential(Floats x) {
    constexpr float OCTAVES = 1.44269504088896341f;
#if defined(__AVX512BW__)
    const __m512 octaves = bits<__m512>(larger(all(-200.0f), x * OCTAVES));
    const __m512 whole = _mm512_roundscale_ps(octaves, 0);
    const Floats power = power_of_two(bits<Floats>(_mm512_sub_ps(octaves, whole)));
    // Zero instead of denormal numbers, which take many times as long. NaN passes, because no comparison holds for it.
    const __mmask16 is_normal = _mm512_cmp_ps_mask(octaves, _mm512_set1_ps(-125.5f), _CMP_NLT_UQ);
    return bits<Floats>(_mm512_maskz_scalef_ps(is_normal, bits<__m512>(power), whole));
#else
    const Floats octaves = choose(x < all(-87.0f), all(-87.0f), x) * OCTAVES;
    const Floats shifted = octaves + 12582912.0f;  // 1.5 * 2^23: rounds to an integer that sits in the low bits
    const Floats power = power_of_two(octaves - (shifted - 12582912.0f));
    const Floats scaled = bits<Floats>(bits<Ints>(power) + (bits<Ints>(shifted) << 23));
    return choose(x < all(-87.0f), Floats{}, choose(x == x, scaled, x));
#endif
}

// Pieces are 128 bits long: registers shuffle bytes within them.
#if defined(__AVX512BW__) || defined(__AVX2__) || defined(__aarch64__)
#define SHUFFLES_BYTES

// In each piece, the bytes of `from` at `places`, 0 to 15.
INLINE Bytes shuffle_pieces(Bytes from, Bytes places) {
#if defined(__AVX512BW__)
    return bits<Bytes>(_mm512_shuffle_epi8(bits<__m512i>(from), bits<__m512i>(places)));
#elif defined(__AVX2__)
    return bits<Bytes>(_mm256_shuffle_epi8(bits<__m256i>(from), bits<__m256i>(places)));
#else
    return bits<Bytes>(vqtbl1q_u8(bits<uint8x16_t>(from), bits<uint8x16_t>(places)));
#endif
}

// The piece at `from` in every place.
INLINE Bytes repeat_piece(const int8_t* from) {
#if defined(__AVX512BW__)
    return bits<Bytes>(_mm512_broadcast_i32x4(load<__m128i>(from)));
#elif defined(__AVX2__)
    return bits<Bytes>(_mm256_broadcastsi128_si256(load<__m128i>(from)));
#else
    return load<Bytes>(from);
#endif
}

#if defined(__AVX512BW__)
// The bytes of `from` at the places that the lower six bits of `places` name.
INLINE Bytes shuffle_bytes(Bytes from, Bytes places) {
    return bits<Bytes>(_mm512_permutexvar_epi8(bits<__m512i>(places), bits<__m512i>(from)));
}

// The lower four bits of each byte, exclusive-or the upper ones.
INLINE Bytes folded(Bytes x) {
    // Row i of the matrix, from its highest byte on, names the bits whose parity bit i is.
    return bits<Bytes>(_mm512_gf2p8affine_epi64_epi8(bits<__m512i>(x), _mm512_set1_epi64(0x1122448800000000), 0));
}
#else
// The pieces that begin at `places`.
INLINE Bytes load_pieces(const uint8_t* from, const int* places) {
#if defined(__AVX2__)
    const __m256i first = _mm256_castsi128_si256(load<__m128i>(from + places[0]));
    return bits<Bytes>(_mm256_inserti128_si256(first, load<__m128i>(from + places[1]), 1));
#else
    return load<Bytes>(from + places[0]);
#endif
}

// The upper bytes of two vectors of pairs, in each piece those of `first` and then those of `second`.
INLINE Bytes upper_bytes(Pairs first, Pairs second) {
#if defined(__AVX2__)
    return bits<Bytes>(_mm256_packus_epi16(bits<__m256i>(first >> 8), bits<__m256i>(second >> 8)));
#else
    return bits<Bytes>(vuzp2q_u8(bits<uint8x16_t>(first), bits<uint8x16_t>(second)));
#endif
}
#endif
#endif

// Bytes of four vectors woven together, one of each to a lane, piece by piece.
INLINE void weave(Bytes a, Bytes b, Bytes c, Bytes d, Bytes* to) {
#if defined(__AVX512BW__)
    const __m512i ab_low = _mm512_unpacklo_epi8(bits<__m512i>(a), bits<__m512i>(b));
    const __m512i ab_high = _mm512_unpackhi_epi8(bits<__m512i>(a), bits<__m512i>(b));
    const __m512i cd_low = _mm512_unpacklo_epi8(bits<__m512i>(c), bits<__m512i>(d));
    const __m512i cd_high = _mm512_unpackhi_epi8(bits<__m512i>(c), bits<__m512i>(d));
    to[0] = bits<Bytes>(_mm512_unpacklo_epi16(ab_low, cd_low));
    to[1] = bits<Bytes>(_mm512_unpackhi_epi16(ab_low, cd_low));
    to[2] = bits<Bytes>(_mm512_unpacklo_epi16(ab_high, cd_high));
    to[3] = bits<Bytes>(_mm512_unpackhi_epi16(ab_high, cd_high));
#elif defined(__AVX2__)
    const __m256i ab_low = _mm256_unpacklo_epi8(bits<__m256i>(a), bits<__m256i>(b));
    const __m256i ab_high = _mm256_unpackhi_epi8(bits<__m256i>(a), bits<__m256i>(b));
    const __m256i cd_low = _mm256_unpacklo_epi8(bits<__m256i>(c), bits<__m256i>(d));
    const __m256i cd_high = _mm256_unpackhi_epi8(bits<__m256i>(c), bits<__m256i>(d));
    to[0] = bits<Bytes>(_mm256_unpacklo_epi16(ab_low, cd_low));
    to[1] = bits<Bytes>(_mm256_unpackhi_epi16(ab_low, cd_low));
    to[2] = bits<Bytes>(_mm256_unpacklo_epi16(ab_high, cd_high));
    to[3] = bits<Bytes>(_mm256_unpackhi_epi16(ab_high, cd_high));
#else
    const Bytes apart[4] = {a, b, c, d};
    uint8_t woven[4 * BYTES];
    for (int t = 0; t < BYTES; ++t)
        for (int k = 0; k < 4; ++k) woven[4 * t + k] = apart[k][t];
    std::memcpy(to, woven, sizeof woven);
#endif
}

constexpr int TILE = 128;             // tokens that share scales and lie together in memory
constexpr int MAX_TRELLIS_NBITS = 4;  // wider codes are uniform
constexpr int ROW = TILE / 8;         // bytes that one bit of a code takes in a tile
constexpr int PARTS = TILE / BYTES;   // vectors of a tile with a byte per token
constexpr int VECTORS = TILE / LANES; // vectors of a tile with a number per token

#if defined(__AVX512BW__)
// Loads COUNT bytes, a multiple of 8 up to 64, with zeros behind.
template <int COUNT>
INLINE __m512i load_bytes(const uint8_t* from) {
    if constexpr (COUNT == 16) return _mm512_zextsi128_si512(load<__m128i>(from));
    if constexpr (COUNT == 32) return _mm512_zextsi256_si512(load<__m256i>(from));
    if constexpr (COUNT == 64) return load<__m512i>(from);
    return _mm512_maskz_loadu_epi64(static_cast<__mmask8>((1 << COUNT / 8) - 1), from);
}
#endif

// Calls function(constant) with nbits, 1 to 8, as a compile-time constant.
template <typename Function>
INLINE void with_nbits(int nbits, const Function& function) {
    switch (nbits) {
        case 1: return function(std::integral_constant<int, 1>());
        case 2: return function(std::integral_constant<int, 2>());
        case 3: return function(std::integral_constant<int, 3>());
        case 4: return function(std::integral_constant<int, 4>());
        case 5: return function(std::integral_constant<int, 5>());
        case 6: return function(std::integral_constant<int, 6>());
        case 7: return function(std::integral_constant<int, 7>());
        default: return function(std::integral_constant<int, 8>());
    }
}

// Weights are integers of 15 bits and a sign, stored in two rows with a lane for every four weights: their high and
// their low bytes if the processor multiplies bytes, else the even and the odd weights.
constexpr float FULL = 32639.0f;  // the largest weight: 127 * 256 + 127

INLINE void store_weights(Ints whole, int32_t* first, int32_t* second) {
#if defined(__AVX512VNNI__)
    // The low byte is signed.
    store(first, __builtin_convertvector((whole + 128) >> 8, QuarterBytes));
    store(second, __builtin_convertvector(whole, QuarterBytes));
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

// Codes of few bits have so much error that the high bytes of their weights suffice, which halves the work if the
// processor multiplies bytes. Otherwise nothing would be saved.
#if defined(__AVX512VNNI__)
constexpr int ROUGH_NBITS = 3;
#else
constexpr int ROUGH_NBITS = 0;
#endif

// What stands for the largest weight of rough codes, in the weights' high bytes.
constexpr float FULL_ROUGH = 127.0f;

// Codes in the form for products with weights.
struct Codes {
#if defined(__AVX512VNNI__)
    Bytes all;
    INLINE Codes of(Bytes codes) { return {codes}; }
#else
    Shorts even, odd;
    INLINE Codes of(Bytes codes) {
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

#if defined(__AVX512VNNI__)
// total + products of four bytes each, signed times unsigned.
INLINE Ints add_byte_products(Ints total, Ints with_sign, Bytes without) {
    return bits<Ints>(_mm512_dpbusd_epi32(bits<__m512i>(total), bits<__m512i>(without), bits<__m512i>(with_sign)));
}
#endif

// Sums of products of codes and weights, lane by lane.
struct Sums {
#if defined(__AVX512VNNI__)
    Ints high, low;
    INLINE void add(Sums& sums, const Codes& codes, Ints first, Ints second) {
        sums.high = add_byte_products(sums.high, first, codes.all);
        sums.low = add_byte_products(sums.low, second, codes.all);
    }
    INLINE Floats total(const Sums& sums) { return to_floats(sums.high) * 256.0f + to_floats(sums.low); }
    INLINE Ints whole(const Sums& sums) { return sums.high * 256 + sums.low; }
#else
    Ints both;
    INLINE void add(Sums& sums, const Codes& codes, Ints first, Ints second) {
        sums.both = add_products(sums.both, codes.even, bits<Shorts>(first));
        sums.both = add_products(sums.both, codes.odd, bits<Shorts>(second));
    }
    INLINE Floats total(const Sums& sums) { return to_floats(sums.both); }
    INLINE Ints whole(const Sums& sums) { return sums.both; }
#endif
};

// Byte weights, 0 to 255. The largest leaves room for the rounding errors of earlier ones.
constexpr float FULL_BYTE = 254.0f;

INLINE void store_byte_weights(Ints whole, int32_t* to) { store(to, __builtin_convertvector(whole, QuarterBytes)); }

}  // namespace spectral
