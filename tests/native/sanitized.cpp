// The kernel under sanitizers: random calls on heap buffers that end where the data ends, against plain scalar code.
//
// Usage: sanitized [seed] [attention cases]. Exit code 0 where everything agrees. See test_sanitized.py.
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#if __has_include(<sanitizer/common_interface_defs.h>)
#include <sanitizer/common_interface_defs.h>
#define HAS_DEATH_CALLBACK
#endif

#include "attend.cpp"
#include "encode.cpp"

// The scalar code's inner loop is most of the time, and is not what is looked at.
#define UNCHECKED __attribute__((no_sanitize("address", "undefined")))

namespace {

using spectral::Block;
using spectral::Call;

constexpr int64_t TILE = 128;
constexpr int64_t ROW = 16;
constexpr float NOTHING = -std::numeric_limits<float>::infinity();
constexpr float NEVER = std::numeric_limits<float>::quiet_NaN();
// As in tests/attention/test_cpu.py.
constexpr double TOLERANCE = spectral::ROUGH_NBITS > 0 ? 5e-2 : 6e-3;
// Multiplications of the scalar code in one case.
constexpr int64_t BUDGET = 6000000;

std::string current = "none";

struct Random {
    uint64_t state;

    uint64_t next() {
        uint64_t z = state += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return z ^ z >> 31;
    }
    int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
    int64_t from(int64_t low, int64_t high) { return low + below(high - low + 1); }
    bool chance(double share) { return uniform() < share; }
    double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
    // Nearly: four uniform numbers, which ends at 3.5 standard deviations.
    double normal() {
        const uint64_t z = next();
        const double sum = static_cast<double>((z & 0xffff) + (z >> 16 & 0xffff) + (z >> 32 & 0xffff) + (z >> 48));
        return (sum / 65536 - 2) * 1.7320508;
    }
    template <typename T, size_t N>
    T any(const T (&choices)[N]) {
        return choices[below(N)];
    }
};

Random rng{0};

// Ends where its allocation ends, so that a read past it is seen; empty ones are null, as torch's are. Half of them
// start off the allocator's alignment, as views do.
template <typename T>
class Exact {
  public:
    Exact() = default;
    explicit Exact(int64_t count, T value = T()) : count_(count), shift_(rng.chance(0.5) ? rng.below(4) : 0) {
        if (count == 0) return;
        held_.reset(new T[static_cast<size_t>(count + shift_)]);
        for (int64_t i = 0; i < count; ++i) data()[i] = value;
    }
    T* data() { return count_ ? held_.get() + shift_ : nullptr; }
    const T* data() const { return count_ ? held_.get() + shift_ : nullptr; }
    T& operator[](int64_t i) { return data()[i]; }
    const T& operator[](int64_t i) const { return data()[i]; }
    int64_t size() const { return count_; }

  private:
    int64_t count_ = 0, shift_ = 0;
    std::unique_ptr<T[]> held_;
};

Exact<uint8_t> random_bytes(int64_t count) {
    Exact<uint8_t> found(count);
    for (int64_t i = 0; i < count; ++i) found[i] = static_cast<uint8_t>(rng.next());
    return found;
}

uint16_t to_half(double x) {
    const uint16_t sign = x < 0 ? 0x8000 : 0;
    x = std::fabs(x);
    if (x == 0) return sign;
    const int exponent = std::max(std::ilogb(x), -14);
    const int mantissa = static_cast<int>(std::ldexp(x, 10 - exponent));
    return static_cast<uint16_t>(sign | (mantissa < 1024 ? mantissa : ((exponent + 15) << 10) + mantissa - 1024));
}

double from_half(uint16_t half) {
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    const double size = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
    return half & 0x8000 ? -size : size;
}

UNCHECKED double dot(const double* a, const double* b, int64_t count) {
    double found[4] = {};
    int64_t i = 0;
    for (; i + 4 <= count; i += 4)
        for (int k = 0; k < 4; ++k) found[k] += a[i + k] * b[i + k];
    for (; i < count; ++i) found[0] += a[i] * b[i];
    return found[0] + found[1] + found[2] + found[3];
}

UNCHECKED void add(double* to, const double* from, double factor, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] += factor * from[i];
}

// Tables as Python hands them over, with entries at random.
struct Tables {
    Exact<float> entries, units, reaches;
    Exact<int8_t> parts;
    Exact<int16_t> distances;

    void draw() {
        entries = Exact<float>(8 * 256);
        units = Exact<float>(8, 40.0f);
        reaches = Exact<float>(4, 150.0f);
        parts = Exact<int8_t>(4 * 2 * 16);
        for (int i = 0; i < 4 * 2 * 16; ++i) parts[i] = static_cast<int8_t>(rng.from(-63, 63));
        distances = Exact<int16_t>(4 * 511 * 256);
        for (int nbits = 1; nbits <= 8; ++nbits)
            for (int window = 0; window < 256; ++window) {
                const int place = (nbits - 1) * 256 + window;
                if (nbits > 4) {
                    entries[place] = static_cast<float>((window >> (8 - nbits)) - ((1 << nbits) - 1) / 2.0);
                    continue;
                }
                const int first = (nbits - 1) * 32, second = first + 16;
                entries[place] = static_cast<float>(parts[first + (window >> 2 & 15)] +
                                                    parts[second + ((window ^ window >> 4) & 15)]);
            }
        for (int nbits = 1; nbits <= 4; ++nbits)
            for (int input = -255; input <= 255; ++input)
                for (int state = 0; state < 256; ++state) {
                    const int window = spectral::reversed(static_cast<uint8_t>(state));
                    const int gap = static_cast<int>(std::fabs(input - entries[(nbits - 1) * 256 + window]));
                    distances[((nbits - 1) * 511 + input + 255) * 256 + state] = static_cast<int16_t>(5 * gap);
                }
    }
    spectral::Trellis trellis() const { return {entries.data(), units.data(), reaches.data(), distances.data()}; }
};

