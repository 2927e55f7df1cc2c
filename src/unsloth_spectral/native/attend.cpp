// Attention of a few queries over a layer's cache, read as it is stored (DESIGN section 4).
//
// One pass per key-value head and run of tokens: scores from the packed codes for all query rows of the head, a running
// softmax, values summed in code space. Threads take heads and runs; what they find is merged by log-sum-exp. Weights
// (queries in component space, probabilities) have 15 bits and a sign, products and sums of them with codes are exact
// integers. Codes are counted from 0 here; what half of their range adds is taken off the sums. attention/native.py
// fills in the structures below and checks everything: nothing is checked here.
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

constexpr int RUN = 4 * TILE;  // tokens between two looks at the running maximum
constexpr int SMOOTH = 16;     // functions that `Block.mixing` has room for
constexpr float FULL_WAVE = 32767.0f;
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
    const double* tile_turn;    // [2, pair] cosine and sine of the angle from a tile to the next
    const float* cosines;       // [pair, 128] of the first tile's angles, relative to its first token
    const float* sines;
    // The same as integers, FULL_WAVE for 1, two to a lane: cosine and sine of a fast pair; and of the slow pairs, which
    // turn little within a tile, a few smooth functions that make up all their cosines and sines.
    int64_t num_fast, num_waves;
    const int16_t* waves;       // [num_waves, 128, 2], the fast pairs first
    const float* mixing;        // [2, pair - num_fast, SMOOTH] slow pairs in smooth functions
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
    std::vector<int32_t> shares[2];   // [row of a chunk, RUN / 4] probabilities times scales, as weights
    std::vector<float> token_scales;  // [RUN]
    // Of the coded block at hand; components are filled up to whole vectors.
    int count = 0, width = 0, num_quads = 0;
    int64_t components_before = 0;
    std::vector<uint8_t> nbits;    // [component] 0 behind the last
    std::vector<int> places;       // [component] its first plane
    std::vector<float> offsets;    // [component] half of the codes' range
    std::vector<float> projected;  // [row, component]
    std::vector<float> scales;     // [component] of the tile at hand
    std::vector<float> scaled;     // [component] at work
    std::vector<int32_t> weights[2];  // [row of a chunk, component / 4]
    std::vector<Bytes> codes;      // [quad, VECTORS] of a tile, four components a lane
    std::vector<double> turn;      // [2, rotary pair] of the tile at hand's first token
    std::vector<float> short_turn; // the same
    std::vector<float> cosine, sine;  // [row, rotary pair]: the mean's term, or the queries, seen from block start
    std::vector<float> tile_cosine, tile_sine;  // [row, rotary pair] seen from the tile's first token
    std::vector<float> amplitudes; // [row of a chunk, wave, 2] what the mean's term has of each wave
    std::vector<int16_t> heights;  // the same as integers
    std::vector<float> mean;       // [key dim]
    std::vector<float> fixed;      // [row]: the mean's term of dimensions that do not rotate
    // Where keys are rebuilt: pairs of dimensions, also of those that do not rotate; key_dim stands for none.
    std::vector<int> first, second;
    std::vector<float> cosines, sines;  // [pair, 128] in the order of `codes`
    std::vector<float> columns;    // [key dim + 1, component] the basis
    std::vector<int32_t> rows[2];  // [key dim + 1, component / 4] the basis under the tile's scales
    std::vector<float> worths, constants;  // [key dim + 1]
    int64_t next_tile = -1;

    explicit Worker(const Call& c)
        : call(c), key_dim(round_up(c.key_dim, LANES)), value_dim(round_up(c.value_dim, LANES)) {
        query.assign(c.num_rows * key_dim, 0.0f);
        scores.assign(4 * RUN, 0.0f);
        for (auto& each : shares) each.assign(RUN, 0);
        token_scales.assign(RUN, 0.0f);
    }
};

struct Weighed {
    float worth;  // of one of the integers
    float sum;    // of the integers, each times its offset
};

