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

// Where a token's code begins, counted in bits from the beginning of the tile; of the trellis its window, which ends with
// the token's own bits and may begin in the byte before the tile.
constexpr int first_bit(int token, int nbits) {
    return nbits <= MAX_TRELLIS_NBITS ? (token + 1) * nbits - 8 : token * nbits;
}

// The token of each byte of a vector: in order or, for `IN_QUADS`, so that the bytes of four components, woven together
// in lanes of 128 bits, come to lie by token.
template <bool IN_QUADS>
constexpr int token_at(int place) {
    constexpr int PIECES = BYTES / 16;  // of 128 bits
    return IN_QUADS ? 4 * PIECES * (place % 16 / 4) + 4 * (place / 16) + place % 4 : place;
}

#if defined(SHUFFLES_BYTES)
#if defined(__AVX512BW__)
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
                const int bit = first_bit(first_token, NBITS) + 8, first_byte = bit / 8 - 1;
                for (int i = 0; i < 4; ++i) {
                    bytes[part][4 * group + i] = static_cast<uint8_t>((first_byte + i) & 63);
                    shifts[part][4 * group + i] = static_cast<uint8_t>(bit % 8 + i * NBITS + (group % 2 ? 32 : 0));
                }
            }
    }
};

// Eight bits for each code of the part'th part of a tile, the lowest of them its own.
template <int NBITS, bool IN_QUADS>
INLINE Bytes cut_out(const uint8_t* stream, uint8_t carry, int part) {
    static constexpr Cut<NBITS, IN_QUADS> cut{};
    const __m512i gather = _mm512_load_si512(cut.bytes[part]), shift = _mm512_load_si512(cut.shifts[part]);
    __m512i bytes;
    if constexpr (NBITS <= MAX_TRELLIS_NBITS) {
        bytes = load_bytes<NBITS * ROW>(stream);
        if (part == 0) bytes = _mm512_mask_set1_epi8(bytes, 1ull << 63, static_cast<char>(carry));
    } else {
        bytes = load_bytes<NBITS * 8>(stream + part * NBITS * 8);
    }
    return bits<Bytes>(_mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(gather, bytes)));
}
#else
// How the codes of a tile are cut out of its stream: two bytes for each token in the order of `upper_bytes`, eight
// tokens in 128 bits, whose bytes all lie in the 16 from `from` on; a multiplication that shifts a code's bits to the
// upper byte. Of codes of the trellis the first window begins in the carry, which stands at the end of each piece of the
// first part.
template <int NBITS, bool IN_QUADS>
struct Cut {
    static constexpr int PIECES = BYTES / 16;
    int from[PARTS][2][PIECES];
    alignas(BYTES) uint8_t bytes[PARTS][2][BYTES];
    alignas(BYTES) uint16_t factors[2][BYTES / 2];

    constexpr Cut() : from(), bytes(), factors() {
        for (int part = 0; part < PARTS; ++part)
            for (int half = 0; half < 2; ++half)
                for (int piece = 0; piece < PIECES; ++piece) {
                    const auto bit = [&](int i) {
                        return first_bit(part * BYTES + token_at<IN_QUADS>(16 * piece + 8 * half + i), NBITS) + 8;
                    };
                    const int first = bit(0) / 8 - 1, most = NBITS * ROW - 16;
                    const int place = first < 0 ? 0 : first > most ? most : first;
                    from[part][half][piece] = place;
                    for (int i = 0; i < 8; ++i) {
                        const int byte = bit(i) / 8 - 1 - place, slot = 16 * piece + 2 * i;
                        bytes[part][half][slot] = static_cast<uint8_t>(byte < 0 ? 15 : byte);
                        // Behind the last byte no bit is needed.
                        bytes[part][half][slot + 1] = static_cast<uint8_t>(byte + 1 > 15 ? 15 : byte + 1);
                        factors[half][8 * piece + i] = static_cast<uint16_t>(256 >> bit(i) % 8);
                    }
                }
    }
};