Tables tables;

// What a token of a tile's stream stands for, bit by bit; `before` is the byte that the stream goes on from.
double decode(const uint8_t* stream, uint8_t before, int64_t nbits, int64_t token) {
    int window = 0;
    for (int64_t i = 0; i < 8; ++i) {
        const int64_t bit = (token + 1) * nbits - 8 + i;
        window |= (bit < 0 ? before >> (8 + bit) & 1 : stream[bit / 8] >> (bit % 8) & 1) << i;
    }
    return tables.entries[(nbits - 1) * 256 + window];
}

// The byte that a stream goes on from: the last of the tile before, whose streams lie `tile_bytes` ahead, or a carry.
uint8_t byte_before(const uint8_t* stream, int64_t nbits, int64_t tile, int64_t tile_bytes, uint8_t carry) {
    return tile ? stream[nbits * ROW - 1 - tile_bytes] : carry;
}

struct Shape {
    int64_t batch, heads, group, query_length, key_dim, value_dim;
    int64_t rows() const { return group * query_length; }
};

// One block and what it stands for; [batch, head, token, dim].
struct Tokens {
    Block block = {};
    std::string name;
    std::vector<double> keys, values;
    Exact<float> floats[2];
    Exact<uint16_t> halves[2];
    Exact<uint8_t> key_streams, key_carries, key_scales, value_streams, value_carries, value_scales;
    Exact<int8_t> vectors;
    Exact<float> vector_scales, start, mixing, reach, largest;
    Exact<int16_t> waves;
    Exact<uint16_t> mean;
    Exact<int32_t> counts, first, second;
    Exact<double> step, tile_step;
};

std::unique_ptr<Tokens> exact_tokens(const Shape& shape, int64_t count, const int64_t (&kinds)[2]) {
    auto made = std::make_unique<Tokens>();
    Block& block = made->block;
    block.num_tokens = count;
    for (const int64_t kind : kinds)
        made->name += kind == spectral::FLOAT32 ? "fp32 " : kind == spectral::BFLOAT16 ? "bf16 " : "fp16 ";
    made->name += std::to_string(count);
    for (int which = 0; which < 2; ++which) {
        const int64_t kind = kinds[which];
        const int64_t dim = which ? shape.value_dim : shape.key_dim;
        spectral::ExactTokens& tokens = which ? block.exact_values : block.exact_keys;
        tokens.dtype = kind;
        int64_t strides[3];
        if (rng.chance(0.3)) {  // tokens outside heads, as projections leave them
            strides[1] = dim + rng.below(4);
            strides[2] = strides[1] * shape.heads + rng.below(9);
            strides[0] = strides[2] * count + rng.below(9);
        } else {
            strides[2] = dim + rng.below(2) * rng.below(9);
            strides[1] = strides[2] * (count + rng.below(3)) + rng.below(3);
            strides[0] = strides[1] * shape.heads + rng.below(9);
        }
        const int64_t size = count == 0 ? 0
                                        : (shape.batch - 1) * strides[0] + (shape.heads - 1) * strides[1] +
                                              (count - 1) * strides[2] + dim;
        // What lies between is not to be read, or not to matter.
        if (kind == spectral::FLOAT32)
            made->floats[which] = Exact<float>(size, NEVER);
        else
            made->halves[which] = Exact<uint16_t>(size, 0x7fff);
        std::vector<double>& dense = which ? made->values : made->keys;
        for (int64_t b = 0; b < shape.batch; ++b)
            for (int64_t h = 0; h < shape.heads; ++h)
                for (int64_t t = 0; t < count; ++t)
                    for (int64_t d = 0; d < dim; ++d) {
                        const int64_t place = b * strides[0] + h * strides[1] + t * strides[2] + d;
                        const float x = static_cast<float>(rng.normal() * (rng.below(64) ? 1 : 1e-6));
                        double held = x;
                        if (kind == spectral::FLOAT32) {
                            made->floats[which][place] = x;
                        } else if (kind == spectral::BFLOAT16) {
                            uint32_t word;
                            std::memcpy(&word, &x, sizeof word);
                            made->halves[which][place] = static_cast<uint16_t>(word >> 16);
                            word &= 0xffff0000u;
                            float cut;
                            std::memcpy(&cut, &word, sizeof cut);
                            held = cut;
                        } else {
                            const uint16_t half = to_half(x);
                            made->halves[which][place] = half;
                            held = from_half(half);
                        }
                        dense.push_back(held);
                    }
        const void* data = kind == spectral::FLOAT32 ? static_cast<const void*>(made->floats[which].data())
                                                     : static_cast<const void*>(made->halves[which].data());
        tokens.data = data;
        tokens.batch_stride = strides[0];
        tokens.head_stride = strides[1];
        tokens.token_stride = strides[2];
    }
    return made;
}