// The nearest integers of numbers between -32768 and 32767.
INLINE Ints rounded(Floats x) {
    // Shifted to be positive, where cutting off the fraction rounds down. Unsigned: what is not a number becomes the
    // lowest integer.
    return bits<Ints>(bits<Words>(__builtin_convertvector(x + 32768.5f, Ints)) - 32768u);
}

// n floats, none above `most` in magnitude, as weights, that one as FULL; n is a multiple of LANES. Without offsets each
// is 1.
template <bool OFFSETS>
INLINE Weighed to_weights(const float* from, float most, const float* offsets, int32_t* first, int32_t* second, int n) {
    Floats sums = {};
    // Below this the quotient is infinite, and zeros times it are not numbers.
    const float factor = most > 1e-33f ? FULL / most : 0.0f;
    for (int i = 0; i < n; i += LANES) {
        const Ints whole = rounded(load<Floats>(from + i) * factor);
        if constexpr (OFFSETS)
            sums += to_floats(whole) * load<Floats>(offsets + i);
        else
            sums += to_floats(whole);
        store_weights(whole, first + i / 4, second + i / 4);
    }
    return {most / FULL, sum(sums)};
}

// Floats as integers of which sums of products with waves do not overflow; returns what one of the integers is worth.
INLINE float to_heights(const float* from, int16_t* to, int n) {
    Floats peak = {}, total = {};
    for (int i = 0; i < n; i += LANES) {
        const Floats value = load<Floats>(from + i), magnitude = larger(value, -value);
        peak = larger(peak, magnitude);
        total += magnitude;
    }
    const float most = std::max(largest(peak), 0.5f * sum(total));
    const float factor = most > 1e-33f ? 32766.0f / most : 0.0f;
    for (int i = 0; i < n; i += LANES) {
        store(to + i, __builtin_convertvector(rounded(load<Floats>(from + i) * factor), HalfShorts));
    }
    return most / 32766.0f;
}

// to = a * b, and the largest magnitude.
INLINE float multiply(const float* a, const float* b, float* to, int n) {
    Floats peak = {};
    for (int i = 0; i < n; i += LANES) {
        const Floats value = load<Floats>(a + i) * load<Floats>(b + i);
        peak = larger(peak, larger(value, -value));
        store(to + i, value);
    }
    return largest(peak);
}

INLINE Ints broadcast(int32_t value) { return Ints{} + value; }

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

// A basis to rebuild keys with, and the tables of their rotation in the order of `codes`.
void start_rebuilding(Worker& w, const Block& block, const int8_t* vectors, const float* vector_scales) {
    const int dims = static_cast<int>(w.call.key_dim), pairs = static_cast<int>(block.num_pairs);
    w.columns.assign(static_cast<size_t>(dims + 1) * w.width, 0.0f);
    for (int i = 0; i < w.count; ++i)
        for (int d = 0; d < dims; ++d)
            w.columns[d * w.width + i] = vector_scales[i] * static_cast<float>(vectors[i * dims + d]);
    for (auto& each : w.rows) each.assign(static_cast<size_t>(dims + 1) * w.width / 4, 0);
    w.worths.assign(dims + 1, 0.0f);
    w.constants.assign(dims + 1, 0.0f);
    Floats places[4], ordered[4];
    for (int k = 0; k < 4; ++k)
        for (int lane = 0; lane < LANES; ++lane) places[k][lane] = static_cast<float>(k * LANES + lane);
    in_order(places, ordered);
    w.cosines.assign(w.first.size() * TILE, 1.0f);
    w.sines.assign(w.first.size() * TILE, 0.0f);
    for (int p = 0; p < pairs; ++p)
        for (int t = 0; t < TILE; ++t) {
            const int within = t % BYTES;
            const int place = p * TILE + t - within + static_cast<int>(ordered[within / LANES][within % LANES]);
            w.cosines[place] = block.cosines[p * TILE + t];
            w.sines[place] = block.sines[p * TILE + t];
        }
}