// Eight bits for each code of the part'th part of a tile, the lowest of them its own.
template <int NBITS, bool IN_QUADS>
INLINE Bytes cut_out(const uint8_t* stream, uint8_t carry, int part) {
    static constexpr Cut<NBITS, IN_QUADS> cut{};
    Pairs halves[2];
    for (int half = 0; half < 2; ++half) {
        Bytes bytes = load_pieces(stream, cut.from[part][half]);
        if (NBITS <= MAX_TRELLIS_NBITS && part == 0)
            for (int last = 15; last < BYTES; last += 16) bytes[last] = carry;
        const Bytes pairs = shuffle_pieces(bytes, load<Bytes>(cut.bytes[part][half]));
        halves[half] = bits<Pairs>(pairs) * load<Pairs>(cut.factors[half]);
    }
    return upper_bytes(halves[0], halves[1]);
}
#endif
#endif

// The table of one width, as the two parts that its entries are sums of. Codes are entries plus 128, or the entries
// themselves for `is_signed`.
struct Table {
#if defined(SHUFFLES_BYTES)
    Bytes first, second;  // for AVX-512 each number of `first` four times, as bits 2 to 5 of a window name it

    Table(const int8_t* parts, int nbits, bool is_signed) {
        const int8_t* from = parts + (nbits - 1) * 32;
        const uint8_t zero = is_signed ? 0 : 128;
        first = repeat_piece(from) + zero;
        second = repeat_piece(from + 16);
#if defined(__AVX512BW__)
        uint8_t places[BYTES];
        for (int i = 0; i < BYTES; ++i) places[i] = static_cast<uint8_t>(i / 4);
        first = shuffle_bytes(first, load<Bytes>(places));
#endif
    }
    Bytes codes(Bytes windows) const {
#if defined(__AVX512BW__)
        return shuffle_bytes(first, windows) + shuffle_pieces(second, folded(windows));
#else
        const Pairs pairs = bits<Pairs>(windows);
        const Bytes places = bits<Bytes>(pairs >> 2) & 15, other_places = (windows ^ bits<Bytes>(pairs >> 4)) & 15;
        return shuffle_pieces(first, places) + shuffle_pieces(second, other_places);
#endif
    }
#else
    const int8_t *first, *second;
    int zero;

    Table(const int8_t* parts, int nbits, bool is_signed)
        : first(parts + (nbits - 1) * 32), second(first + 16), zero(is_signed ? 0 : 128) {}
    uint8_t code(uint8_t window) const {
        return static_cast<uint8_t>(first[window >> 2 & 15] + second[(window ^ window >> 4) & 15] + zero);
    }
#endif
};

// The table of `nbits` among those of 1 bit and more. Codes of more bits than the trellis has need none: any will do.
INLINE const Table& table_of(const Table* tables, int nbits) {
    return tables[nbits <= MAX_TRELLIS_NBITS ? nbits - 1 : 0];
}

// The BYTES codes of the part'th part of a tile's stream, which goes on from `carry`.
template <int NBITS, bool IN_QUADS>
INLINE Bytes read_codes(const Table& table, const uint8_t* stream, uint8_t carry, int part) {
#if defined(SHUFFLES_BYTES)
    const Bytes eight_bits = cut_out<NBITS, IN_QUADS>(stream, carry, part);
    return NBITS <= MAX_TRELLIS_NBITS ? table.codes(eight_bits) : eight_bits & static_cast<uint8_t>((1 << NBITS) - 1);
#else
    // Eight tokens at a time: their windows begin within seven times NBITS bits.
    uint8_t codes[BYTES];
    for (int group = 0; group < BYTES / 8; ++group) {
        const int byte = (part * BYTES / 8 + group) * NBITS;
        uint64_t bits = 0;
        if constexpr (NBITS <= MAX_TRELLIS_NBITS) {
            for (int i = 0; i < NBITS; ++i) bits |= static_cast<uint64_t>(stream[byte + i]) << (8 + 8 * i);
            bits |= byte ? stream[byte - 1] : carry;
            for (int i = 0; i < 8; ++i) codes[8 * group + i] = table.code(bits >> (NBITS * (i + 1)) & 255);
        } else {
            std::memcpy(&bits, stream + byte, NBITS);
            for (int i = 0; i < 8; ++i) codes[8 * group + i] = bits >> (NBITS * i) & ((1 << NBITS) - 1);
        }
    }
    return load<Bytes>(codes);
#endif
}