void add_rotation(Tokens& made, const Shape& shape, bool has_anchors) {
    Block& block = made.block;
    const int64_t pairs = rng.chance(0.5) ? shape.key_dim / 2 : rng.from(1, shape.key_dim / 2);
    const bool interleaved = rng.chance(0.3);
    const int64_t starts = rng.chance(0.5) ? shape.batch : 1;
    made.name += std::string(interleaved ? " interleaved " : " ") + std::to_string(pairs) + " pairs";
    made.first = Exact<int32_t>(pairs);
    made.second = Exact<int32_t>(pairs);
    made.start = Exact<float>(starts * pairs * 2);
    made.step = Exact<double>(pairs);
    made.tile_step = Exact<double>(pairs * 2);
    // Slow pairs made up of waves that are just their own.
    const int64_t slow = rng.from(0, std::min<int64_t>(8, pairs));
    made.waves = Exact<int16_t>(pairs * TILE * 2);
    made.mixing = Exact<float>(2 * slow * 16, 0.0f);
    made.reach = Exact<float>(slow * 16, 0.0f);
    for (int64_t i = 0; i < slow; ++i) {
        made.mixing[i * 16 + 2 * i] = 1.0f;
        made.mixing[(slow + i) * 16 + 2 * i + 1] = 1.0f;
        made.reach[i * 16 + 2 * i] = made.reach[i * 16 + 2 * i + 1] = 1.0f;
    }
    const int64_t gap = interleaved ? 0 : shape.key_dim - 2 * pairs;
    const int64_t lowest = rng.chance(0.3) ? rng.from(0, gap) : 0;  // dimensions that stay may come first
    for (int64_t p = 0; p < pairs; ++p) {
        made.first[p] = static_cast<int32_t>(lowest + (interleaved ? 2 * p : p));
        made.second[p] = static_cast<int32_t>(lowest + (interleaved ? 2 * p + 1 : p + pairs));
        const double step = made.step[p] = std::pow(1e-4, static_cast<double>(p) / static_cast<double>(pairs));
        made.tile_step[p] = std::cos(TILE * step);
        made.tile_step[pairs + p] = std::sin(TILE * step);
        for (int64_t t = 0; t < TILE; ++t) {
            const double cosine = std::cos(static_cast<double>(t) * step), sine = std::sin(static_cast<double>(t) * step);
            made.waves[(p * TILE + t) * 2] = static_cast<int16_t>(std::lround(32767 * cosine));
            made.waves[(p * TILE + t) * 2 + 1] = static_cast<int16_t>(std::lround(32767 * sine));
        }
        for (int64_t b = 0; b < starts; ++b) {
            const double angle = 6.2831853 * rng.uniform();
            made.start[(b * pairs + p) * 2] = static_cast<float>(1.1 * std::cos(angle));
            made.start[(b * pairs + p) * 2 + 1] = static_cast<float>(1.1 * std::sin(angle));
        }
    }
    block.rotation.num_pairs = pairs;
    block.rotation.first = made.first.data();
    block.rotation.second = made.second.data();
    block.rotation.start = made.start.data();
    block.rotation.start_stride = starts == 1 ? 0 : 2 * pairs;
    block.rotation.step = made.step.data();
    block.rotation.tile_step = made.tile_step.data();
    block.rotation.first_anchored = has_anchors ? rng.from(0, pairs) : pairs;
    block.rotation.num_fast = pairs - slow;
    block.rotation.num_waves = pairs;
    block.rotation.waves = made.waves.data();
    block.rotation.mixing = made.mixing.data();
    block.rotation.reach = made.reach.data();
}

// Rotates x by the rotation of `token` or, `by_anchors`, by that of its anchor, which does not scale.
void rotate(const Tokens& made, int64_t b, int64_t token, bool by_anchors, double* x) {
    const spectral::Rotation& rotation = made.block.rotation;
    for (int64_t p = 0; p < rotation.num_pairs; ++p) {
        if (by_anchors && p < rotation.first_anchored) continue;
        const double angle = rotation.step[p] * static_cast<double>(by_anchors ? token / TILE * TILE : token);
        const double c = std::cos(angle), s = std::sin(angle);
        const float* start = rotation.start + b * rotation.start_stride + 2 * p;
        const double length = by_anchors ? std::hypot(start[0], start[1]) : 1.0;
        const double cosine = (start[0] * c - start[1] * s) / length, sine = (start[0] * s + start[1] * c) / length;
        double &real = x[rotation.first[p]], &imaginary = x[rotation.second[p]];
        const double before = real;
        real = before * cosine - imaginary * sine;
        imaginary = before * sine + imaginary * cosine;
    }
}

// The widths of a head's components, falling.
std::vector<int> random_widths(int64_t most) {
    std::vector<int> widths;
    const int64_t way = rng.below(8);
    if (way == 0) return widths;
    const int same = static_cast<int>(rng.from(1, 8));
    const int64_t count = way == 1 ? std::min<int64_t>(most, 1) : way == 2 ? most : rng.from(1, most);
    for (int64_t i = 0; i < count; ++i) {
        const int nbits = way == 3 ? same : static_cast<int>(rng.below(9));
        if (nbits) widths.push_back(nbits);
    }
    std::sort(widths.rbegin(), widths.rend());
    return widths;
}

