// Attention of a few queries over a layer's cache, read as it is stored.
//
// One pass per key-value head and run of tokens: scores from the packed codes for all query rows of the head, a running
// softmax, values summed in code space. Threads take heads and runs; what they find is merged by log-sum-exp. Weights
// (queries in component space, probabilities) have 15 bits and a sign, or one byte for codes of few bits where the
// processor multiplies bytes; products and sums of them with codes are exact integers. Codes are counted from 0 here;
// what half of their range adds is taken off the sums. attention/cpu.py fills in the structures below and checks
// everything: nothing is checked here.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "simd.h"

namespace spectral {
namespace {

constexpr int RUN = 4 * TILE;  // tokens between two looks at the running maximum
constexpr int LINE = 64;       // bytes that come from memory together
constexpr int SMOOTH = 16;     // functions that `Block.mixing` has room for
constexpr float FULL_WAVE = 32767.0f;
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, CODED = 3 };

}  // namespace

// A run of tokens, exact or coded. Strides count elements. attention/cpu.py mirrors it field by field.
struct Block {
    int64_t num_tokens;
    int64_t kind;
    // Exact: [batch, head, token, dim], the last dimension contiguous. Under autocast keys and values are of two types.
    int64_t value_kind;
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
    const float* reach;         // [pair - num_fast, SMOOTH] the most a pair of length 1 has of each
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

// Of a row, with room for whole vectors behind.
INLINE int64_t heights_per_row(const Block& block) { return block.num_waves + 2 * LANES; }

INLINE int round_up(int64_t n, int64_t unit) { return static_cast<int>((n + unit - 1) / unit * unit); }

// Attention over some tokens before the division by the softmax's denominator, one query row.
struct Partial {
    float maximum, total;
    float* turned;  // [value dim, padded] in the coded values' frame
    float* plain;   // [value dim, padded]
};

// A plane of one component of a quad.
struct Plane {
    int place;      // bytes from the quad's first plane
    int32_t worth;  // of its bits in a lane of four components
};

// Memory that will be read soon. Codes lie head by head within each tile, so what a head reads is a piece here and a
// piece there, which no processor fetches ahead by itself: waiting for them took half of the time.
struct Ahead {
    const uint8_t *place = nullptr, *end = nullptr;

