// Structures and constants shared with Python. native/abi.py mirrors them and compares its layout with abi.cpp's table.
//
// A structure is a list of its fields, from which its declaration and its entries in that table are made.
#pragma once

#include <cstdint>

namespace spectral {

constexpr int MAX_SMOOTH = 16;         // smooth functions that `Rotation.mixing` has room for
constexpr float FULL_WAVE = 32767.0f;  // stands for 1 in `Rotation.waves`

enum Dtype : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// Exact keys or values, [batch, head, token, dim], the last dimension contiguous.
#define EXACT_TOKENS(FIELD)                                                                                         \
    FIELD(const void*, data)                                                                                        \
    FIELD(int64_t, dtype)               /* a Dtype; under autocast keys and values differ */                        \
    FIELD(int64_t, batch_stride)        /* all strides are in elements */                                           \
    FIELD(int64_t, head_stride)                                                                                     \
    FIELD(int64_t, token_stride)

#define CODED_KEYS(FIELD)                                                                                           \
    FIELD(const uint8_t*, streams)      /* [batch, tile, row, 16 bytes] */                                          \
    FIELD(const uint8_t*, carries)      /* [batch, component] the bytes before the first tile */                    \
    FIELD(const uint8_t*, scales)       /* [batch, tile, component] */                                              \
    FIELD(const int8_t*, vectors)       /* [batch, component, dim], or the rows of the model's basis, [row, dim] */ \
    FIELD(const int32_t*, rows)         /* [component] each one's row of the model's basis; null for own vectors */ \
    FIELD(const float*, vector_scales)  /* [batch, component] */                                                    \
    FIELD(const uint16_t*, mean)        /* [batch, head, dim] half precision */                                     \
    FIELD(const int32_t*, counts)       /* [head, 9]: components of each width */                                   \
    FIELD(int64_t, num_components)                                                                                  \
    FIELD(int64_t, num_rows)

// The rotation of keys: pairs of dimensions, the fast ones first; num_pairs is 0 without rotation. Slow pairs rotate
// little within a tile, so a few smooth functions represent all their cosines and sines (attention/rotary_tables.py).
#define ROTATION(FIELD)                                                                                             \
    FIELD(int64_t, num_pairs)                                                                                       \
    FIELD(int64_t, num_fast)                                                                                        \
    FIELD(int64_t, num_waves)                                                                                       \
    FIELD(int64_t, first_anchored)      /* of the pairs, which tiles' first tokens un-rotate from here on */        \
    FIELD(const int32_t*, first)        /* [pair] dimensions */                                                     \
    FIELD(const int32_t*, second)       /* [pair] */                                                                \
    FIELD(const float*, start)          /* [batch or 1, pair, 2]: cosine and sine of the first token's angle */     \
    FIELD(int64_t, start_stride)        /* between batches; 0 if they share it */                                   \
    FIELD(const double*, step)          /* [pair] angle from a token to the next */                                 \
    FIELD(const double*, tile_step)     /* [2, pair] cosine and sine of the angle from a tile to the next */        \
    FIELD(const int16_t*, waves)        /* [num_waves, 128, 2] cosine and sine of fast pairs, then smooth functions */ \
    FIELD(const float*, mixing)         /* [2, pair - num_fast, MAX_SMOOTH] slow pairs in smooth functions */       \
    FIELD(const float*, reach)          /* [pair - num_fast, MAX_SMOOTH] the largest weights in a pair of length 1 */

#define CODED_VALUES(FIELD)                                                                                         \
    FIELD(const uint8_t*, streams)      /* [batch, tile, head, dim, bit, 16 bytes] */                               \
    FIELD(const uint8_t*, carries)      /* [batch, head, dim] the bytes before the first tile */                    \
    FIELD(const uint8_t*, scales)       /* [batch, head, tile * 128] */                                             \
    FIELD(const float*, largest)        /* [batch, head] */                                                         \
    FIELD(int64_t, nbits)

// A run of tokens, exact or coded; the parts of the other kind are zeros.
#define BLOCK(FIELD)                                                                                                \
    FIELD(int64_t, num_tokens)                                                                                      \
    FIELD(const int64_t*, count)        /* the number of tokens where it changes from call to call; else null */    \
    FIELD(int64_t, is_coded)                                                                                        \
    FIELD(ExactTokens, exact_keys)                                                                                  \
    FIELD(ExactTokens, exact_values)                                                                                \
    FIELD(CodedKeys, keys)                                                                                          \
    FIELD(Rotation, rotation)                                                                                       \
    FIELD(CodedValues, values)

// A call of spectral_attend.
#define CALL(FIELD)                                                                                                 \
    FIELD(const Block*, blocks)                                                                                     \
    FIELD(int64_t, num_blocks)                                                                                      \
    FIELD(const Block*, last)           /* one more block behind these; null for none */                            \
    FIELD(const float*, query)          /* [batch, head, row, key dim]; a row is one query of one head of the group */ \
    FIELD(const float*, mask)           /* additive, [batch, query, token] by strides; null for none */             \
    FIELD(int64_t, mask_batch)                                                                                      \
    FIELD(int64_t, mask_query)                                                                                      \
    FIELD(const float*, sink_logits)    /* [head, row / query_length]: logits without a value; null for none */     \
    FIELD(const float*, hadamard)       /* [value dim, value dim]: multiplies coded values; null if none */        \
    FIELD(float*, output)               /* [batch, head, row, value dim] */                                         \
    FIELD(int64_t, batch)                                                                                           \
    FIELD(int64_t, num_heads)                                                                                       \
    FIELD(int64_t, num_rows)                                                                                        \
    FIELD(int64_t, query_length)                                                                                    \
    FIELD(int64_t, key_dim)                                                                                         \
    FIELD(int64_t, value_dim)                                                                                       \
    FIELD(int64_t, num_threads)                                                                                     \
    FIELD(float, scaling)                                                                                           \
    FIELD(float, softcap)               /* 0 for none */                                                            \
    FIELD(const float*, key_levels)     /* [256] the scale of each byte, keys */                                    \
    FIELD(const float*, value_levels)   /* [256] the same, values */                                                \
    FIELD(const int8_t*, parts)         /* [4, 2, 16] what the entries of the trellis' tables are sums of */

// The tables of codec/spectral/trellis.py.
#define TRELLIS(FIELD)                                                                                              \
    FIELD(const float*, entries)        /* [8, 256] by width and window */                                          \
    FIELD(const float*, units)          /* [8] how large a standard deviation is in the entries' unit */            \
    FIELD(const float*, reaches)        /* [4] how far a group's largest coefficient may lie, in that unit */       \
    FIELD(const int16_t*, distances)    /* [4, 511, 256] by width, input and state */

// A call of spectral_encode_keys. Carries are the bytes that streams go on from.
#define KEY_ENCODING(FIELD)                                                                                         \
    FIELD(const float*, coefficients)   /* [batch, component, token] */                                             \
    FIELD(const int32_t*, widths)       /* [component] */                                                           \
    FIELD(const int32_t*, rows)         /* [component] its first row of a tile's streams */                         \
    FIELD(uint8_t*, streams)            /* [batch, tile, row, 16] */                                                \
    FIELD(uint8_t*, carries)            /* [batch, component] given or, if `is_free`, written */                    \
    FIELD(float*, energies)             /* [batch, component, tile] squared lengths */                              \
    FIELD(float*, overlaps)             /* [batch, component, tile] products with the reconstructions */            \
    FIELD(float*, squares)              /* [batch, component, tile] squared lengths of the reconstructions */       \
    FIELD(const float*, clips)          /* [num_clips] clipping points to try, as shares of the largest */          \
    FIELD(const float*, inverses)       /* [batch, component] one over the first tile's scales; null to choose */   \
    FIELD(int64_t, batch)                                                                                           \
    FIELD(int64_t, num_components)                                                                                  \
    FIELD(int64_t, num_tokens)                                                                                      \
    FIELD(int64_t, num_rows)                                                                                        \
    FIELD(int64_t, num_clips)                                                                                       \
    FIELD(int64_t, num_threads)                                                                                     \
    FIELD(int64_t, is_free)                                                                                         \
    FIELD(Trellis, trellis)

// A call of spectral_encode_values.
#define VALUE_ENCODING(FIELD)                                                                                       \
    FIELD(const float*, values)         /* [batch, head, dim, token], already times the Hadamard matrix */          \
    FIELD(uint8_t*, streams)            /* [batch, tile, head, dim, bit, 16] */                                     \
    FIELD(uint8_t*, carries)            /* [batch, head, dim] given or, if `is_free`, written */                    \
    FIELD(float*, energies)             /* [batch, head, token] squared lengths */                                  \
    FIELD(float*, overlaps)             /* [batch, head, token] products with the reconstructions */                \
    FIELD(float*, squares)              /* [batch, head, token] squared lengths of these */                         \
    FIELD(int64_t, batch)                                                                                           \
    FIELD(int64_t, num_heads)                                                                                       \
    FIELD(int64_t, head_dim)                                                                                        \
    FIELD(int64_t, num_tokens)                                                                                      \
    FIELD(int64_t, nbits)                                                                                           \
    FIELD(int64_t, num_threads)                                                                                     \
    FIELD(int64_t, is_free)                                                                                         \
    FIELD(Trellis, trellis)

// All structures, each after its member structures.
#define STRUCTURES(STRUCTURE)                                                                                       \
    STRUCTURE(ExactTokens, EXACT_TOKENS)                                                                            \
    STRUCTURE(CodedKeys, CODED_KEYS)                                                                                \
    STRUCTURE(Rotation, ROTATION)                                                                                   \
    STRUCTURE(CodedValues, CODED_VALUES)                                                                            \
    STRUCTURE(Block, BLOCK)                                                                                         \
    STRUCTURE(Call, CALL)                                                                                           \
    STRUCTURE(Trellis, TRELLIS)                                                                                     \
    STRUCTURE(KeyEncoding, KEY_ENCODING)                                                                            \
    STRUCTURE(ValueEncoding, VALUE_ENCODING)

#define DECLARE_FIELD(type, name) type name;
#define DECLARE_STRUCTURE(Name, FIELDS) \
    struct Name {                       \
        FIELDS(DECLARE_FIELD)           \
    };
STRUCTURES(DECLARE_STRUCTURE)
#undef DECLARE_STRUCTURE
#undef DECLARE_FIELD

}  // namespace spectral
