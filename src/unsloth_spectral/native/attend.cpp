// Attention of a few queries over a layer's cache, read as it is stored (DESIGN section 4).
//
// One pass per key-value head and run of tokens: scores from the packed codes for all query rows of the head, a running
// softmax, values summed in code space. Threads take heads and runs; what they find is merged by log-sum-exp. Weights
// (queries in component space, probabilities) have 15 bits and a sign, products and sums of them with codes are exact
// integers. attention/native.py fills in the structures below and checks everything: nothing is checked here.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "simd.h"

namespace spectral {
namespace {

constexpr int TILE = 128;                 // tokens that share scales and lie together in memory
constexpr int RUN = 4 * TILE;             // tokens between two looks at the running maximum
constexpr int PLANE = TILE / 8;           // bytes
constexpr int PARTS = TILE / TOKENS;      // of a tile, expanded one by one
constexpr float FULL = 32767.0f;          // largest weight
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, CODED = 3 };

}  // namespace

// A run of tokens, exact or coded. Strides count elements. attention/native.py mirrors it field by field.
struct Block {
    int64_t num_tokens;
    int64_t kind;
    // Exact: [batch, head, token, dim], the last dimension contiguous.
    const void* keys;
    const void* values;
    int64_t key_strides[3], value_strides[3];
    // Coded keys.
    const uint8_t* key_planes;  // [batch, tile, plane, 16 bytes]
    const uint8_t* key_scales;  // [batch, tile, component]
    const int8_t* vectors;      // [batch, component, dim]
    const float* vector_scales; // [batch, component]
    const uint16_t* mean;       // [batch, head, dim] half precision
    const int32_t* counts;      // [head, 9]: components of each width
    int64_t num_components, num_planes;
    int64_t is_rotated;
    // Their rotation; num_pairs is 0 where there is none.
    int64_t num_pairs;
    const int32_t* first;       // [pair] dimensions
    const int32_t* second;      // [pair]
    const float* start;         // [batch or 1, pair, 2]: the first token's
    int64_t start_stride;       // between batches; 0 where they share it
    const double* step;         // [pair] angle from a token to the next
    const double* tile_turn;    // [pair, 2] cosine and sine of the angle from a tile to the next
    const float* cosines;       // [pair, 128] of the first tile's angles, relative to its first token
    const float* sines;
    // Coded values.
    const uint8_t* value_planes;  // [batch, tile, head, dim, bit, 16 bytes]
    const uint8_t* value_scales;  // [batch, head, tile * 128]
    const float* largest;         // [batch, head]
    int64_t value_nbits;
};

struct Call {
    const Block* blocks;
    int64_t num_blocks;
    const float* query;   // [batch, head, row, key dim]; a row is one query of one head of the group
    const float* mask;    // additive, [batch, query, token] by strides; null for none
    int64_t mask_batch, mask_query;
    const float* sinks;   // [head, row / query_length]: logits that carry no value; null for none
    const float* turn;    // [value dim, value dim]: what coded values are to be multiplied with; null without such
    float* output;        // [batch, head, row, value dim]
    int64_t batch, num_heads, num_rows, query_length, key_dim, value_dim, num_threads;
    float scaling, softcap;  // softcap 0 for none
    const float* key_levels;    // [256] what a scale's byte stands for, keys
    const float* value_levels;  // [256] likewise, values
};

namespace {

INLINE int round_up(int64_t n, int64_t unit) { return static_cast<int>((n + unit - 1) / unit * unit); }

// Attention over some tokens before the division by the softmax's denominator, one query row.
struct Partial {
    float maximum, total;
    float* turned;  // [value dim, padded] in the coded values' frame
    float* plain;   // [value dim, padded]
};

struct Worker {
    const Call& call;
    const int key_dim, value_dim;  // padded to whole vectors
    std::vector<float> query;      // [row, key dim] scaled
    std::vector<float> scores;     // [row of a chunk, RUN]
    std::vector<int16_t> shares;   // [row of a chunk, RUN] probabilities times scales, as weights
    std::vector<float> token_scales;  // [RUN]
    // Of the coded block at hand, in the order of pairs of components:
    std::vector<int32_t> order;    // [2 * pairs] component
    std::vector<float> projected;  // [row, 2 * pairs]
    std::vector<float> scales;     // [2 * pairs] of the tile at hand
    std::vector<int16_t> weights;  // [row of a chunk, 2 * pairs]
    std::vector<double> turn;      // [rotary pair, 2] of the tile at hand's first token
    std::vector<float> cosine, sine;  // [row, rotary pair]: the mean's term, or the queries, seen from block start
    std::vector<float> tile_cosine, tile_sine;  // [row, rotary pair] seen from the tile's first token
    std::vector<float> mean;       // [key dim]
    std::vector<float> fixed;      // [row]: the mean's term of dimensions that do not rotate
    std::vector<int32_t> still;    // those dimensions
    std::vector<int8_t> columns;   // [key dim, 2 * pairs] the basis
    std::vector<float> factors;    // [2 * pairs] what they are worth
    std::vector<int16_t> rows;     // [key dim, 2 * pairs] the basis under the tile's scales
    std::vector<float> row_scales; // [key dim]
    std::vector<Shorts> codes;     // [pairs, 2] of TOKENS tokens
    std::vector<float> rebuilt;    // [key dim, TOKENS]
    std::vector<float> scaled, tile_factors;  // [2 * pairs] at work
    int num_pairs = 0;
    int pairs_of[9] = {};
    int64_t planes_before = 0, components_before = 0, next_tile = -1;