    void expect(const uint8_t* from, int64_t bytes) {
        // Whole lines, the first one included wherever in it the memory begins.
        place = from - reinterpret_cast<uintptr_t>(from) % LINE;
        end = from + bytes;
    }
    // A few lines at a time, between the sums: a processor waits for only so many.
    void fetch(int lines) {
        for (; lines > 0 && place < end; --lines, place += LINE) __builtin_prefetch(place);
    }
    void fetch_rest() {
        for (; place < end; place += LINE) __builtin_prefetch(place);
    }
};

INLINE void fetch(const uint8_t* from, int64_t bytes) {
    Ahead ahead;
    ahead.expect(from, bytes);
    ahead.fetch_rest();
}

struct Worker {
    const Call& call;
    const int key_dim, value_dim;  // padded to whole vectors
    std::vector<float> query;      // [row, key dim] scaled
    std::vector<float> scores;     // [row of a chunk, RUN]
    std::vector<int32_t> shares[2];   // [row of a chunk, RUN / 4] probabilities times scales, as weights
    std::vector<float> token_scales;  // [RUN]
    // Of the coded block at hand; components are filled up to whole vectors.
    int count = 0, width = 0, num_quads = 0;
    int num_fine = 0;              // quads, the first ones, whose weights are not rounded to bytes
    int64_t components_before = 0;
    std::vector<uint8_t> nbits;    // [component] 0 behind the last
    std::vector<int> places;       // [quad] its first plane, counted from the head's first
    std::vector<Plane> further;    // planes that not all components of a quad have
    std::vector<int> first_further;  // [quad + 1] in these
    int64_t planes_before = 0, num_key_planes = 0;
    std::vector<float> offsets;    // [component] half of the codes' range
    std::vector<int32_t> is_fine;  // [component] all bits or none
    std::vector<float> projected;  // [row, component]
    std::vector<float> scales;     // [component] of the tile at hand
    std::vector<float> scaled;     // [row of a chunk, component] at work
    std::vector<int32_t> weights[2];  // [row of a chunk, component / 4]
    std::vector<Bytes> codes;      // [quad, VECTORS] of a tile, four components a lane
    std::vector<double> turn;      // [2, rotary pair] of the tile at hand's first token
    std::vector<float> short_turn; // the same
    std::vector<float> cosine, sine;  // [row, rotary pair]: the mean's term, or the queries, seen from block start
    std::vector<float> tile_cosine, tile_sine;  // [row, rotary pair] seen from the tile's first token
    std::vector<float> height;     // [row] what one of the integers is worth in which `cosine` and `sine` count then
    std::vector<int32_t> heights;  // [row of a chunk, wave] what the mean's term has of each, two integers of 16 bits
    std::vector<float> mean;       // [key dim]
    std::vector<float> fixed;      // [row]: the mean's term of dimensions that do not rotate
    // Where keys are rebuilt: pairs of dimensions, also of those that do not rotate; key_dim stands for none.
    std::vector<int> first, second;
    std::vector<float> cosines, sines;  // [pair, 128]
    std::vector<float> columns;    // [key dim + 1, component] the basis
    std::vector<int32_t> rows[2];  // [key dim + 1, component / 4] the basis under the tile's scales
    std::vector<float> worths, constants;  // [key dim + 1]
    int64_t next_tile = -1;
    Ahead next_keys, values;       // the next tile's, and those of the run at hand

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

// n shares of tokens as weights of a byte. What rounding takes from one token is given to one behind it, so that
// the many whose share is less than one weight keep what they have together.
INLINE Weighed to_byte_weights(const float* from, float most, int32_t* to, int n) {
    const float factor = most > 1e-33f ? FULL_BYTE / most : 0.0f;
    constexpr int TOGETHER = 4;  // each waits for the one before it in its own place only
    Floats rest[TOGETHER] = {}, sums = {};
    for (int t = 0; t < n; t += TOGETHER * LANES)
        for (int k = 0; k < TOGETHER; ++k) {
            const Floats exact = load<Floats>(from + t + k * LANES) * factor + rest[k];
            const Ints whole = rounded(exact);
            const Floats kept = to_floats(whole);
            rest[k] = exact - kept;
            sums += kept;
            store_byte_weights(whole, to + (t + k * LANES) / 4);
        }
    return {most / FULL_BYTE, sum(sums)};
}

// to = a * b, and the largest magnitude.
INLINE float multiply(const float* a, const float* b, float* to, int n) {
    Floats peak = {};
    for (int i = 0; i < n; i += LANES) {
        const Floats value = load<Floats>(a + i) * load<Floats>(b + i);
        peak = larger(peak, magnitude(value));
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

// What n scales' bytes stand for, times a factor. There is room for whole vectors.
INLINE void scales_of(const uint8_t* levels, int n, const float* meanings, float factor, float* to) {
    // Levels fall by a constant ratio, but for the last, which is zero.
    const float step = std::log(meanings[1]);
    uint8_t rest[LANES] = {};
    for (int i = 0; i < n; i += LANES) {
        const bool is_whole = n - i >= LANES;
        if (!is_whole) std::copy(levels + i, levels + n, rest);
        const Ints level = widen(is_whole ? levels + i : rest);
        store(to + i, choose(level == 255, Floats{}, exponential(to_floats(level) * step) * factor));
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

// A basis to rebuild keys with, and the tables of their rotation.
void start_rebuilding(Worker& w, const Block& block, const int8_t* vectors, const float* vector_scales) {
    const int dims = static_cast<int>(w.call.key_dim), pairs = static_cast<int>(block.num_pairs);
    w.columns.assign(static_cast<size_t>(dims + 1) * w.width, 0.0f);
    for (int i = 0; i < w.count; ++i)
        for (int d = 0; d < dims; ++d)
            w.columns[d * w.width + i] = vector_scales[i] * static_cast<float>(vectors[i * dims + d]);
    for (auto& each : w.rows) each.assign(static_cast<size_t>(dims + 1) * w.width / 4, 0);
    w.worths.assign(dims + 1, 0.0f);
    w.constants.assign(dims + 1, 0.0f);
    // Dimensions that do not rotate are turned by nothing.
    w.cosines.assign(w.first.size() * TILE, 1.0f);
    w.sines.assign(w.first.size() * TILE, 0.0f);
    std::copy(block.cosines, block.cosines + pairs * TILE, w.cosines.begin());
    std::copy(block.sines, block.sines + pairs * TILE, w.sines.begin());
}

// The unit in which the mean's term becomes integers. A pair turns from tile to tile but keeps its length, so lengths
// bound all that comes: each integer has 16 bits, and every whole sum of products with waves 32. Sums on the way there
// may wrap around.
void start_waves(Worker& w, const Block& block, int64_t b) {
    const int pairs = static_cast<int>(block.num_pairs), fast = static_cast<int>(block.num_fast), slow = pairs - fast;
    w.heights.assign(4 * heights_per_row(block), 0);
    for (int64_t row = 0; row < w.call.num_rows; ++row) {
        float *cosine = &w.cosine[row * pairs], *sine = &w.sine[row * pairs];
        float total = 0.0f, most = 0.0f, smooth[SMOOTH] = {};
        for (int p = 0; p < pairs; ++p) {
            // Some models' rotations stretch.
            const float *start = block.start + b * block.start_stride + 2 * p;
            const float length = std::sqrt((cosine[p] * cosine[p] + sine[p] * sine[p]) *
                                           (start[0] * start[0] + start[1] * start[1]));
            total += length;
            if (p < fast) most = std::max(most, length);
            for (int j = 0; j < SMOOTH && p >= fast; ++j) smooth[j] += length * block.reach[(p - fast) * SMOOTH + j];
        }
        for (int j = 0; j < SMOOTH && slow; ++j) most = std::max(most, smooth[j]);
        // A little room for what rounding adds.
        most = std::max(most, 0.5f * total) * 1.002f;
        const float factor = most > 1e-33f ? FULL_WAVE / most : 0.0f;
        for (int p = 0; p < pairs; ++p) cosine[p] *= factor, sine[p] *= factor;
        w.height[row] = most / (FULL_WAVE * FULL_WAVE);
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
    w.offsets.clear();
    for (int nbits = 8; nbits >= 1; --nbits)
        for (int i = 0; i < block.counts[9 * h + nbits]; ++i) {
            w.nbits.push_back(static_cast<uint8_t>(nbits));
            w.offsets.push_back(0.5f * static_cast<float>((1 << nbits) - 1));
        }
    // A block may have no component at all; there is room for some all the same.
    const int count = static_cast<int>(w.nbits.size()), width = std::max(LANES, round_up(count, LANES));
    w.count = count;
    w.width = width;
    w.components_before = component;
    w.planes_before = plane;
    w.num_quads = (count + 3) / 4;
    w.num_key_planes = std::accumulate(w.nbits.begin(), w.nbits.end(), int64_t{0});
    w.nbits.resize(width, 0);
    w.places.assign(w.num_quads, 0);
    for (int quad = 1; quad < w.num_quads; ++quad) {
        const uint8_t* before = &w.nbits[4 * quad - 4];
        w.places[quad] = w.places[quad - 1] + before[0] + before[1] + before[2] + before[3];
    }
    w.further.clear();
    w.first_further.assign(1, 0);
    for (int quad = 0; quad < w.num_quads; ++quad) {
        const uint8_t* nbits = &w.nbits[4 * quad];
        int place = 4 * nbits[3] * PLANE;
        for (int k = 0; k < 4; ++k)
            for (int bit = nbits[3]; bit < nbits[k]; ++bit, place += PLANE)
                w.further.push_back({place, static_cast<int32_t>(1u << (8 * k + bit))});
        w.first_further.push_back(static_cast<int>(w.further.size()));
    }
    w.num_fine = 0;
    while (w.num_fine < w.num_quads && w.nbits[4 * w.num_fine] > ROUGH_NBITS) ++w.num_fine;
    w.is_fine.assign(width, 0);
    std::fill(w.is_fine.begin(), w.is_fine.begin() + 4 * w.num_fine, -1);
    w.offsets.resize(width, 0.0f);
    w.scales.assign(width, 0.0f);
    w.scaled.assign(4 * width, 0.0f);
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
    for (auto* each : {&w.cosine, &w.sine}) each->assign(call.num_rows * held + LANES, 0.0f);  // read in whole vectors
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
    w.height.assign(call.num_rows, 0.0f);
    if (!turns && pairs) start_waves(w, block, b);
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

INLINE const uint8_t* levels_of(const Worker& w, const Block& block, int64_t b, int64_t tile) {
    const int64_t tiles = (block.num_tokens + TILE - 1) / TILE;
    return block.key_scales + (b * tiles + tile) * block.num_components + w.components_before;
}

// The rotation of the tile's first token, what the rows look like from there, and the tile's scales.
void start_tile(Worker& w, const Block& block, int64_t b, int64_t tile) {
    const int pairs = static_cast<int>(block.num_pairs);
    const int64_t held = static_cast<int64_t>(w.cosine.size() - LANES) / w.call.num_rows;
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
    scales_of(levels_of(w, block, b, tile), w.count, w.call.key_levels, 1.0f, w.scales.data());
}

// Calls function(constant) with nbits, 1 to 8, as a constant of the compiler's.
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

// Components of a head in one tile, whose planes these are (codec/spectral/packing.py has their order): all of them, or without
// those quads that `add_rough` expands by itself.
void expand_tile(Worker& w, const uint8_t* planes, bool all) {
    for (int quad = 0; quad < w.num_quads; ++quad) {
        const uint8_t* nbits = &w.nbits[4 * quad];
        w.next_keys.fetch(1);
        if (!all && quad >= w.num_fine && nbits[0] == nbits[3]) continue;
        const uint8_t* from = planes + w.places[quad] * PLANE;
        const int shared = nbits[3];  // they fall
        Bytes* to = &w.codes[quad * VECTORS];
        const Plane* further = w.further.data() + w.first_further[quad];
        const int count = w.first_further[quad + 1] - w.first_further[quad];
        const auto expand_all = [from, to, further, count](auto constant) {
            constexpr int NBITS = decltype(constant)::value, PER_RUN = QUAD_TOKENS / LANES;
            for (int v = 0; v < VECTORS; ++v) {
                Bytes codes = {};
                if constexpr (NBITS > 0)
                    codes = expand<NBITS, QUAD_PLANE>(from + v / PER_RUN * NBITS * QUAD_PLANE, v % PER_RUN);
                for (int i = 0; i < count; ++i) codes = with_plane(codes, from + further[i].place, v, further[i].worth);
                to[v] = codes;
            }
        };
        if (shared)
            with_nbits(shared, expand_all);
        else
            expand_all(std::integral_constant<int, 0>());
    }
}

// Weights of the components under the tile's scales for ROWS rows, what one of them is worth, and what belongs to the
// score beside them.
template <int ROWS>
INLINE void weigh_components(Worker& w, int64_t row, float* worth, float* constant) {
    const int lanes = w.width / 4;
    Floats peaks[ROWS] = {}, sums[ROWS] = {};
    float factor[ROWS];
    for (int i = 0; i < w.width; i += LANES) {
        const Floats scale = load<Floats>(&w.scales[i]);
        for (int r = 0; r < ROWS; ++r) {
            const Floats value = load<Floats>(&w.projected[(row + r) * w.width + i]) * scale;
            peaks[r] = larger(peaks[r], magnitude(value));
            store(&w.scaled[r * w.width + i], value);
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        const float most = largest(peaks[r]);
        // Below this the quotient is infinite, and zeros times it are not numbers.
        factor[r] = most > 1e-33f ? FULL / most : 0.0f;
        worth[r] = most / FULL;
    }
    for (int i = 0; i < w.width; i += LANES) {
        const Floats offset = load<Floats>(&w.offsets[i]);
        const Ints is_fine = load<Ints>(&w.is_fine[i]);
        for (int r = 0; r < ROWS; ++r) {
            const Ints whole = rounded(load<Floats>(&w.scaled[r * w.width + i]) * factor[r]);
            store_weights(whole, &w.weights[0][r * lanes + i / 4], &w.weights[1][r * lanes + i / 4]);
            sums[r] += to_floats(ROUGH_NBITS ? keep_low(whole, is_fine) : whole) * offset;
        }
    }
    for (int r = 0; r < ROWS; ++r) constant[r] = w.fixed[row + r] - worth[r] * sum(sums[r]);
}

// What the mean's term of ROWS rows has of each wave in the tile at hand.
template <int ROWS>
INLINE void weigh_waves(Worker& w, const Block& block, int64_t row) {
    const int pairs = static_cast<int>(block.num_pairs), fast = static_cast<int>(block.num_fast);
    const float *cosine = &w.tile_cosine[row * pairs], *sine = &w.tile_sine[row * pairs];
    Floats smooth[ROWS][SMOOTH / LANES] = {}, other[ROWS][SMOOTH / LANES] = {};
    for (int p = fast; p < pairs; ++p)
        for (int j = 0; j < SMOOTH / LANES; ++j) {
            const Floats c = load<Floats>(block.mixing + (p - fast) * SMOOTH + j * LANES);
            const Floats s = load<Floats>(block.mixing + (pairs - fast + p - fast) * SMOOTH + j * LANES);
            for (int r = 0; r < ROWS; ++r) {
                smooth[r][j] += c * cosine[r * pairs + p];
                other[r][j] += s * sine[r * pairs + p];
            }
        }
    for (int r = 0; r < ROWS; ++r) {
        int32_t* heights = &w.heights[r * heights_per_row(block)];
        for (int p = 0; p < fast; p += LANES) {
            const Ints c = rounded(load<Floats>(cosine + r * pairs + p)), s = rounded(load<Floats>(sine + r * pairs + p));
            store(heights + p, (c & 0xffff) | bits<Ints>(bits<Words>(s) << 16));
        }
        // Behind the fast pairs, over what whole vectors left there.
        for (int j = 0; j < SMOOTH / LANES; ++j)
            store(heights + fast + j * LANES / 2,
                  __builtin_convertvector(rounded(smooth[r][j] + other[r][j]), HalfShorts));
    }
}

// Adds the products of the quads behind the fine ones with their weights' high bytes. Codes go from planes into products
// without a detour through memory.
template <int ROWS>
INLINE void add_rough(Worker& w, const uint8_t* planes, Floats (&found)[ROWS][VECTORS]) {
    constexpr int TOGETHER = ROWS == 4 ? VECTORS / 2 : VECTORS;  // as many sums as there are registers for
    constexpr int PER_RUN = QUAD_TOKENS / LANES;
    const int lanes = w.width / 4;
    for (int v0 = 0; v0 < VECTORS; v0 += TOGETHER) {
        Ints sums[ROWS][TOGETHER] = {};
        for (int quad = w.num_fine; quad < w.num_quads; ++quad) {
            Ints weights[ROWS];
            for (int r = 0; r < ROWS; ++r) weights[r] = broadcast(w.weights[0][r * lanes + quad]);
            const auto add = [&](auto codes_of) {
                for (int v = 0; v < TOGETHER; ++v) {
                    const Bytes codes = codes_of(v0 + v);
                    for (int r = 0; r < ROWS; ++r) sums[r][v] = add_byte_products(sums[r][v], weights[r], codes);
                }
            };
            const uint8_t* own = planes + w.places[quad] * PLANE;
            const uint8_t* nbits = &w.nbits[4 * quad];
            w.next_keys.fetch(1);
            w.values.fetch(1);
            const auto add_planes = [&](auto constant) {
                constexpr int NBITS = decltype(constant)::value;
                add([own](int v) {
                    return expand<NBITS, QUAD_PLANE>(own + v / PER_RUN * NBITS * QUAD_PLANE, v % PER_RUN);
                });
            };
            if (nbits[0] != nbits[3])
                add([&](int v) { return w.codes[quad * VECTORS + v]; });
            else if (nbits[0] == 1)
                add_planes(std::integral_constant<int, 1>());
            else if (nbits[0] == 2)
                add_planes(std::integral_constant<int, 2>());
            else
                add_planes(std::integral_constant<int, 3>());
        }
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < TOGETHER; ++v) found[r][v0 + v] += 256.0f * to_floats(sums[r][v]);
    }
}

// Scores of the tile at hand for ROWS rows from `row` on, keys in the rotated frame or without rotation.
template <int ROWS>
void score_tile(Worker& w, const Block& block, const uint8_t* planes, int64_t row, int length, float* scores) {
    const int vectors = round_up(length, BYTES) / LANES, lanes = w.width / 4;
    const int waves = static_cast<int>(block.num_waves);
    const int64_t room = heights_per_row(block);
    float worth[ROWS], constant[ROWS];
    weigh_components<ROWS>(w, row, worth, constant);
    if (waves) weigh_waves<ROWS>(w, block, row);
    Floats found[ROWS][VECTORS];
    constexpr int TOGETHER = 2;
    for (int v = 0; v < vectors; v += TOGETHER) {
        Sums sums[ROWS][TOGETHER] = {};
        for (int quad = 0; quad < w.num_fine; ++quad) {
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
    if constexpr (ROUGH_NBITS > 0) add_rough<ROWS>(w, planes, found);
    for (int v = 0; v < vectors; v += TOGETHER) {
        Ints sums[ROWS][TOGETHER] = {};
        for (int j = 0; j < waves; ++j)
            for (int k = 0; k < TOGETHER; ++k) {
                const Shorts wave = load<Shorts>(block.waves + 2 * (j * TILE + (v + k) * LANES));
                for (int r = 0; r < ROWS; ++r)
                    sums[r][k] =
                        add_products(sums[r][k], wave, bits<Shorts>(broadcast(w.heights[r * room + j])));
            }
        for (int r = 0; r < ROWS; ++r)
            for (int k = 0; k < TOGETHER; ++k)
                store(scores + r * RUN + (v + k) * LANES,
                      found[r][v + k] * worth[r] + (to_floats(sums[r][k]) * w.height[row + r] + constant[r]));
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
            for (int k = 0; k < 4; ++k) store(scores + r * RUN + part * BYTES + k * LANES, found[r][k]);
        }
    }
}

// Values of a run under their shares, which `weighed` belong to.
template <int NBITS, int ROWS>
void add_values(Worker& w, const uint8_t* planes, int64_t tile_stride, int length, const Weighed* weighed,
                const Partial* partials) {
    constexpr bool ROUGH = NBITS <= ROUGH_NBITS;
    constexpr int TOGETHER = ROUGH ? 4 : 2;  // dimensions, so that shares are read less often
    const int tiles = round_up(length, TILE) / TILE;
    const int64_t dims = w.call.value_dim;
    for (int64_t d0 = 0; d0 < dims; d0 += LANES) {
        Floats found[ROWS][LANES];
        const int count = static_cast<int>(std::min<int64_t>(LANES, dims - d0));
        for (int k = count; k < LANES; ++k)
            for (int r = 0; r < ROWS; ++r) found[r][k] = Floats{};
        for (int k = 0; k < count; k += TOGETHER) {
            std::conditional_t<ROUGH, Ints, Sums> sums[ROWS][TOGETHER] = {};
            const uint8_t* from = planes + (d0 + k) * NBITS * PLANE;
            w.next_keys.fetch(TOGETHER / 2);
            int next[TOGETHER];  // the last one again, for lanes that are not read
            for (int i = 0; i < TOGETHER; ++i) next[i] = std::min(i, count - 1 - k) * NBITS * PLANE;
            for (int tile = 0; tile < tiles; ++tile, from += tile_stride)
                for (int part = 0; part < PARTS; ++part) {
                    const int share = (tile * TILE + part * BYTES) / 4;
                    Bytes codes[TOGETHER];
                    for (int i = 0; i < TOGETHER; ++i) codes[i] = expand<NBITS, PLANE>(from + next[i], part);
                    for (int r = 0; r < ROWS; ++r) {
                        const Ints first = load<Ints>(&w.shares[0][r * RUN / 4 + share]);
                        if constexpr (ROUGH) {
                            for (int i = 0; i < TOGETHER; ++i)
                                sums[r][i] = add_byte_products(sums[r][i], bits<Ints>(codes[i]), bits<Bytes>(first));
                        } else {
                            const Ints second = load<Ints>(&w.shares[1][r * RUN / 4 + share]);
                            for (int i = 0; i < TOGETHER; ++i)
                                Sums::add(sums[r][i], Codes::of(codes[i]), first, second);
                        }
                    }
                }
            for (int r = 0; r < ROWS; ++r)
                for (int i = 0; i < TOGETHER; ++i) {
                    if constexpr (ROUGH)
                        found[r][k + i] = to_floats(sums[r][i]);
                    else
                        found[r][k + i] = Sums::total(sums[r][i]);
                }
        }
        constexpr float OFFSET = 0.5f * static_cast<float>((1 << NBITS) - 1);
        for (int r = 0; r < ROWS; ++r) {
            float* to = partials[r].turned + d0;
            store(to, load<Floats>(to) + (spectral::sums(found[r]) - OFFSET * weighed[r].sum) * weighed[r].worth);
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
    const int64_t value_bytes = call.value_dim * block.value_nbits * PLANE, value_stride = call.num_heads * value_bytes;
    const uint8_t* value_planes = block.value_planes + (b * tiles + first_tile) * value_stride + h * value_bytes;
    const uint8_t* scale_codes = block.value_scales + (b * call.num_heads + h) * tiles * TILE + token;
    const int padded = round_up(length, TILE);
    fetch(scale_codes, padded);
    Weighed weighed[ROWS];
    bool any = false;
    for (int done = 0; done < length; done += TILE) {
        const int64_t tile = first_tile + done / TILE;
        const uint8_t* planes = block.key_planes + ((b * tiles + tile) * block.num_planes + w.planes_before) * PLANE;
        if (tile + 1 < tiles) {
            w.next_keys.expect(planes + block.num_planes * PLANE, w.num_key_planes * PLANE);
            fetch(levels_of(w, block, b, tile + 1), w.count);
        }
        w.values.expect(value_planes + done / TILE * value_stride, value_bytes);
        start_tile(w, block, b, tile);
        expand_tile(w, planes, turns);
        if (turns) {
            scale_basis(w);
            score_rebuilt<ROWS>(w, row, std::min(TILE, length - done), w.scores.data() + done);
        } else {
            score_tile<ROWS>(w, block, planes, row, std::min(TILE, length - done), w.scores.data() + done);
        }
        w.values.fetch_rest();
        if (done + TILE < length) w.next_keys.fetch_rest();
    }
    scales_of(scale_codes, padded, call.value_levels, block.largest[b * call.num_heads + h], w.token_scales.data());
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
        if (block.value_nbits <= ROUGH_NBITS)
            weighed[r] = to_byte_weights(scores, most, first, padded);
        else
            weighed[r] = to_weights<false>(scores, most, nullptr, first, second, padded);
    }
    if (!any) return;
    with_nbits(static_cast<int>(block.value_nbits), [&](auto constant) {
        add_values<decltype(constant)::value, ROWS>(w, value_planes, value_stride, length, weighed, partials);
    });
    w.next_keys.fetch_rest();
}

template <int KIND, int ROWS>
void score_exact(Worker& w, const Block& block, int64_t b, int64_t h, int64_t row, int64_t token, int length) {
    const int64_t key_place = b * block.key_strides[0] + h * block.key_strides[1] + token * block.key_strides[2];
    const float* query = w.query.data() + row * w.key_dim;
    const int key_dim = static_cast<int>(w.call.key_dim);
    for (int t0 = 0; t0 < length; t0 += LANES) {
        Floats found[ROWS][LANES] = {};
        for (int k = 0; k < std::min(LANES, length - t0); ++k) {
            Floats product[ROWS] = {};
            for (int d = 0; d < key_dim; d += LANES) {
                const Floats key = numbers<KIND>(block.keys, key_place + (t0 + k) * block.key_strides[2] + d, key_dim - d);
                for (int r = 0; r < ROWS; ++r) product[r] += key * load<Floats>(query + r * w.key_dim + d);
            }
            for (int r = 0; r < ROWS; ++r) found[r][k] = product[r];
        }
        for (int r = 0; r < ROWS; ++r) store(w.scores.data() + r * RUN + t0, sums(found[r]));
    }
}

template <int KIND, int ROWS>
void add_exact(Worker& w, const Block& block, int64_t b, int64_t h, int64_t token, int length, Partial* partials) {
    const int64_t value_place = b * block.value_strides[0] + h * block.value_strides[1] + token * block.value_strides[2];
    const int value_dim = static_cast<int>(w.call.value_dim);
    constexpr int TOGETHER = 4;  // vectors of a token, so that sums do not wait for each other
    for (int d0 = 0; d0 < value_dim; d0 += TOGETHER * LANES) {
        const int vectors = std::min(TOGETHER, round_up(value_dim - d0, LANES) / LANES);
        Floats found[ROWS][TOGETHER] = {};
        const auto add = [&](auto count) {
            for (int t = 0; t < length; ++t)
                for (int i = 0; i < count; ++i) {
                    const int d = d0 + i * LANES;
                    const Floats value = numbers<KIND>(block.values, value_place + t * block.value_strides[2] + d, value_dim - d);
                    for (int r = 0; r < ROWS; ++r) found[r][i] += value * w.scores[r * RUN + t];
                }
        };
        // With a number that the compiler knows the sums stay in registers.
        if (vectors == TOGETHER)
            add(std::integral_constant<int, TOGETHER>());
        else
            add(vectors);
        for (int r = 0; r < ROWS; ++r)
            for (int i = 0; i < vectors; ++i) {
                float* to = partials[r].plain + d0 + i * LANES;
                store(to, load<Floats>(to) + found[r][i]);
            }
    }
}

// Calls `function` with the kind of exact tokens as a constant.
template <typename Function>
void with_kind(int64_t kind, const Function& function) {
    switch (kind) {
        case FLOAT32: return function(std::integral_constant<int, FLOAT32>());
        case BFLOAT16: return function(std::integral_constant<int, BFLOAT16>());
        default: return function(std::integral_constant<int, FLOAT16>());
    }
}

template <int ROWS>
void attend_exact(Worker& w, const Block& block, int64_t b, int64_t h, int64_t row, int64_t token, int length,
                  int64_t column, Partial* partials) {
    with_kind(block.kind, [&](auto kind) {
        score_exact<decltype(kind)::value, ROWS>(w, block, b, h, row, token, length);
    });
    bool any = false;
    for (int r = 0; r < ROWS; ++r) {
        float *scores = w.scores.data() + r * RUN, unused;
        if (exponentiate<false>(w.call, scores, length, b, row + r, column, partials[r], w.value_dim, nullptr, unused))
            any = true;
        else
            std::fill(scores, scores + length, 0.0f);
    }
    if (!any) return;
    with_kind(block.value_kind, [&](auto kind) {
        add_exact<decltype(kind)::value, ROWS>(w, block, b, h, token, length, partials);
    });
}

template <int ROWS>
void attend_run(Worker& w, const Block& block, int64_t b, int64_t h, int64_t row, int64_t token, int length,
                int64_t column, Partial* partials) {
    if (block.kind == CODED)
        attend_coded<ROWS>(w, block, b, h, row, token, length, column, partials);
    else
        attend_exact<ROWS>(w, block, b, h, row, token, length, column, partials);
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