std::unique_ptr<Tokens> coded_tokens(const Shape& shape, int64_t count, int frame, int64_t value_nbits,
                                     int64_t most_components, const float* key_levels, const float* value_levels) {
    static const char* const names[] = {"rotated ", "anchored ", "plain "};
    auto made = std::make_unique<Tokens>();
    Block& block = made->block;
    const int64_t tiles = (count + TILE - 1) / TILE, dim = shape.key_dim;
    block.num_tokens = count;
    block.is_coded = 1;
    made->name = names[frame] + std::to_string(count) + " tokens";
    if (frame < 2) add_rotation(*made, shape, frame == 1);

    std::vector<std::vector<int>> widths;
    made->counts = Exact<int32_t>(shape.heads * 9);
    for (int64_t h = 0; h < shape.heads; ++h) {
        widths.push_back(random_widths(std::min(most_components, dim)));
        // There are no components of width 0: what is written there must not matter.
        made->counts[9 * h] = static_cast<int32_t>(rng.below(5));
        for (int nbits : widths.back()) {
            ++made->counts[9 * h + nbits];
            block.keys.num_rows += nbits;
        }
        block.keys.num_components += static_cast<int64_t>(widths.back().size());
        made->name += (h ? "," : " components ") + std::to_string(widths.back().size());
    }
    const int64_t components = block.keys.num_components;
    made->key_streams = random_bytes(shape.batch * tiles * block.keys.num_rows * ROW);
    made->key_carries = random_bytes(shape.batch * components);
    made->key_scales = Exact<uint8_t>(shape.batch * tiles * components);
    for (int64_t i = 0; i < made->key_scales.size(); ++i)
        made->key_scales[i] = static_cast<uint8_t>(rng.below(20) ? rng.below(64) : 255);
    made->vectors = Exact<int8_t>(shape.batch * components * dim);
    for (int64_t i = 0; i < made->vectors.size(); ++i) made->vectors[i] = static_cast<int8_t>(rng.from(-127, 127));
    made->vector_scales = Exact<float>(shape.batch * components);
    made->mean = Exact<uint16_t>(shape.batch * shape.heads * dim);
    for (int64_t i = 0; i < made->mean.size(); ++i) made->mean[i] = to_half(2 * rng.normal());
    for (int64_t b = 0; b < shape.batch; ++b) {
        int64_t place = b * components;
        for (const std::vector<int>& own : widths)
            for (size_t k = 0; k < own.size(); ++k) {
                // Rows of length one about, a falling spectrum, codes that fill their range.
                const double spread = 3 * std::pow(rng.from(1, dim), -0.7);
                const double row = 73.5 * std::sqrt(static_cast<double>(dim));
                const double range = own[k] > 4 ? 1 << own[k] : 256;
                made->vector_scales[place++] = static_cast<float>(3 * spread / (row * range));
            }
    }
    made->value_streams = random_bytes(shape.batch * tiles * shape.heads * shape.value_dim * value_nbits * ROW);
    made->value_carries = random_bytes(shape.batch * shape.heads * shape.value_dim);
    made->value_scales = Exact<uint8_t>(shape.batch * shape.heads * tiles * TILE);
    for (int64_t i = 0; i < made->value_scales.size(); ++i)
        made->value_scales[i] = static_cast<uint8_t>(rng.below(20) ? rng.below(48) : 255);
    made->largest = Exact<float>(shape.batch * shape.heads);
    for (int64_t i = 0; i < made->largest.size(); ++i)
        made->largest[i] = static_cast<float>((4 + rng.uniform()) / (value_nbits > 4 ? 1 << value_nbits : 256));

    block.keys.streams = made->key_streams.data();
    block.keys.carries = made->key_carries.data();
    block.keys.scales = made->key_scales.data();
    block.keys.vectors = made->vectors.data();
    block.keys.vector_scales = made->vector_scales.data();
    block.keys.mean = made->mean.data();
    block.keys.counts = made->counts.data();
    block.values.streams = made->value_streams.data();
    block.values.carries = made->value_carries.data();
    block.values.scales = made->value_scales.data();
    block.values.largest = made->largest.data();
    block.values.nbits = value_nbits;

    std::vector<double> axes(static_cast<size_t>(components * dim)), key(static_cast<size_t>(dim)), centre(key);
    for (int64_t b = 0; b < shape.batch; ++b) {
        for (int64_t i = 0; i < components * dim; ++i)
            axes[static_cast<size_t>(i)] = static_cast<double>(made->vectors[b * components * dim + i]) *
                                           made->vector_scales[b * components + i / dim];
        int64_t first_row = 0, first_component = 0;
        for (int64_t h = 0; h < shape.heads; ++h) {
            const std::vector<int>& own = widths[static_cast<size_t>(h)];
            const int64_t head = b * shape.heads + h;
            for (int64_t t = 0; t < count; ++t) {
                const int64_t tile = b * tiles + t / TILE;
                for (int64_t d = 0; d < dim; ++d) centre[d] = from_half(made->mean[head * dim + d]);
                rotate(*made, b, t, false, centre.data());
                std::fill(key.begin(), key.end(), 0.0);
                const int64_t tile_bytes = block.keys.num_rows * ROW;
                const uint8_t* stream = made->key_streams.data() + tile * tile_bytes + first_row * ROW;
                for (size_t k = 0; k < own.size(); stream += own[k++] * ROW) {
                    const int64_t component = first_component + static_cast<int64_t>(k);
                    const uint8_t before = byte_before(stream, own[k], t / TILE, tile_bytes,
                                                       made->key_carries[b * components + component]);
                    add(key.data(), axes.data() + component * dim,
                        decode(stream, before, own[k], t % TILE) *
                            key_levels[made->key_scales[tile * components + component]],
                        dim);
                }
                rotate(*made, b, t, true, key.data());
                for (int64_t d = 0; d < dim; ++d) key[d] += centre[d];
                made->keys.insert(made->keys.end(), key.begin(), key.end());
                const double scale =
                    made->largest[head] * value_levels[made->value_scales[head * tiles * TILE + t]];
                for (int64_t d = 0; d < shape.value_dim; ++d) {
                    const int64_t place = (tile * shape.heads + h) * shape.value_dim + d;
                    const uint8_t* values = made->value_streams.data() + place * value_nbits * ROW;
                    const uint8_t before =
                        byte_before(values, value_nbits, t / TILE, shape.heads * shape.value_dim * value_nbits * ROW,
                                    made->value_carries[head * shape.value_dim + d]);
                    made->values.push_back(scale * decode(values, before, value_nbits, t % TILE));
                }
            }
            for (int nbits : own) first_row += nbits;
            first_component += static_cast<int64_t>(own.size());
        }
    }
    return made;
}