// Everything of a coded block that does not depend on the tokens.
void start_block(Worker& w, const Block& block, int64_t b, int64_t h) {
    const Call& call = w.call;
    int component = 0, plane = 0;
    for (int64_t before = 0; before < h; ++before)
        for (int nbits = 1; nbits <= 8; ++nbits) {
            component += block.counts[9 * before + nbits];
            plane += nbits * block.counts[9 * before + nbits];
        }
    w.nbits.clear();
    w.places.clear();
    w.offsets.clear();
    for (int nbits = 8; nbits >= 1; --nbits)
        for (int i = 0; i < block.counts[9 * h + nbits]; ++i) {
            w.nbits.push_back(static_cast<uint8_t>(nbits));
            w.places.push_back(plane);
            w.offsets.push_back(0.5f * static_cast<float>((1 << nbits) - 1));
            plane += nbits;
        }
    // A block may have no component at all; there is room for some all the same.
    const int count = static_cast<int>(w.nbits.size()), width = std::max(LANES, round_up(count, LANES));
    w.count = count;
    w.width = width;
    w.components_before = component;
    w.num_quads = (count + 3) / 4;
    w.nbits.resize(width, 0);
    w.places.resize(width, 0);
    w.offsets.resize(width, 0.0f);
    w.scales.assign(width, 0.0f);
    w.scaled.assign(width, 0.0f);
    w.codes.resize(static_cast<size_t>(w.num_quads) * VECTORS);
    for (auto& each : w.weights) each.assign(width, 0);
    read_mean(w, block, b, h);
    const float* mean = w.mean.data();
    const int pairs = static_cast<int>(block.num_pairs);
    const bool turns = !block.is_rotated && pairs > 0;  // keys are rebuilt and turned
    const int8_t* vectors = block.vectors + (b * block.num_components + component) * call.key_dim;
    const float* vector_scales = block.vector_scales + b * block.num_components + component;
    std::vector<bool> rotates(call.key_dim, false);
    for (int p = 0; p < pairs; ++p) rotates[block.first[p]] = rotates[block.second[p]] = true;
    w.turn.resize(2 * pairs);
    w.fixed.assign(call.num_rows, 0.0f);
    if (turns) {
        w.first.assign(block.first, block.first + pairs);
        w.second.assign(block.second, block.second + pairs);
        const int none = static_cast<int>(call.key_dim);
        for (int d = 0; d < none; ++d) {
            if (rotates[d]) continue;
            if (w.first.size() > w.second.size())
                w.second.push_back(d);
            else
                w.first.push_back(d);
        }
        w.second.resize(w.first.size(), none);
        start_rebuilding(w, block, vectors, vector_scales);
    } else {
        w.projected.assign(call.num_rows * width, 0.0f);
        std::vector<float> axis(w.key_dim, 0.0f);
        for (int i = 0; i < count; ++i) {
            for (int64_t d = 0; d < call.key_dim; ++d) axis[d] = vectors[i * call.key_dim + d];
            for (int64_t row = 0; row < call.num_rows; ++row) {
                Floats total = {};
                for (int d = 0; d < w.key_dim; d += LANES)
                    total += load<Floats>(axis.data() + d) * load<Floats>(w.query.data() + row * w.key_dim + d);
                w.projected[row * width + i] = vector_scales[i] * sum(total);
            }
        }
    }
    const int held = turns ? static_cast<int>(w.first.size()) : pairs;
    for (auto* each : {&w.cosine, &w.sine, &w.tile_cosine, &w.tile_sine}) each->assign(call.num_rows * held, 0.0f);
    for (int64_t row = 0; row < call.num_rows; ++row) {
        const float* q = w.query.data() + row * w.key_dim;
        for (int p = 0; p < held; ++p) {
            const int first = turns ? w.first[p] : block.first[p], second = turns ? w.second[p] : block.second[p];
            const bool alone = second >= call.key_dim;
            const float real = q[first], imaginary = alone ? 0.0f : q[second];
            const float m_real = mean[first], m_imaginary = alone ? 0.0f : mean[second];
            // Rotated frame: q R(n) mu = cosine * cos + sine * sin. Else the query itself, to be turned to each tile.
            w.cosine[row * held + p] = turns ? real : real * m_real + imaginary * m_imaginary;
            w.sine[row * held + p] = turns ? imaginary : imaginary * m_real - real * m_imaginary;
        }
        for (int d = 0; d < call.key_dim && !turns; ++d)
            if (!rotates[d]) w.fixed[row] += q[d] * mean[d];
    }
    w.tile_cosine = w.cosine;
    w.tile_sine = w.sine;
    w.amplitudes.assign(4 * (2 * pairs + SMOOTH + LANES), 0.0f);
    w.heights.assign(4 * (2 * pairs + SMOOTH + LANES), 0);
    w.next_tile = -1;
}

