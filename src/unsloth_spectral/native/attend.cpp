// Attention of a few queries over a layer's cache in its stored form.
//
// One pass per key-value head and run of tokens: scores from the packed codes for all query rows of the head, a running
// softmax, values summed in code space. Threads take heads and runs; their partial results are merged by log-sum-exp.
// Weights (queries in component space, probabilities) have 15 bits and a sign, or one byte for codes of few bits where
// the processor multiplies bytes; products and sums of them with codes are exact integers. Codes are counted from 0
// here; half of their range is subtracted from the sums. attention/cpu.py fills in the structures of abi.h and checks
// everything: nothing is checked here.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "abi.h"
#include "coded.h"
#include "exact.h"
#include "softmax.h"
#include "worker.h"

namespace spectral {
namespace {

void start_head(Worker& w, int64_t b, int64_t h) {
    const Call& call = w.call;
    const float* from = call.query + (b * call.num_heads + h) * call.num_rows * call.key_dim;
    for (int64_t row = 0; row < call.num_rows; ++row)
        for (int64_t d = 0; d < call.key_dim; ++d)
            w.query[row * w.key_dim + d] = from[row * call.key_dim + d] * call.scaling;
    w.next_tile = -1;
}

struct Run {
    int64_t block, token, column;
    int length;
    int64_t cost;
};

const Block& block_at(const Call& call, int64_t i) { return i < call.num_blocks ? call.blocks[i] : *call.last; }

std::vector<Run> split(const Call& call) {
    std::vector<Run> runs;
    int64_t column = 0;
    for (int64_t i = 0; i < call.num_blocks + (call.last ? 1 : 0); ++i) {
        const Block& block = block_at(call, i);
        const int64_t num_tokens = block.count ? *block.count : block.num_tokens;
        for (int64_t token = 0; token < num_tokens; token += RUN) {
            const int length = static_cast<int>(std::min<int64_t>(RUN, num_tokens - token));
            runs.push_back({i, token, column + token, length, length * (block.is_coded ? 1 : 2)});
        }
        column += num_tokens;
    }
    return runs;
}

// Partial results of one thread, for its heads [first, last).
struct ThreadPartials {
    int64_t first = 0, last = 0;
    std::vector<float> numbers;
};

// Floats per row: the maximum, the total, the sums of coded and of exact values.
int64_t partial_size(int value_dim) { return 2 + 2 * value_dim; }

void work(Worker& w, const std::vector<Run>& runs, int64_t cost, int64_t from, int64_t to,
          ThreadPartials& thread) {
    const Call& call = w.call;
    const int64_t size = partial_size(w.value_dim), heads = call.batch * call.num_heads;
    thread.first = from / cost;
    thread.last = std::min(heads, (to + cost - 1) / cost);
    thread.numbers.assign(std::max<int64_t>(0, thread.last - thread.first) * call.num_rows * size, 0.0f);
    for (size_t i = 0; i < thread.numbers.size(); i += size) thread.numbers[i] = NOTHING;
    for (int64_t head = thread.first; head < thread.last; ++head) {
        const int64_t b = head / call.num_heads, h = head % call.num_heads;
        int64_t place = head * cost, current = -1;
        bool started = false;
        for (const Run& run : runs) {
            const bool mine = place >= from && place < to;
            place += run.cost;
            if (!mine) continue;
            if (!started) start_head(w, b, h);
            started = true;
            const Block& block = block_at(call, run.block);
            if (block.is_coded && current != run.block) start_block(w, block, b, h);
            current = run.block;
            for (int64_t row = 0; row < call.num_rows; row += MOST_ROWS) {
                Partial partials[MOST_ROWS];
                const int rows = static_cast<int>(std::min<int64_t>(MOST_ROWS, call.num_rows - row));
                float* numbers = thread.numbers.data() + ((head - thread.first) * call.num_rows + row) * size;
                for (int r = 0; r < rows; ++r) {
                    float* from = numbers + r * size;
                    partials[r] = {from[0], from[1], from + 2, from + 2 + w.value_dim};
                }
                const auto attend = block.is_coded ? attend_coded : attend_exact;
                attend(w, block, b, h, row, rows, run.token, run.length, run.column, partials);
                for (int r = 0; r < rows; ++r) {
                    numbers[r * size] = partials[r].maximum;
                    numbers[r * size + 1] = partials[r].total;
                }
                // The next rows read the same tiles again.
                if (row + rows < call.num_rows) w.next_tile = -1;
            }
        }
    }
}

// The output of one head: the threads' partial results merged, coded values multiplied with the Hadamard matrix.
void finish(const Call& call, const std::vector<ThreadPartials>& threads, int64_t head, int value_dim,
            std::vector<float>& buffer) {
    const int64_t size = partial_size(value_dim), h = head % call.num_heads;
    buffer.resize(2 * value_dim);
    for (int64_t row = 0; row < call.num_rows; ++row) {
        float maximum = NOTHING, total = 0.0f;
        const int64_t query_head = h * (call.num_rows / call.query_length) + row / call.query_length;
        const float sink_logit = call.sink_logits ? call.sink_logits[query_head] : NOTHING;
        maximum = sink_logit;
        for (const ThreadPartials& thread : threads)
            if (head >= thread.first && head < thread.last)
                maximum = std::max(maximum, thread.numbers[((head - thread.first) * call.num_rows + row) * size]);
        std::fill(buffer.begin(), buffer.end(), 0.0f);
        if (sink_logit != NOTHING) total += std::exp(sink_logit - maximum);
        for (const ThreadPartials& thread : threads) {
            if (head < thread.first || head >= thread.last) continue;
            const float* numbers = thread.numbers.data() + (((head - thread.first) * call.num_rows + row) * size);
            if (numbers[0] == NOTHING) continue;
            const float share = std::exp(numbers[0] - maximum);
            total += numbers[1] * share;
            for (int d = 0; d < 2 * value_dim; d += LANES)
                store(buffer.data() + d, load<Floats>(buffer.data() + d) + load<Floats>(numbers + 2 + d) * share);
        }
        float* values = buffer.data() + value_dim;
        if (call.hadamard)
            for (int64_t j = 0; j < call.value_dim; ++j)
                for (int64_t d = 0; d < call.value_dim; ++d)
                    values[d] += buffer[j] * call.hadamard[j * call.value_dim + d];
        float* to = call.output + (head * call.num_rows + row) * call.value_dim;
        const float divisor = total > 0.0f || total != total ? total : std::numeric_limits<float>::min();
        for (int64_t d = 0; d < call.value_dim; ++d) to[d] = values[d] / divisor;
    }
}

}  // namespace

extern "C" void spectral_attend(const Call* given) {
    const Call& call = *given;
    const std::vector<Run> runs = split(call);
    int64_t cost = 0;
    for (const Run& run : runs) cost += run.cost;
    const int64_t heads = call.batch * call.num_heads, total_cost = heads * cost;
    const int64_t pieces = heads * static_cast<int64_t>(runs.size());
    const int threads = static_cast<int>(std::max<int64_t>(1, std::min(call.num_threads, pieces)));
    std::vector<ThreadPartials> partials(threads);
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
                work(worker, runs, cost, total_cost * part / threads, total_cost * (part + 1) / threads,
                     partials[part]);
        }
#if defined(_OPENMP)
#pragma omp barrier
#endif
        std::vector<float> buffer;
        for (int64_t head = thread; head < heads; head += present) finish(call, partials, head, value_dim, buffer);
    }
}

}  // namespace spectral