    explicit Worker(const Call& c)
        : call(c), key_dim(round_up(c.key_dim, LANES)), value_dim(round_up(c.value_dim, LANES)) {
        query.assign(c.num_rows * key_dim, 0.0f);
        scores.assign(4 * RUN, 0.0f);
        shares.assign(4 * RUN, 0);
        token_scales.assign(RUN, 0.0f);
    }
};

// float to int16 with the largest magnitude at FULL; returns what one of the integers is worth. n is a multiple of LANES.
INLINE float to_weights(const float* from, int16_t* to, int n) {
    Floats peak = {};
    for (int i = 0; i < n; i += LANES) {
        const Floats value = load<Floats>(from + i);
        peak = larger(peak, larger(value, -value));
    }
    const float most = largest(peak);
    // Below this the quotient is infinite, and zeros times it are not numbers.
    const float factor = most > 1e-33f ? FULL / most : 0.0f;
    for (int i = 0; i < n; i += LANES) {
        // Shifted to be positive, where cutting off the fraction rounds down.
        const Floats value = load<Floats>(from + i) * factor + 32768.5f;
        // Unsigned: what is not a number becomes the lowest integer.
        const Words whole = bits<Words>(__builtin_convertvector(value, Ints)) - 32768u;
        store(to + i, __builtin_convertvector(bits<Ints>(whole), HalfShorts));
    }
    return most / FULL;
}

// LANES numbers from `from` on, `count` of them there; zeros behind.
template <int KIND>
INLINE Floats numbers(const void* from, int64_t place, int count) {
    if constexpr (KIND == FLOAT32) {
        const float* values = static_cast<const float*>(from) + place;
        if (count >= LANES) return load<Floats>(values);
        Floats found = {};
        for (int i = 0; i < count; ++i) found[i] = values[i];
        return found;
    } else {
        const uint16_t* values = static_cast<const uint16_t*>(from) + place;
        Halves halves = {};
        if (count >= LANES)
            halves = load<Halves>(values);
        else
            for (int i = 0; i < count; ++i) halves[i] = values[i];
        const Words wide = __builtin_convertvector(halves, Words);
        if constexpr (KIND == BFLOAT16) return bits<Floats>(wide << 16);
        // Half precision: the exponent's bias differs by 112; infinities and NaN keep theirs.
        const Floats value = bits<Floats>((wide & 0x7fffu) << 13) * 5.192296858534828e+33f;
        const Words special = bits<Words>((wide & 0x7c00u) == 0x7c00u) & 0x7f800000u;
        return bits<Floats>(bits<Words>(value) | special | ((wide & 0x8000u) << 16));
    }
}

void read_mean(Worker& w, const Block& block, int64_t b, int64_t h) {
    w.mean.resize(w.key_dim);
    const int64_t place = (b * w.call.num_heads + h) * w.call.key_dim;
    for (int d = 0; d < w.key_dim; d += LANES)
        store(w.mean.data() + d, numbers<FLOAT16>(block.mean, place + d, static_cast<int>(w.call.key_dim) - d));
}

void start_head(Worker& w, int64_t b, int64_t h) {
    const Call& call = w.call;
    const float* from = call.query + (b * call.num_heads + h) * call.num_rows * call.key_dim;
    for (int64_t row = 0; row < call.num_rows; ++row)
        for (int64_t d = 0; d < call.key_dim; ++d)
            w.query[row * w.key_dim + d] = from[row * call.key_dim + d] * call.scaling;
    w.next_tile = -1;
}

// Everything of a coded block that does not depend on the tokens.
void start_block(Worker& w, const Block& block, int64_t b, int64_t h) {
    const Call& call = w.call;
    const int32_t* counts = block.counts + 9 * h;
    w.planes_before = w.components_before = 0;
    for (int64_t before = 0; before < h; ++before)
        for (int nbits = 1; nbits <= 8; ++nbits) {
            w.components_before += block.counts[9 * before + nbits];
            w.planes_before += static_cast<int64_t>(nbits) * block.counts[9 * before + nbits];
        }
    w.order.clear();
    int component = 0;
    for (int nbits = 8; nbits >= 1; --nbits) {
        w.pairs_of[nbits] = (counts[nbits] + 1) / 2;
        for (int i = 0; i < counts[nbits]; ++i) w.order.push_back(component++);
        if (counts[nbits] % 2) w.order.push_back(-1);
    }
    w.num_pairs = static_cast<int>(w.order.size()) / 2;
    const int width = round_up(w.order.size(), 2 * LANES);
    w.order.resize(width, -1);
    w.scales.assign(width, 0.0f);
    w.weights.assign(4 * width, 0);
    read_mean(w, block, b, h);
    const float* mean = w.mean.data();
    const int pairs = static_cast<int>(block.num_pairs);
    const bool turns = !block.is_rotated && pairs > 0;  // keys are rebuilt and turned
    if (!turns) {
        w.projected.assign(call.num_rows * width, 0.0f);
        std::vector<float> axis(w.key_dim, 0.0f);
        for (int i = 0; i < width; ++i) {
            if (w.order[i] < 0) continue;
            const int64_t place = b * block.num_components + w.components_before + w.order[i];
            for (int64_t d = 0; d < call.key_dim; ++d) axis[d] = block.vectors[place * call.key_dim + d];
            for (int64_t row = 0; row < call.num_rows; ++row) {
                Floats total = {};
                for (int d = 0; d < w.key_dim; d += LANES)
                    total += load<Floats>(axis.data() + d) * load<Floats>(w.query.data() + row * w.key_dim + d);
                // Half, as codes come as odd integers.
                w.projected[row * width + i] = 0.5f * block.vector_scales[place] * sum(total);
            }
        }
    }
    w.still.clear();
    std::vector<bool> rotates(call.key_dim, false);
    for (int p = 0; p < pairs; ++p) rotates[block.first[p]] = rotates[block.second[p]] = true;
    for (int d = 0; d < call.key_dim; ++d)
        if (!rotates[d]) w.still.push_back(d);
    w.turn.resize(2 * pairs);
    w.cosine.resize(call.num_rows * pairs);
    w.sine.resize(call.num_rows * pairs);
    w.tile_cosine.resize(call.num_rows * pairs);
    w.tile_sine.resize(call.num_rows * pairs);
    w.fixed.assign(call.num_rows, 0.0f);
    for (int64_t row = 0; row < call.num_rows; ++row) {
        const float* q = w.query.data() + row * w.key_dim;
        for (int p = 0; p < pairs; ++p) {
            const float real = q[block.first[p]], imaginary = q[block.second[p]];
            const float m_real = mean[block.first[p]], m_imaginary = mean[block.second[p]];
            // Rotated frame: q R(n) mu = cosine * cos + sine * sin. Else the query itself, to be turned to each tile.
            w.cosine[row * pairs + p] = turns ? real : real * m_real + imaginary * m_imaginary;
            w.sine[row * pairs + p] = turns ? imaginary : imaginary * m_real - real * m_imaginary;
        }
        if (!turns)
            for (int d : w.still) w.fixed[row] += q[d] * mean[d];
    }
    if (turns) {
        w.rows.assign(static_cast<size_t>(call.key_dim) * width, 0);
        w.columns.assign(static_cast<size_t>(call.key_dim) * width, 0);
        w.factors.assign(width, 0.0f);
        for (int i = 0; i < width; ++i) {
            if (w.order[i] < 0) continue;
            const int64_t place = b * block.num_components + w.components_before + w.order[i];
            w.factors[i] = 0.5f * block.vector_scales[place];
            for (int64_t d = 0; d < call.key_dim; ++d)
                w.columns[d * width + i] = block.vectors[place * call.key_dim + d];
        }
        w.row_scales.assign(call.key_dim, 0.0f);
        w.codes.resize(2 * (w.num_pairs + 1));
        w.rebuilt.assign(call.key_dim * TOKENS, 0.0f);
    }
    w.next_tile = -1;
}

// The rotation of the tile's first token, and what the rows look like from there.
void start_tile(Worker& w, const Block& block, int64_t b, int64_t tile) {
    const int pairs = static_cast<int>(block.num_pairs);
    const int width = static_cast<int>(w.order.size());
    const float* start = block.start + b * block.start_stride;
    const bool follows = tile == w.next_tile;
    for (int p = 0; p < pairs; ++p) {
        double* turn = w.turn.data() + 2 * p;
        double real = turn[0], imaginary = turn[1], c = block.tile_turn[2 * p], s = block.tile_turn[2 * p + 1];
        if (!follows) {
            const double angle = block.step[p] * static_cast<double>(tile * TILE);
            real = start[2 * p], imaginary = start[2 * p + 1], c = std::cos(angle), s = std::sin(angle);
        }
        turn[0] = real * c - imaginary * s;
        turn[1] = real * s + imaginary * c;
    }
    w.next_tile = tile + 1;
    for (int64_t row = 0; row < w.call.num_rows; ++row)
        for (int p = 0; p < pairs; ++p) {
            const float c = static_cast<float>(w.turn[2 * p]), s = static_cast<float>(w.turn[2 * p + 1]);
            const float a = w.cosine[row * pairs + p], o = w.sine[row * pairs + p];
            // Mean: (a - io)(c + is) = a' - io'. Query: conj(q)(c + is) is conj(q'), the query turned back.
            w.tile_cosine[row * pairs + p] = a * c + o * s;
            w.tile_sine[row * pairs + p] = o * c - a * s;
        }
    const uint8_t* levels = block.key_scales +
                            (b * ((block.num_tokens + TILE - 1) / TILE) + tile) * block.num_components +
                            w.components_before;
    for (int i = 0; i < width; ++i) w.scales[i] = w.order[i] < 0 ? 0.0f : w.call.key_levels[levels[w.order[i]]];
}


template <int NBITS, int ROWS>
INLINE void add_pairs(const uint8_t*& planes, const int16_t*& weights, int count, int stride, Ints (&low)[ROWS],
                      Ints (&high)[ROWS]) {
    // Pair i of row r at weights[r * stride + 2 * i].
    for (; count > 0; count -= 2, weights += 2) {
        const Shorts a = expand<NBITS>(planes);
        const Shorts b = count > 1 ? expand<NBITS>(planes + NBITS * PLANE) : Shorts{};
        planes += (count > 1 ? 2 : 1) * NBITS * PLANE;
        const Shorts first = pairs_low(a, b), second = pairs_high(a, b);
        for (int row = 0; row < ROWS; ++row) {
            const Shorts weight = pair(weights + row * stride);
            low[row] = dot(low[row], first, weight);
            high[row] = dot(high[row], second, weight);
        }
    }
}

// Scores of one tile's tokens for ROWS rows from `row` on, keys in the rotated frame or without rotation.
template <int ROWS>
void score_tile(Worker& w, const Block& block, int64_t b, int64_t h, int64_t tile, int64_t row, int length,
                float* scores) {
    const int width = static_cast<int>(w.order.size()), pairs = static_cast<int>(block.num_pairs);
    const int32_t* counts = block.counts + 9 * h;
    float worth[ROWS];
    std::vector<float>& scaled = w.scaled;
    scaled.resize(width);
    for (int r = 0; r < ROWS; ++r) {
        const float* projected = w.projected.data() + (row + r) * width;
        for (int i = 0; i < width; i += LANES)
            store(&scaled[i], load<Floats>(projected + i) * load<Floats>(w.scales.data() + i));
        worth[r] = to_weights(scaled.data(), w.weights.data() + r * width, width);
    }
    const int64_t tiles = (block.num_tokens + TILE - 1) / TILE;
    const uint8_t* planes = block.key_planes + ((b * tiles + tile) * block.num_planes + w.planes_before) * PLANE;
    for (int part = 0; part * TOKENS < length; ++part) {
        Ints low[ROWS] = {}, high[ROWS] = {};
        const uint8_t* from = planes + part * (TOKENS / 8);
        const int16_t* weights = w.weights.data();
        add_pairs<8>(from, weights, counts[8], width, low, high);
        add_pairs<7>(from, weights, counts[7], width, low, high);
        add_pairs<6>(from, weights, counts[6], width, low, high);
        add_pairs<5>(from, weights, counts[5], width, low, high);
        add_pairs<4>(from, weights, counts[4], width, low, high);
        add_pairs<3>(from, weights, counts[3], width, low, high);
        add_pairs<2>(from, weights, counts[2], width, low, high);
        add_pairs<1>(from, weights, counts[1], width, low, high);
        Floats first[ROWS], second[ROWS];
        for (int r = 0; r < ROWS; ++r) {
            in_order(to_floats(low[r]), to_floats(high[r]), first[r], second[r]);
            first[r] = first[r] * worth[r] + w.fixed[row + r];
            second[r] = second[r] * worth[r] + w.fixed[row + r];
        }
        const float* cosines = block.cosines + part * TOKENS;
        const float* sines = block.sines + part * TOKENS;
        for (int p = 0; p < pairs; ++p) {
            const Floats c0 = load<Floats>(cosines + p * TILE), c1 = load<Floats>(cosines + p * TILE + LANES);
            const Floats s0 = load<Floats>(sines + p * TILE), s1 = load<Floats>(sines + p * TILE + LANES);
            for (int r = 0; r < ROWS; ++r) {
                const float cosine = w.tile_cosine[(row + r) * pairs + p], sine = w.tile_sine[(row + r) * pairs + p];
                first[r] += c0 * cosine + s0 * sine;
                second[r] += c1 * cosine + s1 * sine;
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            store(scores + r * RUN + part * TOKENS, first[r]);
            store(scores + r * RUN + part * TOKENS + LANES, second[r]);
        }
    }
}

template <int NBITS>
INLINE void expand_pairs(const uint8_t*& planes, int count, Shorts*& to) {
    for (; count > 0; count -= 2) {
        const Shorts a = expand<NBITS>(planes);
        const Shorts b = count > 1 ? expand<NBITS>(planes + NBITS * PLANE) : Shorts{};
        planes += (count > 1 ? 2 : 1) * NBITS * PLANE;
        *to++ = pairs_low(a, b);
        *to++ = pairs_high(a, b);
    }
}

// The basis under the tile's scales, as weights: one row a dimension.
void scale_basis(Worker& w) {
    const int width = static_cast<int>(w.order.size());
    w.scaled.resize(width);
    w.tile_factors.resize(width);
    for (int i = 0; i < width; ++i) w.tile_factors[i] = w.scales[i] * w.factors[i];
    for (int64_t d = 0; d < w.call.key_dim; ++d) {
        const int8_t* column = w.columns.data() + d * width;
        for (int i = 0; i < width; ++i) w.scaled[i] = w.tile_factors[i] * column[i];
        w.row_scales[d] = to_weights(w.scaled.data(), w.rows.data() + d * width, width);
    }
}

// Keys of TOKENS tokens before their rotation, [dim, token].
void rebuild(Worker& w, const Block& block, int64_t h, const uint8_t* planes) {
    const int width = static_cast<int>(w.order.size()), count = w.num_pairs;
    const int32_t* counts = block.counts + 9 * h;
    const float* mean = w.mean.data();
    Shorts* to = w.codes.data();
    expand_pairs<8>(planes, counts[8], to);
    expand_pairs<7>(planes, counts[7], to);
    expand_pairs<6>(planes, counts[6], to);
    expand_pairs<5>(planes, counts[5], to);
    expand_pairs<4>(planes, counts[4], to);
    expand_pairs<3>(planes, counts[3], to);
    expand_pairs<2>(planes, counts[2], to);
    expand_pairs<1>(planes, counts[1], to);
    constexpr int TOGETHER = 4;
    for (int64_t d = 0; d < w.call.key_dim; d += TOGETHER) {
        Ints low[TOGETHER] = {}, high[TOGETHER] = {};
        const int16_t* rows[TOGETHER];
        for (int k = 0; k < TOGETHER; ++k)  // beyond the last dimension: the last one again, and not stored
            rows[k] = w.rows.data() + (std::min(d + k, w.call.key_dim - 1) * width);
        for (int i = 0; i < count; ++i) {
            const Shorts first = w.codes[2 * i], second = w.codes[2 * i + 1];
            for (int k = 0; k < TOGETHER; ++k) {
                const Shorts weight = pair(rows[k] + 2 * i);
                low[k] = dot(low[k], first, weight);
                high[k] = dot(high[k], second, weight);
            }
        }
        for (int k = 0; k < TOGETHER && d + k < w.call.key_dim; ++k) {
            Floats first, second;
            in_order(to_floats(low[k]), to_floats(high[k]), first, second);
            store(w.rebuilt.data() + (d + k) * TOKENS, first * w.row_scales[d + k] + mean[d + k]);
            store(w.rebuilt.data() + (d + k) * TOKENS + LANES, second * w.row_scales[d + k] + mean[d + k]);
        }
    }
}

// Scores of one tile whose keys are rebuilt and turned, all rows of a chunk.
template <int ROWS>
INLINE void score_rebuilt(Worker& w, const Block& block, int64_t row, int part, float* scores) {
    const int pairs = static_cast<int>(block.num_pairs);
    Floats first[ROWS] = {}, second[ROWS] = {};
    const float* cosines = block.cosines + part * TOKENS;
    const float* sines = block.sines + part * TOKENS;
    for (int p = 0; p < pairs; ++p) {
        const float* real = w.rebuilt.data() + block.first[p] * TOKENS;
        const float* imaginary = w.rebuilt.data() + block.second[p] * TOKENS;
        const Floats c0 = load<Floats>(cosines + p * TILE), c1 = load<Floats>(cosines + p * TILE + LANES);
        const Floats s0 = load<Floats>(sines + p * TILE), s1 = load<Floats>(sines + p * TILE + LANES);
        const Floats r0 = load<Floats>(real), r1 = load<Floats>(real + LANES);
        const Floats i0 = load<Floats>(imaginary), i1 = load<Floats>(imaginary + LANES);
        const Floats x0 = r0 * c0 - i0 * s0, y0 = r0 * s0 + i0 * c0;
        const Floats x1 = r1 * c1 - i1 * s1, y1 = r1 * s1 + i1 * c1;
        for (int r = 0; r < ROWS; ++r) {
            const float a = w.tile_cosine[(row + r) * pairs + p], o = w.tile_sine[(row + r) * pairs + p];
            first[r] += x0 * a + y0 * o;
            second[r] += x1 * a + y1 * o;
        }
    }
    for (int d : w.still)
        for (int r = 0; r < ROWS; ++r) {
            const float q = w.query[(row + r) * w.key_dim + d];
            first[r] += load<Floats>(w.rebuilt.data() + d * TOKENS) * q;
            second[r] += load<Floats>(w.rebuilt.data() + d * TOKENS + LANES) * q;
        }
    for (int r = 0; r < ROWS; ++r) {
        store(scores + r * RUN + part * TOKENS, first[r]);
        store(scores + r * RUN + part * TOKENS + LANES, second[r]);
    }
}

template <int NBITS, int ROWS>
void add_values(Worker& w, const uint8_t* planes, int64_t tile_stride, int length, const float* worth,
                const Partial* partials) {
    const int parts = (length + TOKENS - 1) / TOKENS;
    const int64_t dims = w.call.value_dim;
    for (int64_t d0 = 0; d0 < dims; d0 += LANES) {
        Floats found[ROWS][LANES] = {};
        const int count = static_cast<int>(std::min<int64_t>(LANES, dims - d0));
        for (int k = 0; k < count; ++k) {
            Ints even[ROWS] = {}, odd[ROWS] = {};
            const uint8_t* from = planes + (d0 + k) * NBITS * PLANE;
            int part = 0;
            for (; part + 1 < parts; part += 2) {
                const uint8_t* place = from + part / PARTS * tile_stride + part % PARTS * (TOKENS / 8);
                const Shorts a = expand<NBITS>(place), c = expand<NBITS>(place + TOKENS / 8);
                for (int r = 0; r < ROWS; ++r) {
                    even[r] = dot(even[r], a, load<Shorts>(w.shares.data() + r * RUN + part * TOKENS));
                    odd[r] = dot(odd[r], c, load<Shorts>(w.shares.data() + r * RUN + (part + 1) * TOKENS));
                }
            }
            if (part < parts) {
                const Shorts a = expand<NBITS>(from + part / PARTS * tile_stride + part % PARTS * (TOKENS / 8));
                for (int r = 0; r < ROWS; ++r)
                    even[r] = dot(even[r], a, load<Shorts>(w.shares.data() + r * RUN + part * TOKENS));
            }
            for (int r = 0; r < ROWS; ++r) found[r][k] = to_floats(even[r]) + to_floats(odd[r]);
        }
        for (int r = 0; r < ROWS; ++r) {
            float* to = partials[r].turned + d0;
            store(to, load<Floats>(to) + sums(found[r]) * (0.5f * worth[r]));
        }
    }
}

// Softmax bookkeeping of a run: scores become exp(score - maximum) in place. False where there is nothing to add.
bool exponentiate(const Call& call, float* scores, int length, int64_t b, int64_t row, int64_t column,
                  Partial& partial, int value_dim) {
    const int padded = round_up(length, TOKENS);
    if (call.softcap > 0.0f)
        for (int t = 0; t < padded; t += LANES) {
            Floats x = load<Floats>(scores + t) * (2.0f / call.softcap);
            x = choose(x > all(40.0f), all(40.0f), choose(x < all(-40.0f), all(-40.0f), x));
            store(scores + t, call.softcap * (1.0f - 2.0f / (exponential(x) + 1.0f)));
        }
    if (call.mask) {
        const float* mask = call.mask + b * call.mask_batch + row % call.query_length * call.mask_query + column;
        for (int t = 0; t < length; ++t) scores[t] += mask[t];
    }
    for (int t = length; t < padded; ++t) scores[t] = NOTHING;
    Floats peak = all(NOTHING);
    for (int t = 0; t < padded; t += LANES) peak = larger(load<Floats>(scores + t), peak);
    const float most = largest(peak);
    const float maximum = std::max(partial.maximum, most);
    if (maximum == NOTHING) {
        // All masked, or not a number.
        bool clean = true;
        for (int t = 0; t < length; ++t) clean = clean && scores[t] == scores[t];
        if (clean) return false;
    }
    const float reference = maximum == NOTHING ? 0.0f : maximum;
    if (partial.maximum != reference) {
        const float shrink = partial.maximum == NOTHING ? 0.0f : std::exp(partial.maximum - reference);
        partial.total *= shrink;
        for (int d = 0; d < value_dim; d += LANES) {
            store(partial.turned + d, load<Floats>(partial.turned + d) * shrink);
            store(partial.plain + d, load<Floats>(partial.plain + d) * shrink);
        }
        partial.maximum = reference;
    }
    Floats total = {};
    for (int t = 0; t < padded; t += LANES) {
        const Floats share = exponential(load<Floats>(scores + t) - reference);
        store(scores + t, share);
        total += share;
    }
    partial.total += sum(total);
    return true;
}

template <int ROWS>
void attend_coded(Worker& w, const Block& block, int64_t b, int64_t h, int64_t row, int64_t token, int length,
                  int64_t column, Partial* partials) {
    const Call& call = w.call;
    const bool turns = !block.is_rotated && block.num_pairs > 0;
    const int64_t tiles = (block.num_tokens + TILE - 1) / TILE;
    const int64_t first_tile = token / TILE;
    float worth[ROWS];
    bool any = false;
    if (!turns)
        for (int done = 0; done < length; done += TILE) {
            start_tile(w, block, b, first_tile + done / TILE);
            score_tile<ROWS>(w, block, b, h, first_tile + done / TILE, row, std::min(TILE, length - done),
                             w.scores.data() + done);
        }
    else
        for (int done = 0; done < length; done += TILE) {
            const int64_t tile = first_tile + done / TILE;
            start_tile(w, block, b, tile);
            scale_basis(w);
            const uint8_t* planes = block.key_planes + ((b * tiles + tile) * block.num_planes + w.planes_before) * PLANE;
            for (int part = 0; part * TOKENS < std::min(TILE, length - done); ++part) {
                rebuild(w, block, h, planes + part * (TOKENS / 8));
                score_rebuilt<ROWS>(w, block, row, part, w.scores.data() + done);
            }
        }
    const uint8_t* scale_codes = block.value_scales + (b * call.num_heads + h) * tiles * TILE + token;
    const float top = block.largest[b * call.num_heads + h];
    const int padded = round_up(length, TOKENS);
    for (int t = 0; t < padded; ++t) w.token_scales[t] = top * call.value_levels[scale_codes[t]];
    for (int r = 0; r < ROWS; ++r) {
        float* scores = w.scores.data() + r * RUN;
        worth[r] = 0.0f;
        if (!exponentiate(call, scores, length, b, row + r, column, partials[r], w.value_dim)) {
            std::fill(w.shares.data() + r * RUN, w.shares.data() + r * RUN + padded, 0);
            continue;
        }
        any = true;
        for (int t = 0; t < padded; t += LANES)
            store(scores + t, load<Floats>(scores + t) * load<Floats>(w.token_scales.data() + t));
        worth[r] = to_weights(scores, w.shares.data() + r * RUN, padded);
    }
    if (!any) return;
    const int64_t row_bytes = call.value_dim * block.value_nbits * PLANE;
    const int64_t stride = call.num_heads * row_bytes;
    const uint8_t* planes = block.value_planes + (b * tiles + first_tile) * stride + h * row_bytes;
    switch (block.value_nbits) {
        case 1: return add_values<1, ROWS>(w, planes, stride, length, worth, partials);
        case 2: return add_values<2, ROWS>(w, planes, stride, length, worth, partials);
        case 3: return add_values<3, ROWS>(w, planes, stride, length, worth, partials);
        case 4: return add_values<4, ROWS>(w, planes, stride, length, worth, partials);
        case 5: return add_values<5, ROWS>(w, planes, stride, length, worth, partials);
        case 6: return add_values<6, ROWS>(w, planes, stride, length, worth, partials);
        case 7: return add_values<7, ROWS>(w, planes, stride, length, worth, partials);
        default: return add_values<8, ROWS>(w, planes, stride, length, worth, partials);
    }
}

template <int KIND, int ROWS>
void attend_exact(Worker& w, const Block& block, int64_t b, int64_t h, int64_t row, int64_t token, int length,
                  int64_t column, Partial* partials) {
    const Call& call = w.call;
    const int64_t key_place = b * block.key_strides[0] + h * block.key_strides[1] + token * block.key_strides[2];
    const int64_t value_place = b * block.value_strides[0] + h * block.value_strides[1] + token * block.value_strides[2];
    for (int t0 = 0; t0 < length; t0 += LANES) {
        Floats found[ROWS][LANES] = {};
        for (int k = 0; k < std::min(LANES, length - t0); ++k)
            for (int d = 0; d < call.key_dim; d += LANES) {
                const Floats key = numbers<KIND>(block.keys, key_place + (t0 + k) * block.key_strides[2] + d,
                                                 static_cast<int>(call.key_dim) - d);
                for (int r = 0; r < ROWS; ++r) found[r][k] += key * load<Floats>(w.query.data() + (row + r) * w.key_dim + d);
            }
        for (int r = 0; r < ROWS; ++r) store(w.scores.data() + r * RUN + t0, sums(found[r]));
    }
    bool any = false;
    for (int r = 0; r < ROWS; ++r) {
        float* scores = w.scores.data() + r * RUN;
        if (exponentiate(call, scores, length, b, row + r, column, partials[r], w.value_dim))
            any = true;
        else
            std::fill(scores, scores + length, 0.0f);
    }
    if (!any) return;
    for (int d = 0; d < call.value_dim; d += LANES) {
        Floats found[ROWS] = {};
        for (int t = 0; t < length; ++t) {
            const Floats value = numbers<KIND>(block.values, value_place + t * block.value_strides[2] + d,
                                               static_cast<int>(call.value_dim) - d);
            for (int r = 0; r < ROWS; ++r) found[r] += value * w.scores[r * RUN + t];
        }
        for (int r = 0; r < ROWS; ++r)
            store(partials[r].plain + d, load<Floats>(partials[r].plain + d) + found[r]);
    }
}

template <int ROWS>
void attend_run(Worker& w, const Block& block, int64_t b, int64_t h, int64_t row, int64_t token, int length,
                int64_t column, Partial* partials) {
    switch (block.kind) {
        case FLOAT32: return attend_exact<FLOAT32, ROWS>(w, block, b, h, row, token, length, column, partials);
        case BFLOAT16: return attend_exact<BFLOAT16, ROWS>(w, block, b, h, row, token, length, column, partials);
        case FLOAT16: return attend_exact<FLOAT16, ROWS>(w, block, b, h, row, token, length, column, partials);
        default: return attend_coded<ROWS>(w, block, b, h, row, token, length, column, partials);
    }
}

struct Run {
    int64_t block, token, column;
    int length;
    int64_t cost;
};

std::vector<Run> split(const Call& call) {
    std::vector<Run> runs;
    int64_t column = 0;
    for (int64_t i = 0; i < call.num_blocks; ++i) {
        const Block& block = call.blocks[i];
        for (int64_t token = 0; token < block.num_tokens; token += RUN) {
            const int length = static_cast<int>(std::min<int64_t>(RUN, block.num_tokens - token));
            runs.push_back({i, token, column + token, length, length * (block.kind == CODED ? 1 : 2)});
        }
        column += block.num_tokens;
    }
    return runs;
}

// Partial results of one thread, for the heads [first, last) it met.
struct Found {
    int64_t first = 0, last = 0;
    std::vector<float> numbers;
};

int64_t partial_size(const Worker& w) { return 2 + 2 * w.value_dim; }

void work(Worker& w, const std::vector<Run>& runs, int64_t total, int64_t from, int64_t to, Found& found) {
    const Call& call = w.call;
    const int64_t size = partial_size(w), heads = call.batch * call.num_heads;
    found.first = from / total;
    found.last = std::min(heads, (to + total - 1) / total);
    found.numbers.assign(std::max<int64_t>(0, found.last - found.first) * call.num_rows * size, 0.0f);
    for (size_t i = 0; i < found.numbers.size(); i += size) found.numbers[i] = NOTHING;
    for (int64_t head = found.first; head < found.last; ++head) {
        const int64_t b = head / call.num_heads, h = head % call.num_heads;
        int64_t place = head * total, current = -1;
        bool started = false;
        for (const Run& run : runs) {
            const bool mine = place >= from && place < to;
            place += run.cost;
            if (!mine) continue;
            if (!started) start_head(w, b, h);
            started = true;
            const Block& block = call.blocks[run.block];
            if (block.kind == CODED && current != run.block) start_block(w, block, b, h);
            current = run.block;
            for (int64_t row = 0; row < call.num_rows;) {
                Partial partials[4];
                const int64_t rows = std::min<int64_t>(4, call.num_rows - row);
                float* numbers[4];
                for (int r = 0; r < rows; ++r) {
                    numbers[r] = found.numbers.data() + (((head - found.first) * call.num_rows + row + r) * size);
                    partials[r] = {numbers[r][0], numbers[r][1], numbers[r] + 2, numbers[r] + 2 + w.value_dim};
                }
                switch (rows) {
                    case 1: attend_run<1>(w, block, b, h, row, run.token, run.length, run.column, partials); break;
                    case 2: attend_run<2>(w, block, b, h, row, run.token, run.length, run.column, partials); break;
                    case 3: attend_run<3>(w, block, b, h, row, run.token, run.length, run.column, partials); break;
                    default: attend_run<4>(w, block, b, h, row, run.token, run.length, run.column, partials); break;
                }
                for (int r = 0; r < rows; ++r) numbers[r][0] = partials[r].maximum, numbers[r][1] = partials[r].total;
                row += rows;
                // The next chunk of rows passes over the same tiles again.
                if (row < call.num_rows) w.next_tile = -1;
            }
        }
    }
}

void finish(const Call& call, const std::vector<Found>& founds, int64_t head, int value_dim, std::vector<float>& buffer) {
    const int64_t size = 2 + 2 * value_dim, h = head % call.num_heads;
    buffer.resize(2 * value_dim);
    for (int64_t row = 0; row < call.num_rows; ++row) {
        float maximum = NOTHING, total = 0.0f;
        const float sink = call.sinks ? call.sinks[h * (call.num_rows / call.query_length) + row / call.query_length]
                                      : NOTHING;
        maximum = sink;
        for (const Found& found : founds)
            if (head >= found.first && head < found.last)
                maximum = std::max(maximum, found.numbers[((head - found.first) * call.num_rows + row) * size]);
        std::fill(buffer.begin(), buffer.end(), 0.0f);
        if (sink != NOTHING) total += std::exp(sink - maximum);
        for (const Found& found : founds) {
            if (head < found.first || head >= found.last) continue;
            const float* numbers = found.numbers.data() + (((head - found.first) * call.num_rows + row) * size);
            if (numbers[0] == NOTHING) continue;
            const float share = std::exp(numbers[0] - maximum);
            total += numbers[1] * share;
            for (int d = 0; d < 2 * value_dim; d += LANES)
                store(buffer.data() + d, load<Floats>(buffer.data() + d) + load<Floats>(numbers + 2 + d) * share);
        }
        float* plain = buffer.data() + value_dim;
        if (call.turn)
            for (int64_t j = 0; j < call.value_dim; ++j)
                for (int64_t d = 0; d < call.value_dim; ++d) plain[d] += buffer[j] * call.turn[j * call.value_dim + d];
        float* to = call.output + (head * call.num_rows + row) * call.value_dim;
        const float whole = total > 0.0f || total != total ? total : std::numeric_limits<float>::min();
        for (int64_t d = 0; d < call.value_dim; ++d) to[d] = plain[d] / whole;
    }
}

}  // namespace

extern "C" void spectral_attend(const Call* given) {
    const Call& call = *given;
    const std::vector<Run> runs = split(call);
    int64_t total = 0;
    for (const Run& run : runs) total += run.cost;
    const int64_t heads = call.batch * call.num_heads, whole = heads * total;
    const int threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(call.num_threads, heads * runs.size())));
    std::vector<Found> founds(threads);
    const int value_dim = round_up(call.value_dim, LANES);
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
#endif
    {
#if defined(_OPENMP)
        const int thread = omp_get_thread_num(), present = omp_get_num_threads();
#else
        const int thread = 0, present = 1;
#endif
        {
            Worker worker(call);
            for (int part = thread; part < threads; part += present)
                work(worker, runs, total, whole * part / threads, whole * (part + 1) / threads, founds[part]);
        }
#if defined(_OPENMP)
#pragma omp barrier
#endif
        std::vector<float> buffer;
        for (int64_t head = thread; head < heads; head += present) finish(call, founds, head, value_dim, buffer);
    }
}

// For the caller to check that both sides lay out the structures alike.
extern "C" int64_t spectral_sizes(int64_t which) { return which ? sizeof(Call) : sizeof(Block); }

}  // namespace spectral