// a, b turned by (c, s), for pairs that lie together: a' = a c + b s, b' = b c - a s.
INLINE void turn_back(const float* a, const float* b, const float* c, const float* s, float* to_a, float* to_b, int n) {
    for (int p = 0; p < n; ++p) {
        const float first = a[p] * c[p] + b[p] * s[p], second = b[p] * c[p] - a[p] * s[p];
        to_a[p] = first;
        to_b[p] = second;
    }
}

// The rotation of the tile's first token, what the rows look like from there, and the tile's scales.
void start_tile(Worker& w, const Block& block, int64_t b, int64_t tile) {
    const int pairs = static_cast<int>(block.num_pairs);
    const int64_t held = static_cast<int64_t>(w.cosine.size()) / w.call.num_rows;
    if (pairs) {
        double* real = w.turn.data();
        double* imaginary = real + pairs;
        if (tile == w.next_tile) {
            const double *c = block.tile_turn, *s = c + pairs;
            for (int p = 0; p < pairs; ++p) {
                const double next = real[p] * c[p] - imaginary[p] * s[p];
                imaginary[p] = real[p] * s[p] + imaginary[p] * c[p];
                real[p] = next;
            }
        } else {
            const float* start = block.start + b * block.start_stride;
            for (int p = 0; p < pairs; ++p) {
                const double angle = block.step[p] * static_cast<double>(tile * TILE);
                const double c = std::cos(angle), s = std::sin(angle);
                real[p] = start[2 * p] * c - start[2 * p + 1] * s;
                imaginary[p] = start[2 * p] * s + start[2 * p + 1] * c;
            }
        }
        w.short_turn.resize(2 * pairs);
        for (int p = 0; p < 2 * pairs; ++p) w.short_turn[p] = static_cast<float>(w.turn[p]);
        // Mean: (a - io)(c + is) = a' - io'. Query: conj(q)(c + is) is conj(q'), the query turned back.
        for (int64_t row = 0; row < w.call.num_rows; ++row)
            turn_back(w.cosine.data() + row * held, w.sine.data() + row * held, w.short_turn.data(),
                      w.short_turn.data() + pairs, w.tile_cosine.data() + row * held, w.tile_sine.data() + row * held,
                      pairs);
    }
    w.next_tile = tile + 1;
    const int64_t tiles = (block.num_tokens + TILE - 1) / TILE;
    const uint8_t* levels = block.key_scales + (b * tiles + tile) * block.num_components + w.components_before;
    for (int i = 0; i < w.count; ++i) w.scales[i] = w.call.key_levels[levels[i]];
}

template <int NBITS>
INLINE void expand_component(const uint8_t* planes, Bytes* to) {
    for (int part = 0; part < PARTS; ++part) to[4 * part] = expand<NBITS>(planes, part);
}

template <int NBITS>
INLINE void expand_quad(const uint8_t* planes, Bytes* to) {
    for (int part = 0; part < PARTS; ++part) {
        Bytes found[4];
        for (int k = 0; k < 4; ++k) found[k] = expand<NBITS>(planes + k * NBITS * PLANE, part);
        interleave(found, to + 4 * part);
    }
}

