// Products of matrices of bytes in the matrix registers of some processors (Intel's AMX), whose sums are exact.
#pragma once

#include <cstdint>

#include "simd.h"

#if defined(__AMX_INT8__)
#define MULTIPLIES_MATRICES

namespace spectral {
namespace {

constexpr int MOST_MATRIX_ROWS = 16;

// The compiler does not know what the registers' instructions read and write.
INLINE void keep_order() { asm volatile("" ::: "memory"); }

// The registers' shapes, for as long as this lives; other code may set its own shapes before and after.
//
// Registers 0 and 1 hold `rows` rows of 64 weights, 2 and 3 their sums for 16 tokens; 4 holds the codes of 16 quads of
// components and 16 tokens, or of 16 dimensions and 64 tokens; 5 the shares of 64 tokens in `rows` rows, and 6 and 7 the
// sums for 16 dimensions.
class MatrixRegisters {
   public:
    explicit MatrixRegisters(int rows) {
        struct alignas(64) {
            uint8_t palette = 1, first_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t num_rows[16] = {};
        } shapes;
        for (int i = 0; i < 8; ++i) {
            shapes.row_bytes[i] = static_cast<uint16_t>(i < 5 ? 64 : 4 * rows);
            shapes.num_rows[i] = static_cast<uint8_t>(i < 4 ? rows : 16);
        }
        asm volatile("" ::"r"(&shapes) : "memory");
        _tile_loadconfig(&shapes);
    }
    MatrixRegisters(const MatrixRegisters&) = delete;
    ~MatrixRegisters() { _tile_release(); }
};

// A register's numbers, [row][lane].
struct alignas(64) MatrixSums {
    int32_t numbers[MOST_MATRIX_ROWS * 16];
};

// Sums over 16 `blocks` quads of the products of two rows of weights each, [row, lane], `weights_stride` numbers apart,
// with codes of 16 tokens or columns of 16 components, whose quads lie `codes_stride` bytes apart.
INLINE void multiply_weights(const int32_t* first, const int32_t* second, int weights_stride, const void* codes,
                             int64_t codes_stride, int blocks, MatrixSums* sums) {
    keep_order();
    _tile_zero(2);
    _tile_zero(3);
    const auto* from = static_cast<const uint8_t*>(codes);
    for (int block = 0; block < blocks; ++block, from += 16 * codes_stride) {
        _tile_loadd(4, from, codes_stride);
        _tile_loadd(0, first + 16 * block, 4 * weights_stride);
        _tile_loadd(1, second + 16 * block, 4 * weights_stride);
        _tile_dpbsud(2, 0, 4);
        _tile_dpbsud(3, 1, 4);
    }
    _tile_stored(2, sums[0].numbers, 64);
    _tile_stored(3, sums[1].numbers, 64);
    keep_order();
}

// Sums over `parts` times 64 tokens of the products of codes of 16 dimensions, which lie `codes_stride` bytes apart, with
// shares [part, quad of tokens, row]: [dimension][row]. Rough shares are unsigned bytes and have one part, their codes are
// signed.
template <bool IS_ROUGH>
INLINE void multiply_shares(const Bytes* codes, int64_t codes_stride, const int32_t* first, const int32_t* second,
                            int rows, int parts, MatrixSums* sums) {
    keep_order();
    _tile_zero(6);
    _tile_zero(7);
    for (int part = 0; part < parts; ++part) {
        _tile_loadd(4, codes + part, codes_stride);
        _tile_loadd(5, first + part * 16 * rows, 4 * rows);
        if constexpr (IS_ROUGH) {
            _tile_dpbsud(6, 4, 5);
        } else {
            _tile_dpbusd(6, 4, 5);
            _tile_loadd(5, second + part * 16 * rows, 4 * rows);
            _tile_dpbusd(7, 4, 5);
        }
    }
    _tile_stored(6, sums[0].numbers, 4 * rows);
    if constexpr (!IS_ROUGH) _tile_stored(7, sums[1].numbers, 4 * rows);
    keep_order();
}

// Four rows of shares, `stride` numbers apart, of 64 tokens as [quad of tokens, `rows`]; quads in the order of `IN_QUADS`.
INLINE void interleave_shares(const int32_t* from, int64_t stride, int32_t* to, int rows) {
    __m512i a[4], b[4];
    for (int r = 0; r < 4; ++r) a[r] = load<__m512i>(from + r * stride);
    b[0] = _mm512_unpacklo_epi32(a[0], a[1]);
    b[1] = _mm512_unpackhi_epi32(a[0], a[1]);
    b[2] = _mm512_unpacklo_epi32(a[2], a[3]);
    b[3] = _mm512_unpackhi_epi32(a[2], a[3]);
    const __m512i c[4] = {_mm512_unpacklo_epi64(b[0], b[2]), _mm512_unpackhi_epi64(b[0], b[2]),
                          _mm512_unpacklo_epi64(b[1], b[3]), _mm512_unpackhi_epi64(b[1], b[3])};
    if (rows == 4) {
        for (int k = 0; k < 4; ++k) store(to + 16 * k, c[k]);
        return;
    }
    for (int k = 0; k < 4; ++k) {
        int32_t* place = to + 4 * k * rows;
        store(place, _mm512_castsi512_si128(c[k]));
        store(place + rows, _mm512_extracti32x4_epi32(c[k], 1));
        store(place + 2 * rows, _mm512_extracti32x4_epi32(c[k], 2));
        store(place + 3 * rows, _mm512_extracti32x4_epi32(c[k], 3));
    }
}

}  // namespace
}  // namespace spectral
#endif