// One row's attention, by the textbook.
std::vector<double> attend_row(const Call& call, const std::vector<std::unique_ptr<Tokens>>& held, int64_t b, int64_t h,
                               int64_t row, int64_t num_tokens) {
    const int64_t key_dim = call.key_dim, value_dim = call.value_dim, head = b * call.num_heads + h;
    const double never = -std::numeric_limits<double>::infinity();
    std::vector<double> query(static_cast<size_t>(key_dim)), scores;
    for (int64_t d = 0; d < key_dim; ++d) query[d] = call.query[(head * call.num_rows + row) * key_dim + d];
    scores.reserve(static_cast<size_t>(num_tokens));
    for (const auto& tokens : held) {
        const int64_t count = tokens->block.num_tokens;
        for (int64_t t = 0; t < count; ++t) {
            double score = call.scaling * dot(query.data(), tokens->keys.data() + (head * count + t) * key_dim, key_dim);
            if (call.softcap > 0) score = call.softcap * std::tanh(score / call.softcap);
            if (call.mask)
                score += call.mask[b * call.mask_batch + row % call.query_length * call.mask_query +
                                   static_cast<int64_t>(scores.size())];
            scores.push_back(score);
        }
    }
    const double sink =
        call.sink_logits ? call.sink_logits[h * (call.num_rows / call.query_length) + row / call.query_length] : never;
    double peak = sink;
    for (double score : scores) peak = std::max(peak, score);
    std::vector<double> rotated(static_cast<size_t>(value_dim)), plain(rotated);
    if (peak == never) return plain;
    double total = std::exp(sink - peak);
    size_t column = 0;
    for (const auto& tokens : held) {
        const int64_t count = tokens->block.num_tokens;
        std::vector<double>& to = tokens->block.is_coded ? rotated : plain;
        for (int64_t t = 0; t < count; ++t) {
            const double share = std::exp(scores[column++] - peak);
            total += share;
            add(to.data(), tokens->values.data() + (head * count + t) * value_dim, share, value_dim);
        }
    }
    if (call.hadamard)
        for (int64_t j = 0; j < value_dim; ++j)
            for (int64_t d = 0; d < value_dim; ++d) plain[d] += rotated[j] * call.hadamard[j * value_dim + d];
    for (double& x : plain) x /= total;
    return plain;
}