// All components of a head in one tile, whose planes these are.
void expand_tile(Worker& w, const uint8_t* planes) {
    for (int quad = 0; quad < w.num_quads; ++quad) {
        const uint8_t* nbits = &w.nbits[4 * quad];
        const uint8_t* from = planes + w.places[4 * quad] * PLANE;
        Bytes* to = &w.codes[quad * VECTORS];
        // They fall, so the first and the last tell; most are alike.
        switch (nbits[0] == nbits[3] ? nbits[0] : 0) {
            case 1: expand_quad<1>(from, to); continue;
            case 2: expand_quad<2>(from, to); continue;
            case 3: expand_quad<3>(from, to); continue;
            case 4: expand_quad<4>(from, to); continue;
            case 5: expand_quad<5>(from, to); continue;
            case 6: expand_quad<6>(from, to); continue;
            case 7: expand_quad<7>(from, to); continue;
            case 8: expand_quad<8>(from, to); continue;
            default: break;
        }
        Bytes found[PARTS][4] = {};
        for (int k = 0; k < 4; from += nbits[k++] * PLANE) switch (nbits[k]) {
                case 1: expand_component<1>(from, &found[0][k]); break;
                case 2: expand_component<2>(from, &found[0][k]); break;
                case 3: expand_component<3>(from, &found[0][k]); break;
                case 4: expand_component<4>(from, &found[0][k]); break;
                case 5: expand_component<5>(from, &found[0][k]); break;
                case 6: expand_component<6>(from, &found[0][k]); break;
                case 7: expand_component<7>(from, &found[0][k]); break;
                case 8: expand_component<8>(from, &found[0][k]); break;
                default: break;
            }
        for (int part = 0; part < PARTS; ++part) interleave(found[part], to + 4 * part);
    }
}

