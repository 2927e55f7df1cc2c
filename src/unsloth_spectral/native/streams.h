// Codes from streams (codec/spectral/packing.py): bytes that stand for what a token's window names.
//
// A code is unsigned: of the trellis the entry plus 128, else the stored number.
#pragma once

#include <cstdint>

#include "simd.h"

namespace spectral {
namespace {

// The code of zero.
INLINE float zero_code(int nbits) {
    return nbits <= MAX_TRELLIS_NBITS ? 128.0f : 0.5f * static_cast<float>((1 << nbits) - 1);
}

#if defined(__AVX512BW__)
// The token of each of the 64 bytes of the part'th half of a tile: in order or, for `IN_QUADS`, so that the bytes of four
// components, woven together in lanes of 128 bits, come to lie by token.
template <bool IN_QUADS>
constexpr int token_at(int place) {
    return IN_QUADS ? 16 * (place % 16 / 4) + 4 * (place / 16) + place % 4 : place;
}

// How 64 codes are cut out of a tile's stream: bytes gathered for each group of eight codes, two by two, and the bits at
// which the codes begin in these. Of codes of the trellis the first part's first window begins in byte 63, the carry.
template <int NBITS, bool IN_QUADS>
struct Cut {
    alignas(64) uint8_t bytes[2][64];
    alignas(64) uint8_t shifts[2][64];

    constexpr Cut() : bytes(), shifts() {
        for (int part = 0; part < 2; ++part)
            for (int group = 0; group < 16; ++group) {
                // From 5 bits on a part is loaded by itself.
                const int first_token = token_at<IN_QUADS>(4 * group) + (NBITS <= MAX_TRELLIS_NBITS ? 64 * part : 0);
                const int window = NBITS <= MAX_TRELLIS_NBITS ? 8 - NBITS : 0;
                const int first_bit = first_token * NBITS - window + 8, first_byte = first_bit / 8 - 1;
                for (int i = 0; i < 4; ++i) {
                    bytes[part][4 * group + i] = static_cast<uint8_t>((first_byte + i) & 63);
                    shifts[part][4 * group + i] =
                        static_cast<uint8_t>(first_bit % 8 + i * NBITS + (group % 2 ? 32 : 0));
                }
            }
    }
};
#endif

// The table of one width, ready to be looked up; SIGNED for the entries themselves.
template <int NBITS, bool SIGNED>
struct Table {
#if defined(__AVX512BW__)
    __m512i quarters[4];

    explicit Table(const uint8_t* codes) {
        for (int i = 0; i < 4 && NBITS <= MAX_TRELLIS_NBITS; ++i) {
            quarters[i] = load<__m512i>(codes + ((NBITS - 1) * 256 + 64 * i));
            if (SIGNED) quarters[i] = _mm512_xor_si512(quarters[i], _mm512_set1_epi8(static_cast<char>(128)));
        }
    }
#else
    const uint8_t* codes;