// The largest error over the largest value.
double attention_case(int64_t number) {
    static const int64_t dims[] = {40, 60, 64, 80, 96, 128, 256}, lengths[] = {1, 63, 128, 500, 513, 1100};
    Exact<float> key_levels(256), value_levels(256);
    for (int code = 0; code < 256; ++code) {
        key_levels[code] = code == 255 ? 0.0f : static_cast<float>(std::exp2(-code / 32.0));
        value_levels[code] = code == 255 ? 0.0f : static_cast<float>(std::exp2(-code / 16.0));
    }
    Shape shape = {rng.from(1, 3), rng.from(1, 3), rng.from(1, 16), rng.any({1, 1, 1, 2, 5}), dims[number % 7], 0};
    shape.value_dim = rng.below(6) ? shape.key_dim : rng.any(dims);
    const int64_t value_nbits = 1 + number % 8, length = lengths[number % 6];
    const int frame = static_cast<int>(number / 6 % 3);
    int64_t before = rng.below(3) ? rng.from(1, 70) : 0, after = rng.below(3) ? rng.any({1, 7, 70, 128, 513}) : 0;
    const bool has_second = rng.chance(0.25), is_coded = rng.below(12) != 0;
    const int64_t second = has_second ? rng.any({1, 128, 300}) : 0;
    if (!is_coded && before + after == 0) after = 33;
    const int64_t total = before + after + (is_coded ? length + second : 0);
    // Shapes give way to what the scalar code can do, the components last.
    const auto fits = [&] {
        const int64_t once = shape.batch * shape.heads * total;
        return once * (shape.rows() * (shape.key_dim + shape.value_dim) + 16 * shape.key_dim) <= BUDGET;
    };
    while (!fits() && shape.rows() > 1) {
        int64_t* const sizes[] = {&shape.batch, &shape.heads, &shape.group, &shape.query_length};
        int64_t& size = *sizes[rng.below(4)];
        if (size > 1) --size;
    }
    const int64_t most = std::max<int64_t>(9, BUDGET / (shape.batch * shape.heads * total * shape.key_dim));

    current = "attention " + std::to_string(number) + ": batch " + std::to_string(shape.batch) + ", heads " +
              std::to_string(shape.heads) + ", group " + std::to_string(shape.group) + ", queries " +
              std::to_string(shape.query_length) + ", dims " + std::to_string(shape.key_dim) + " and " +
              std::to_string(shape.value_dim) + ", value bits " + std::to_string(value_nbits);
    std::vector<std::unique_ptr<Tokens>> held;
    const auto exact = [&](int64_t count) { held.push_back(exact_tokens(shape, count, {rng.below(3), rng.below(3)})); };
    if (before || rng.below(8) == 0) exact(before);
    if (is_coded) {
        const auto coded = [&](int64_t count, int own) {
            held.push_back(
                coded_tokens(shape, count, own, value_nbits, most, key_levels.data(), value_levels.data()));
        };
        coded(length, frame);
        if (has_second) coded(second, static_cast<int>(rng.below(3)));
    }
    if (after) exact(after);
    for (const auto& tokens : held) current += "; " + tokens->name;

    Exact<Block> blocks(static_cast<int64_t>(held.size()));
    for (size_t i = 0; i < held.size(); ++i) blocks[static_cast<int64_t>(i)] = held[i]->block;
    Exact<float> query(shape.batch * shape.heads * shape.rows() * shape.key_dim);
    for (int64_t i = 0; i < query.size(); ++i) query[i] = static_cast<float>(rng.normal());
    Exact<float> output(shape.batch * shape.heads * shape.rows() * shape.value_dim, NEVER);
    Exact<float> mask, sink_logits, hadamard;
    Call call = {};
    if (rng.chance(0.5)) {
        const bool shared = rng.chance(0.3), additive = rng.chance(0.5);
        const int64_t rows = (shared ? 1 : shape.batch) * shape.query_length;
        mask = Exact<float>(rows * total);
        for (int64_t row = 0; row < rows; ++row) {
            const double hidden = rng.below(8) ? 0.4 : 1.0;  // all of it, now and then
            for (int64_t t = 0; t < total; ++t)
                mask[row * total + t] = rng.chance(hidden) ? NOTHING : additive ? static_cast<float>(rng.normal()) : 0;
        }
        call.mask = mask.data();
        call.mask_batch = shared ? 0 : shape.query_length * total;
        call.mask_query = total;
        current += shared ? "; one mask" : "; masks";
    }
    if (rng.chance(0.3)) {
        sink_logits = Exact<float>(shape.heads * shape.group);
        for (int64_t i = 0; i < sink_logits.size(); ++i) sink_logits[i] = static_cast<float>(rng.normal());
        call.sink_logits = sink_logits.data();
        current += "; sink logits";
    }
    if (is_coded) {
        hadamard = Exact<float>(shape.value_dim * shape.value_dim);
        for (int64_t i = 0; i < hadamard.size(); ++i)
            hadamard[i] = static_cast<float>(rng.normal() / std::sqrt(static_cast<double>(shape.value_dim)));
        call.hadamard = hadamard.data();
    }
    if (rng.chance(0.3)) {
        call.softcap = 8.0f;
        current += "; softcap";
    }
    call.blocks = blocks.data();
    call.num_blocks = blocks.size();
    call.query = query.data();
    call.output = output.data();
    call.batch = shape.batch;
    call.num_heads = shape.heads;
    call.num_rows = shape.rows();
    call.query_length = shape.query_length;
    call.key_dim = shape.key_dim;
    call.value_dim = shape.value_dim;
    call.num_threads = rng.from(1, 3);
    call.scaling = static_cast<float>(std::pow(static_cast<double>(shape.key_dim), -0.5));
    call.key_levels = key_levels.data();
    call.value_levels = value_levels.data();
    call.parts = tables.parts.data();
    current += "; threads " + std::to_string(call.num_threads);
    spectral::spectral_attend(&call);

    double worst = 0, largest = 0;
    for (int64_t b = 0; b < shape.batch; ++b)
        for (int64_t h = 0; h < shape.heads; ++h)
            for (int64_t row = 0; row < call.num_rows; ++row) {
                const std::vector<double> expected = attend_row(call, held, b, h, row, total);
                const float* found =
                    output.data() + ((b * shape.heads + h) * call.num_rows + row) * shape.value_dim;
                for (int64_t d = 0; d < shape.value_dim; ++d) {
                    const double error = std::fabs(found[d] - expected[d]);
                    worst = error <= worst ? worst : error;  // NaN stays
                    if (!(error == error)) return error;
                    largest = std::max(largest, std::fabs(expected[d]));
                }
            }
    return largest > 0 ? worst / largest : worst > 0 ? std::numeric_limits<double>::infinity() : 0;
}

// With rare huge numbers among them.
double heavy() { return rng.normal() * (rng.below(100) ? 1 : 12); }