// Scores of the tile at hand for ROWS rows from `row` on, keys in the rotated frame or without rotation.
template <int ROWS>
void score_tile(Worker& w, const Block& block, int64_t row, int length, float* scores) {
    const int pairs = static_cast<int>(block.num_pairs), fast = static_cast<int>(block.num_fast);
    const int vectors = round_up(length, BYTES) / LANES, lanes = w.width / 4;
    const int waves = static_cast<int>(block.num_waves), room = round_up(2 * waves, LANES);
    float worth[ROWS], constant[ROWS], height[ROWS] = {};
    for (int r = 0; r < ROWS; ++r) {
        const float most = multiply(&w.projected[(row + r) * w.width], w.scales.data(), w.scaled.data(), w.width);
        const Weighed found = to_weights<true>(w.scaled.data(), most, w.offsets.data(), &w.weights[0][r * lanes],
                                               &w.weights[1][r * lanes], w.width);
        worth[r] = found.worth;
        constant[r] = w.fixed[row + r] - found.worth * found.sum;
    }
    if (waves) {
        Floats smooth[ROWS][SMOOTH / LANES] = {};
        for (int p = fast; p < pairs; ++p)
            for (int j = 0; j < SMOOTH / LANES; ++j) {
                const Floats c = load<Floats>(block.mixing + (p - fast) * SMOOTH + j * LANES);
                const Floats s = load<Floats>(block.mixing + (pairs - fast + p - fast) * SMOOTH + j * LANES);
                for (int r = 0; r < ROWS; ++r) {
                    smooth[r][j] += c * w.tile_cosine[(row + r) * pairs + p];
                    smooth[r][j] += s * w.tile_sine[(row + r) * pairs + p];
                }
            }
        for (int r = 0; r < ROWS; ++r) {
            float* amplitudes = &w.amplitudes[r * (2 * pairs + SMOOTH + LANES)];
            for (int p = 0; p < fast; ++p) {
                amplitudes[2 * p] = w.tile_cosine[(row + r) * pairs + p];
                amplitudes[2 * p + 1] = w.tile_sine[(row + r) * pairs + p];
            }
            for (int j = 0; j < SMOOTH / LANES; ++j) store(amplitudes + 2 * fast + j * LANES, smooth[r][j]);
            // Functions beyond the last wave are zero, so this is all.
            std::fill(amplitudes + 2 * waves, amplitudes + room, 0.0f);
            height[r] = to_heights(amplitudes, &w.heights[r * room], room) / FULL_WAVE;
        }
    }
    Floats found[ROWS][VECTORS];
    constexpr int TOGETHER = 2;
    for (int v = 0; v < vectors; v += TOGETHER) {
        Sums sums[ROWS][TOGETHER] = {};
        for (int quad = 0; quad < w.num_quads; ++quad) {
            Codes codes[TOGETHER];
            for (int k = 0; k < TOGETHER; ++k) codes[k] = Codes::of(w.codes[quad * VECTORS + v + k]);
            for (int r = 0; r < ROWS; ++r) {
                const Ints first = broadcast(w.weights[0][r * lanes + quad]);
                const Ints second = broadcast(w.weights[1][r * lanes + quad]);
                for (int k = 0; k < TOGETHER; ++k) Sums::add(sums[r][k], codes[k], first, second);
            }
        }
        for (int r = 0; r < ROWS; ++r)
            for (int k = 0; k < TOGETHER; ++k) found[r][v + k] = Sums::total(sums[r][k]);
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < vectors; v += 4) in_order(&found[r][v], &found[r][v]);
    for (int v = 0; v < vectors; v += TOGETHER) {
        Ints sums[ROWS][TOGETHER] = {};
        for (int j = 0; j < waves; ++j)
            for (int k = 0; k < TOGETHER; ++k) {
                const Shorts wave = load<Shorts>(block.waves + 2 * (j * TILE + (v + k) * LANES));
                for (int r = 0; r < ROWS; ++r)
                    sums[r][k] =
                        add_products(sums[r][k], wave, bits<Shorts>(broadcast(load<int32_t>(&w.heights[r * room + 2 * j]))));
            }
        for (int r = 0; r < ROWS; ++r)
            for (int k = 0; k < TOGETHER; ++k)
                store(scores + r * RUN + (v + k) * LANES,
                      found[r][v + k] * worth[r] + (to_floats(sums[r][k]) * height[r] + constant[r]));
    }
}

// The basis under the tile's scales, as weights: one row a dimension.
void scale_basis(Worker& w) {
    for (int64_t d = 0; d < w.call.key_dim; ++d) {
        const float* column = w.columns.data() + d * w.width;
        const float most = multiply(column, w.scales.data(), w.scaled.data(), w.width);
        const Weighed found = to_weights<true>(w.scaled.data(), most, w.offsets.data(), &w.rows[0][d * w.width / 4],
                                               &w.rows[1][d * w.width / 4], w.width);
        w.worths[d] = found.worth;
        w.constants[d] = w.mean[d] - found.worth * found.sum;
    }
}