#if defined(__AVX512BW__)
// How the codes of four components, of 1 or 2 bits and 16 tokens, are cut out of their streams, which lie one behind the
// other: for each eight codes, those of two tokens, two bytes of each stream. The windows of the first 16 tokens may
// begin in the carries, which stand in the last four of 128 bytes there.
template <int NBITS>
struct WovenCut {
    alignas(64) uint8_t bytes[VECTORS][64];
    alignas(64) uint8_t shifts[64];

    constexpr WovenCut() : bytes(), shifts() {
        for (int v = 0; v < VECTORS; ++v)
            for (int i = 0; i < 64; ++i) {
                const int component = i % 8 / 2, bit = first_bit(16 * v + 2 * (i / 8), NBITS) + 8;
                const int byte = bit / 8 - 1 + i % 2;
                bytes[v][i] = static_cast<uint8_t>(byte < 0 ? 124 + component : component * NBITS * ROW + byte);
            }
        // In the order of quads: the components of the first token, then those of the second.
        for (int i = 0; i < 64; ++i)
            shifts[i] = static_cast<uint8_t>(i % 4 * 16 + (first_bit(2 * (i / 8), NBITS) + 8) % 8 + i % 8 / 4 * NBITS);
    }
};

// The codes of four components with NBITS in a tile, four to a lane, [VECTORS] by token.
template <int NBITS>
INLINE void read_woven(const Table& table, const uint8_t* streams, const uint8_t* carry, int stride, Bytes* to) {
    static_assert(NBITS <= 2, "two tokens' windows lie in two bytes");
    static constexpr WovenCut<NBITS> cut{};
    const __m512i shifts = _mm512_load_si512(cut.shifts);
    const __m512i low = load<__m512i>(streams), high = NBITS == 2 ? load<__m512i>(streams + 64) : low;
    uint8_t carries[4];
    for (int k = 0; k < 4; ++k) carries[k] = carry[k * stride];
    int32_t together;
    std::memcpy(&together, carries, 4);
    const __m512i with_carries = _mm512_mask_set1_epi32(high, 1 << 15, together);
    for (int v = 0; v < VECTORS; ++v) {
        const __m512i places = _mm512_load_si512(cut.bytes[v]);
        const __m512i bytes = v && NBITS == 1 ? _mm512_permutexvar_epi8(places, low)
                                              : _mm512_permutex2var_epi8(low, places, v ? high : with_carries);
        to[v] = table.codes(bits<Bytes>(_mm512_multishift_epi64_epi8(shifts, bytes)));
    }
}
#endif

// Where one component's stream lies in a tile, and what it goes on from.
struct Stream {
    const uint8_t* bytes;
    uint8_t carry;
    uint8_t nbits;  // 0 for none: all codes are zero
};

// The codes of one component in a tile, in the order of quads. `tables` are those of 1 bit and more.
INLINE void read_tile(const Table* tables, const Stream& stream, Bytes* to) {
    if (!stream.nbits) {
        for (int part = 0; part < PARTS; ++part) to[part] = Bytes{};
        return;
    }
    with_nbits(stream.nbits, [&](auto constant) {
        constexpr int NBITS = decltype(constant)::value;
        const Table& table = table_of(tables, NBITS);
        for (int part = 0; part < PARTS; ++part)
            to[part] = read_codes<NBITS, true>(table, stream.bytes, stream.carry, part);
    });
}

// The codes of four components in a tile, four to a lane, [VECTORS] by token.
INLINE void read_quad(const Table* tables, const Stream* streams, Bytes* to) {
    Bytes apart[4][PARTS];
    for (int k = 0; k < 4; ++k) read_tile(tables, streams[k], apart[k]);
    for (int part = 0; part < PARTS; ++part)
        weave(apart[0][part], apart[1][part], apart[2][part], apart[3][part], to + 4 * part);
}

}  // namespace
}  // namespace spectral