bool close(double found, double expected, double tolerance) {
    return std::fabs(found - expected) <= tolerance * std::fabs(expected);
}

constexpr int64_t AWKWARD[] = {1, 7, 63, 127, 128, 129, 500, 513};

double mid_rise(double x, double half) { return std::min(std::max(std::floor(x) + 0.5, 0.5 - half), half - 0.5); }

// What is wrong; null where nothing is.
const char* key_case(int64_t number) {
    static const float clips[] = {1.0f, 0.85f, 0.7f, 0.55f, 0.42f, 0.32f};
    const int64_t batch = rng.from(1, 3), count = rng.from(1, 12), tokens = AWKWARD[number % 8];
    const int64_t tiles = (tokens + TILE - 1) / TILE, num_clips = rng.from(1, 6);
    current = "keys " + std::to_string(number) + ": batch " + std::to_string(batch) + ", components " +
              std::to_string(count) + ", tokens " + std::to_string(tokens);
    Exact<int32_t> widths(count), rows(count);
    int64_t num_rows = 0;
    for (int64_t c = 0; c < count; ++c) {
        rows[c] = static_cast<int32_t>(num_rows);
        num_rows += widths[c] = static_cast<int32_t>(c < 8 ? 1 + (c + number) % 8 : rng.from(1, 8));
    }
    Exact<float> coefficients(batch * count * tokens), ratios(num_clips);
    for (int64_t i = 0; i < num_clips; ++i) ratios[i] = clips[i];
    for (int64_t row = 0; row < batch * count; ++row) {
        // Some are zero throughout, some below the smallest normal number, some far from one.
        const double size = row % 7 == 5 ? 0 : row % 11 == 6 ? 1e-42 : std::pow(10, rng.from(-12, 12));
        for (int64_t t = 0; t < tokens; ++t)
            coefficients[row * tokens + t] = static_cast<float>(size * heavy());
    }
    Exact<uint8_t> streams(batch * tiles * num_rows * ROW, 0xa5), carries = random_bytes(batch * count);
    Exact<float> energies(batch * count * tiles, NEVER), overlaps(batch * count * tiles, NEVER);
    Exact<float> squares(batch * count * tiles, NEVER);
    spectral::KeyEncoding call = {};
    call.coefficients = coefficients.data();
    call.widths = widths.data();
    call.rows = rows.data();
    call.streams = streams.data();
    call.carries = carries.data();
    call.energies = energies.data();
    call.overlaps = overlaps.data();
    call.squares = squares.data();
    call.clips = ratios.data();
    call.batch = batch;
    call.num_components = count;
    call.num_tokens = tokens;
    call.num_rows = num_rows;
    call.num_clips = num_clips;
    call.num_threads = rng.from(1, 3);
    call.is_free = rng.below(2);
    call.trellis = tables.trellis();
    spectral::spectral_encode_keys(&call);
    for (int64_t row = 0; row < batch * count; ++row)
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t b = row / count, c = row % count, held = std::min(TILE, tokens - tile * TILE);
            const uint8_t* stream = streams.data() + ((b * tiles + tile) * num_rows + rows[c]) * ROW;
            const uint8_t before = byte_before(stream, widths[c], tile, num_rows * ROW, carries[row]);
            const float* x = coefficients.data() + row * tokens + tile * TILE;
            double energy = 0, overlap = 0, square = 0, sizes = 0, peak = 0;
            for (int64_t t = 0; t < held; ++t) {
                const double value = decode(stream, before, widths[c], t);
                energy += static_cast<double>(x[t]) * x[t];
                overlap += x[t] * value;
                sizes += std::fabs(x[t] * value);
                square += value * value;
                peak = std::max(peak, std::fabs(static_cast<double>(x[t])));
            }
            const int64_t place = row * tiles + tile;
            if (!close(squares[place], square, 1e-5)) return "the reconstruction has another length than it says";
            if (!(std::fabs(overlaps[place] - overlap) <= 1e-5 * sizes + 1e-37)) return "a wrong overlap";
            if (!(std::fabs(energies[place] - energy) <= 1e-5 * energy + 1e-37)) return "a wrong energy";
            if (peak < 1e-30 || widths[c] <= 4) continue;
            const double half = 1 << (widths[c] - 1);
            double along = -1;
            for (int64_t i = 0; i < num_clips; ++i) {
                double squares = 0, product = 0;
                for (int64_t t = 0; t < held; ++t) {
                    const double value = mid_rise(x[t] / (peak * ratios[i] / half), half);
                    squares += value * value;
                    product += x[t] * value;
                }
                along = std::max(along, product * product / squares);
            }
            // What is lost under the scale of least error.
            if (!(overlap * overlap / square >= along * (1 - 1e-4))) return "codes that lose more than they need";
        }
    return nullptr;
}