// Scores of the tile at hand, whose keys are rebuilt and turned a pair of dimensions at a time.
template <int ROWS>
void score_rebuilt(Worker& w, int64_t row, int length, float* scores) {
    const int pairs = static_cast<int>(w.first.size()), lanes = w.width / 4;
    for (int part = 0; part * BYTES < length; ++part) {
        Floats found[ROWS][4] = {};
        for (int p = 0; p < pairs; ++p) {
            const int one = w.first[p], other = w.second[p];
            const int32_t *one_high = &w.rows[0][one * lanes], *one_low = &w.rows[1][one * lanes];
            const int32_t *other_high = &w.rows[0][other * lanes], *other_low = &w.rows[1][other * lanes];
            Sums real[4] = {}, imaginary[4] = {};
            for (int quad = 0; quad < w.num_quads; ++quad) {
                const Ints a = broadcast(one_high[quad]), b = broadcast(one_low[quad]);
                const Ints c = broadcast(other_high[quad]), d = broadcast(other_low[quad]);
                for (int k = 0; k < 4; ++k) {
                    const Codes codes = Codes::of(w.codes[quad * VECTORS + 4 * part + k]);
                    Sums::add(real[k], codes, a, b);
                    Sums::add(imaginary[k], codes, c, d);
                }
            }
            for (int k = 0; k < 4; ++k) {
                const Floats x = Sums::total(real[k]) * w.worths[one] + w.constants[one];
                const Floats y = Sums::total(imaginary[k]) * w.worths[other] + w.constants[other];
                const Floats c = load<Floats>(&w.cosines[p * TILE + (4 * part + k) * LANES]);
                const Floats s = load<Floats>(&w.sines[p * TILE + (4 * part + k) * LANES]);
                const Floats turned_x = x * c - y * s, turned_y = x * s + y * c;
                for (int r = 0; r < ROWS; ++r) {
                    found[r][k] += turned_x * w.tile_cosine[(row + r) * pairs + p];
                    found[r][k] += turned_y * w.tile_sine[(row + r) * pairs + p];
                }
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            in_order(found[r], found[r]);
            for (int k = 0; k < 4; ++k) store(scores + r * RUN + part * BYTES + k * LANES, found[r][k]);
        }
    }
}

// Values of a run under their shares, which `weighed` belong to.
template <int NBITS, int ROWS>
void add_values(Worker& w, const uint8_t* planes, int64_t tile_stride, int length, const Weighed* weighed,
                const Partial* partials) {
    constexpr int TOGETHER = 2;  // dimensions, so that shares are read half as often
    const int parts = round_up(length, BYTES) / BYTES;
    const int64_t dims = w.call.value_dim;
    for (int64_t d0 = 0; d0 < dims; d0 += LANES) {
        Floats found[ROWS][LANES];
        const int count = static_cast<int>(std::min<int64_t>(LANES, dims - d0));
        for (int k = count; k < LANES; ++k)
            for (int r = 0; r < ROWS; ++r) found[r][k] = Floats{};
        for (int k = 0; k < count; k += TOGETHER) {
            Sums sums[ROWS][TOGETHER] = {};
            const uint8_t* from = planes + (d0 + k) * NBITS * PLANE;
            const int next = k + 1 < count ? NBITS * PLANE : 0;  // the last one again, for lanes that are not read
            for (int part = 0; part < parts; ++part) {
                const uint8_t* place = from + part / PARTS * tile_stride;
                const Codes one = Codes::of(expand<NBITS>(place, part % PARTS));
                const Codes other = Codes::of(expand<NBITS>(place + next, part % PARTS));
                for (int r = 0; r < ROWS; ++r) {
                    const Ints first = load<Ints>(&w.shares[0][(r * RUN + part * BYTES) / 4]);
                    const Ints second = load<Ints>(&w.shares[1][(r * RUN + part * BYTES) / 4]);
                    Sums::add(sums[r][0], one, first, second);
                    Sums::add(sums[r][1], other, first, second);
                }
            }
            for (int r = 0; r < ROWS; ++r)
                for (int i = 0; i < TOGETHER; ++i)
                    found[r][k + i] = Sums::total(sums[r][i]);
        }
        constexpr float OFFSET = 0.5f * static_cast<float>((1 << NBITS) - 1);
        for (int r = 0; r < ROWS; ++r) {
            float* to = partials[r].turned + d0;
            store(to, load<Floats>(to) + (sums(found[r]) - OFFSET * weighed[r].sum) * weighed[r].worth);
        }
    }
}

// Softmax bookkeeping of a run: scores become exp(score - maximum) in place. False where there is nothing to add.
// With factors, each is then multiplied with its own.
template <bool SCALED>
bool exponentiate(const Call& call, float* scores, int length, int64_t b, int64_t row, int64_t column,
                  Partial& partial, int value_dim, const float* factors, float& most_scaled) {
    const int padded = round_up(length, TILE);
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
    Floats total = {}, top = {};
    for (int t = 0; t < padded; t += LANES) {
        Floats share = exponential(load<Floats>(scores + t) - reference);
        total += share;
        if constexpr (SCALED) {
            share *= load<Floats>(factors + t);
            top = larger(share, top);
        }
        store(scores + t, share);
    }
    partial.total += sum(total);
    if constexpr (SCALED) most_scaled = largest(top);
    return true;
}

template <int ROWS>
void attend_coded(Worker& w, const Block& block, int64_t b, int64_t h, int64_t row, int64_t token, int length,
                  int64_t column, Partial* partials) {
    const Call& call = w.call;
    const bool turns = !block.is_rotated && block.num_pairs > 0;
    const int64_t tiles = (block.num_tokens + TILE - 1) / TILE;
    const int64_t first_tile = token / TILE;
    Weighed weighed[ROWS];
    bool any = false;
    for (int done = 0; done < length; done += TILE) {
        const int64_t tile = first_tile + done / TILE;
        start_tile(w, block, b, tile);
        expand_tile(w, block.key_planes + (b * tiles + tile) * block.num_planes * PLANE);
        if (turns) {
            scale_basis(w);
            score_rebuilt<ROWS>(w, row, std::min(TILE, length - done), w.scores.data() + done);
        } else {
            score_tile<ROWS>(w, block, row, std::min(TILE, length - done), w.scores.data() + done);
        }
    }
    const uint8_t* scale_codes = block.value_scales + (b * call.num_heads + h) * tiles * TILE + token;
    const float top = block.largest[b * call.num_heads + h];
    const int padded = round_up(length, TILE);
    // Levels fall by a constant ratio, but for the last, which is zero.
    const float octave = std::log(call.value_levels[1]);
    for (int t = 0; t < padded; t += LANES) {
        const Ints level = __builtin_convertvector(load<QuarterLevels>(scale_codes + t), Ints);
        const Floats scale = exponential(to_floats(level) * octave) * top;
        store(w.token_scales.data() + t, choose(level == 255, Floats{}, scale));
    }
    for (int r = 0; r < ROWS; ++r) {
        float* scores = w.scores.data() + r * RUN;
        weighed[r] = {};
        int32_t *first = &w.shares[0][r * RUN / 4], *second = &w.shares[1][r * RUN / 4];
        float most = 0.0f;
        if (!exponentiate<true>(call, scores, length, b, row + r, column, partials[r], w.value_dim,
                                w.token_scales.data(), most)) {
            std::fill(first, first + padded / 4, 0);
            std::fill(second, second + padded / 4, 0);
            continue;
        }
        any = true;
        weighed[r] = to_weights<false>(scores, most, nullptr, first, second, padded);
    }
    if (!any) return;
    const int64_t row_bytes = call.value_dim * block.value_nbits * PLANE;
    const int64_t stride = call.num_heads * row_bytes;
    const uint8_t* planes = block.value_planes + (b * tiles + first_tile) * stride + h * row_bytes;
    switch (block.value_nbits) {
        case 1: return add_values<1, ROWS>(w, planes, stride, length, weighed, partials);
        case 2: return add_values<2, ROWS>(w, planes, stride, length, weighed, partials);
        case 3: return add_values<3, ROWS>(w, planes, stride, length, weighed, partials);
        case 4: return add_values<4, ROWS>(w, planes, stride, length, weighed, partials);
        case 5: return add_values<5, ROWS>(w, planes, stride, length, weighed, partials);
        case 6: return add_values<6, ROWS>(w, planes, stride, length, weighed, partials);
        case 7: return add_values<7, ROWS>(w, planes, stride, length, weighed, partials);
        default: return add_values<8, ROWS>(w, planes, stride, length, weighed, partials);
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
        float *scores = w.scores.data() + r * RUN, unused;
        if (exponentiate<false>(call, scores, length, b, row + r, column, partials[r], w.value_dim, nullptr, unused))
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