    explicit Table(const uint8_t* of_widths) : codes(NBITS <= MAX_TRELLIS_NBITS ? of_widths + (NBITS - 1) * 256 : nullptr) {}
#endif
};

// The BYTES codes of the part'th part of a tile's stream, which goes on from `carry`.
template <int NBITS, bool SIGNED, bool IN_QUADS>
INLINE Bytes read_codes(const Table<NBITS, SIGNED>& table, const uint8_t* stream, uint8_t carry, int part) {
#if defined(__AVX512BW__)
    static constexpr Cut<NBITS, IN_QUADS> cut{};
    const __m512i gather = _mm512_load_si512(cut.bytes[part]), shift = _mm512_load_si512(cut.shifts[part]);
    if constexpr (NBITS <= MAX_TRELLIS_NBITS) {
        __m512i bytes = load_bytes<NBITS * ROW>(stream);
        if (part == 0) bytes = _mm512_mask_set1_epi8(bytes, 1ull << 63, static_cast<char>(carry));
        const __m512i windows = _mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(gather, bytes));
        const __m512i low = _mm512_permutex2var_epi8(table.quarters[0], windows, table.quarters[1]);
        const __m512i high = _mm512_permutex2var_epi8(table.quarters[2], windows, table.quarters[3]);
        return bits<Bytes>(_mm512_mask_blend_epi8(_mm512_movepi8_mask(windows), low, high));
    } else {
        const __m512i bytes = load_bytes<NBITS * 8>(stream + part * NBITS * 8);
        const __m512i cut_out = _mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(gather, bytes));
        return bits<Bytes>(_mm512_and_si512(cut_out, _mm512_set1_epi8(static_cast<char>((1 << NBITS) - 1))));
    }
#else
    // Eight tokens at a time: their windows begin within seven times NBITS bits.
    uint8_t codes[BYTES];
    for (int group = 0; group < BYTES / 8; ++group) {
        const int byte = (part * BYTES / 8 + group) * NBITS;
        uint64_t bits = 0;
        if constexpr (NBITS <= MAX_TRELLIS_NBITS) {
            for (int i = 0; i < NBITS; ++i) bits |= static_cast<uint64_t>(stream[byte + i]) << (8 + 8 * i);
            bits |= byte ? stream[byte - 1] : carry;
            for (int i = 0; i < 8; ++i) {
                const uint8_t code = table.codes[bits >> (NBITS * (i + 1)) & 255];
                codes[8 * group + i] = SIGNED ? code ^ 128 : code;
            }
        } else {
            std::memcpy(&bits, stream + byte, NBITS);
            for (int i = 0; i < 8; ++i) codes[8 * group + i] = bits >> (NBITS * i) & ((1 << NBITS) - 1);
        }
    }
    return load<Bytes>(codes);
#endif
}

// Where one component's stream lies in a tile, and what it goes on from.
struct Stream {
    const uint8_t* bytes;
    uint8_t carry;
    uint8_t nbits;  // 0 for none: all codes are zero
};

// The codes of one component in a tile, in the order of quads.
INLINE void read_tile(const uint8_t* tables, const Stream& stream, Bytes* to) {
    if (!stream.nbits) {
        for (int part = 0; part < PARTS; ++part) to[part] = Bytes{};
        return;
    }
    with_nbits(stream.nbits, [&](auto constant) {
        constexpr int NBITS = decltype(constant)::value;
        const Table<NBITS, false> table(tables);
        for (int part = 0; part < PARTS; ++part)
            to[part] = read_codes<NBITS, false, true>(table, stream.bytes, stream.carry, part);
    });
}

// The codes of four components in a tile, four to a lane, [VECTORS] by token.
INLINE void read_quad(const uint8_t* tables, const Stream* streams, Bytes* to) {
    Bytes apart[4][PARTS];
    for (int k = 0; k < 4; ++k) read_tile(tables, streams[k], apart[k]);
#if defined(__AVX512BW__)
    for (int part = 0; part < PARTS; ++part) {
        const __m512i a = bits<__m512i>(apart[0][part]), b = bits<__m512i>(apart[1][part]);
        const __m512i c = bits<__m512i>(apart[2][part]), d = bits<__m512i>(apart[3][part]);
        const __m512i ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
        const __m512i cd_low = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
        to[4 * part] = bits<Bytes>(_mm512_unpacklo_epi16(ab_low, cd_low));
        to[4 * part + 1] = bits<Bytes>(_mm512_unpackhi_epi16(ab_low, cd_low));
        to[4 * part + 2] = bits<Bytes>(_mm512_unpacklo_epi16(ab_high, cd_high));
        to[4 * part + 3] = bits<Bytes>(_mm512_unpackhi_epi16(ab_high, cd_high));
    }
#else
    uint8_t woven[4 * TILE];
    for (int k = 0; k < 4; ++k) {
        const uint8_t* from = reinterpret_cast<const uint8_t*>(apart[k]);
        for (int t = 0; t < TILE; ++t) woven[4 * t + k] = from[t];
    }
    std::memcpy(to, woven, sizeof woven);
#endif
}

}  // namespace
}  // namespace spectral