const char* value_case(int64_t number) {
    static const int64_t dims[] = {40, 60, 64, 80, 96, 128, 256};
    const int64_t batch = rng.from(1, 2), heads = rng.from(1, 3), dim = dims[number % 7], nbits = 1 + number % 8;
    const int64_t tokens = rng.any(AWKWARD), tiles = (tokens + TILE - 1) / TILE;
    current = "values " + std::to_string(number) + ": batch " + std::to_string(batch) + ", heads " +
              std::to_string(heads) + ", dim " + std::to_string(dim) + ", bits " + std::to_string(nbits) + ", tokens " +
              std::to_string(tokens);
    Exact<float> rotated(batch * heads * dim * tokens);
    for (int64_t i = 0; i < rotated.size(); ++i) rotated[i] = static_cast<float>(heavy());
    for (int64_t head = 0; head < batch * heads; ++head) {
        const int64_t quiet = rng.below(tokens);
        const double size = head % 2 ? 0 : std::pow(10, rng.from(-12, 12));
        for (int64_t d = 0; d < dim; ++d) {
            float& x = rotated[(head * dim + d) * tokens + quiet];
            x = static_cast<float>(x * size);
        }
    }
    Exact<uint8_t> streams(batch * tiles * heads * dim * nbits * ROW, 0xa5), carries = random_bytes(batch * heads * dim);
    Exact<float> energies(batch * heads * tokens, NEVER), overlaps(batch * heads * tokens, NEVER);
    Exact<float> squares(batch * heads * tokens, NEVER);
    const double half = static_cast<double>(1 << (nbits - 1));
    spectral::ValueEncoding call = {};
    call.values = rotated.data();
    call.streams = streams.data();
    call.carries = carries.data();
    call.energies = energies.data();
    call.overlaps = overlaps.data();
    call.squares = squares.data();
    call.batch = batch;
    call.num_heads = heads;
    call.head_dim = dim;
    call.num_tokens = tokens;
    call.nbits = nbits;
    call.num_threads = rng.from(1, 3);
    call.is_free = rng.below(2);
    call.trellis = tables.trellis();
    spectral::spectral_encode_values(&call);
    for (int64_t head = 0; head < batch * heads; ++head)
        for (int64_t token = 0; token < tiles * TILE; ++token) {
            const int64_t place = head * tokens + token;
            double energy = 0, overlap = 0, square = 0, sizes = 0;
            for (int64_t d = 0; d < dim && token < tokens; ++d) {
                const double x = rotated[(head * dim + d) * tokens + token];
                energy += x * x;
            }
            const double unit = std::max(std::sqrt(energy / static_cast<double>(dim)), 1.2e-38) / tables.units[nbits - 1];
            for (int64_t d = 0; d < dim; ++d) {
                const int64_t tile = head / heads * tiles + token / TILE;
                const uint8_t* stream = streams.data() + ((tile * heads + head % heads) * dim + d) * nbits * ROW;
                if (token >= tokens) {
                    for (int64_t bit = token % TILE * nbits; bit < (token % TILE + 1) * nbits; ++bit)
                        if (stream[bit / 8] >> (bit % 8) & 1) return "what fills up the last tile is not code 0";
                    continue;
                }
                const uint8_t before =
                    byte_before(stream, nbits, token / TILE, heads * dim * nbits * ROW, carries[head * dim + d]);
                const double value = decode(stream, before, nbits, token % TILE);
                const double x = rotated[(head * dim + d) * tokens + token], ideal = mid_rise(x / unit, half);
                const double edge = std::fabs(x / unit - std::round(x / unit));
                if (nbits > 4 && value != ideal && (std::fabs(value - ideal) > 1 || edge > 1e-3)) return "a wrong code";
                overlap += x * value;
                square += value * value;
                sizes += std::fabs(x * value);
            }
            if (token >= tokens) continue;
            if (!close(energies[place], energy, 1e-4)) return "a wrong energy";
            if (!(std::fabs(overlaps[place] - overlap) <= 1e-4 * sizes)) return "a wrong overlap";
            if (!close(squares[place], square, 1e-4)) return "a wrong square";
        }
    return nullptr;
}

// Sanitizers end the process where they find something, without a word on what it was doing.
void report() { std::printf("in %s\n", current.c_str()), std::fflush(stdout); }

}  // namespace

// The undefined-behaviour sanitizer calls this before it reports.
extern "C" void __ubsan_on_report() { report(); }

int main(int count, char** given) {
#if defined(HAS_DEATH_CALLBACK) && defined(__SANITIZE_ADDRESS__)
    __sanitizer_set_death_callback(report);
#endif
    const long seed = count > 1 ? std::atol(given[1]) : 20240607;
    const long cases = count > 2 ? std::atol(given[2]) : 252, encodings = std::min(56L, cases);
    double worst = 0;
    rng.state = static_cast<uint64_t>(seed);
    tables.draw();
    for (long i = 0; i < cases + 2 * encodings; ++i) {
        // Each from its own state, so that one fails alone as it does among the others.
        rng.state = static_cast<uint64_t>(seed) * 1000003u + static_cast<uint64_t>(i);
        const char* wrong = nullptr;
        if (i < cases) {
            const double error = attention_case(i);
            if (!(error <= TOLERANCE)) {
                std::printf("seed %ld, %s: relative error %.3g\n", seed, current.c_str(), error);
                return 1;
            }
            worst = std::max(worst, error);
        } else if (i % 2) {
            wrong = key_case((i - cases) / 2);
        } else {
            wrong = value_case((i - cases) / 2);
        }
        if (wrong) {
            std::printf("seed %ld, %s: %s\n", seed, current.c_str(), wrong);
            return 1;
        }
    }
    std::printf("seed %ld: %ld cases of attention, largest relative error %.2g, and %ld of encoding agree\n", seed, cases,
                worst, 2 * encodings);
    return 0;
}
