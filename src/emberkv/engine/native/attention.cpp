// Attention over a paged pool on CPU, for rows of many sequences at once.
//
// A row is one new token of one sequence. It sees its sequence's keys from position 0 (or from its window's begin) to
// its own. Keys are taken in spans cut at absolute positions. Over one span a row's softmax and weighted sum are
// computed whole; spans are folded together in order, by their log-sum-exps, as in flash attention (Dao et al. 2022,
// arXiv:2205.14135). No operation on a row depends on which rows are computed beside it, so a row has the same bits in
// a prompt computed at once, in one computed piece by piece, and in a decode step.

#include <cmath>
#include <memory>
#include <type_traits>

#include "vectors.hpp"

namespace emberkv {

constexpr int SPAN = 256;        // keys
constexpr int BATCH = 2 * ROWS;  // query rows whose scores over a span are held at once
constexpr float UNSEEN = -1e30f;  // a score so low that it weighs nothing

// cap * tanh(score / cap), with tanh|x| = (1 - e^-2|x|) / (1 + e^-2|x|), given the sign of x.
inline Floats capped(Floats score, float cap) {
    const Ints sign = Ints{} + INT32_MIN;
    Ints x = (Ints)(score * (1.0f / cap));
    Floats e = exp2_of((Floats)(x | sign) * (2.0f * LOG2_E));  // e^-2|x|
    Floats tanh = (1.0f - e) / (1.0f + e);
    return (Floats)((Ints)tanh | (x & sign)) * cap;
}

struct Softmax {
    float maximum, sum;  // maximum: of score * log2(e)
};

// Makes weights 2^(score - maximum) of a row's scores over ``keys`` keys, of which it sees [begin, end). Never inlined:
// a compiler might round differently in another place.
template <class Arithmetic, class Unit = typename Arithmetic::Unit>
__attribute__((noinline)) Softmax
softmax(float* scores, int keys, int begin, int end, float scale, float softcap, Unit* weights) {
    constexpr int STEP = LANES / Arithmetic::VALUES;
    if (begin >= end) {
        std::memset(weights, 0, size_t(keys / LANES) * STEP * sizeof(Unit));
        return {UNSEEN, 0};
    }
    if (softcap > 0)
        for (int k = 0; k < keys; k += LANES) store(scores + k, capped(load<Floats>(scores + k) * scale, softcap));
    std::fill(scores, scores + begin, UNSEEN);
    std::fill(scores + end, scores + keys, UNSEEN);
    const float factor = (softcap > 0 ? 1 : scale) * LOG2_E;
    Floats most = splat(UNSEEN);
    for (int k = 0; k < keys; k += LANES) most = larger(most, load<Floats>(scores + k));
    const float maximum = factor * largest(most);
    Floats sums = {};
    for (int k = 0; k < keys; k += LANES) {
        Floats weight = exp2_of(load<Floats>(scores + k) * factor - maximum);
        sums += weight;
        Arithmetic::put(weights + k / LANES * STEP, weight);
    }
    return {maximum, total(sums)};
}

// Adds a span's weighted values to those of the spans before it, both relative to their own maxima.
__attribute__((noinline)) void fold(Softmax& whole, float* values, const Softmax& span, const float* more, int dim) {
    if (span.maximum == UNSEEN) return;
    const float difference = span.maximum - whole.maximum, smaller = exp2_of(-std::fabs(difference));
    const float old_weight = difference > 0 ? smaller : 1.0f, new_weight = difference > 0 ? 1.0f : smaller;
    whole.sum = whole.sum * old_weight + span.sum * new_weight;
    whole.maximum = std::max(whole.maximum, span.maximum);
    for (int d = 0; d < dim; d += LANES)
        store(values + d, load<Floats>(values + d) * old_weight + load<Floats>(more + d) * new_weight);
}

// 16 rows of units, ``stride`` apart, to columns COLUMNS apart. units: a multiple of LANES.
template <class Unit>
void transpose(const Unit* rows, int stride, int units, Unit* to) {
    static_assert(sizeof(Unit) == 4);
#if defined(__AVX512F__)
    for (int first = 0; first < units; first += LANES) {
        __m512i a[16], b[16];
        for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(rows + i * stride + first);
        for (int i = 0; i < 16; i += 2) {
            b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
            b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
        }
        for (int i = 0; i < 16; i += 4)
            for (int j = 0; j < 2; j++) {
                a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
                a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
            }
        for (int i = 0; i < 8; i += 4)
            for (int j = 0; j < 4; j++) {
                b[2 * i + j] = _mm512_shuffle_i32x4(a[2 * i + j], a[2 * i + j + 4], 0x88);
                b[2 * i + j + 4] = _mm512_shuffle_i32x4(a[2 * i + j], a[2 * i + j + 4], 0xdd);
            }
        for (int j = 0; j < 8; j++) {
            const int u = first + j;
            _mm512_storeu_si512(to + u * COLUMNS, _mm512_shuffle_i32x4(b[j], b[j + 8], 0x88));
            _mm512_storeu_si512(to + (u + 8) * COLUMNS, _mm512_shuffle_i32x4(b[j], b[j + 8], 0xdd));
        }
    }
#else
    for (int u = 0; u < units; u++)
        for (int lane = 0; lane < LANES; lane++) to[u * COLUMNS + lane] = rows[lane * stride + u];
#endif
}

// Values as they are stored, put into units; one half of a pair beyond the end is zero.
void widen(const void* from, Type type, int count, float* to) {
    if (type == FP32) {
        copy(to, from, size_t(count) * 4);
    } else {
        for (int i = 0; i < count; i++) to[i] = widened(static_cast<const uint16_t*>(from)[i]);
    }
}

void widen(const void* from, Type, int count, uint32_t* to) { copy(to, from, size_t(count) * 2); }

// Two keys' values side by side, as products over keys take them.
void interleave(const void* even, const void* odd, Type, int count, uint32_t* to) {
    auto a = static_cast<const uint16_t*>(even), b = static_cast<const uint16_t*>(odd);
    for (int i = 0; i < count; i++) to[i] = uint32_t(a[i]) | (b ? uint32_t(b[i]) << 16 : 0);
}

}  // namespace emberkv

// Shared with kernels.py, field by field.
extern "C" {

struct Task {           // rows of one sequence, or of several whose slots are the same here
    int32_t first_row;  // in row_ids
    int32_t rows;
    int32_t table;       // where the slots begin
    int32_t first_span;
    int32_t last_span;   // not included
    int32_t stop;        // keys beyond are nobody's
    int32_t whole;       // its rows see nothing outside these spans, and it writes their output
};

struct AttentionCall {
    const void *queries, *keys, *values;  // strides are in elements, and 1 within a head
    void* out;                            // [rows, heads, dim]
    int64_t query_row, query_head, key_row, key_head, value_row, value_head;
    char* pool;  // this layer's keys in slot 0: [block_size, kv_heads, dim]
    int64_t slot_bytes, value_bytes;  // to the next slot's keys; to the same slot's values
    int32_t rows, heads, kv_heads, dim, block_size, type;
    float scale, softcap;  // softcap 0: none
    int32_t window;        // 0: none
    int32_t threads;
    const int64_t* slots;
    const int32_t* tables;     // per row: where its slots begin
    const int32_t* positions;  // per row
    const Task* tasks;
    int64_t num_tasks;
    const int32_t* row_ids;
    const int64_t* partial_of;  // per row: the index of its first span's partial result, or -1
    float* partials;            // [partials, heads, round_up(dim, LANES) + LANES]
};

}  // extern "C"

namespace emberkv {

template <class Arithmetic>
class Worker {
    using Unit = typename Arithmetic::Unit;

public:
    explicit Worker(const AttentionCall& call)
        : call_(call),
          type_(Type(call.type)),
          element_(call.type == FP32 ? 4 : 2),
          groups_(call.heads / call.kv_heads),
          dims_(round_up(call.dim, LANES)),
          units_((call.dim + Arithmetic::VALUES - 1) / Arithmetic::VALUES),
          unit_stride_(round_up(units_, LANES)) {}

    void store_new(int row) const {
        const int64_t position = call_.positions[row];
        char* keys = at(call_.tables[row], position);
        for (int head = 0; head < call_.kv_heads; head++) {
            const size_t size = size_t(call_.dim) * element_;
            char* to = keys + head * size;
            copy(to, element(call_.keys, row * call_.key_row + head * call_.key_head), size);
            copy(to + call_.value_bytes, element(call_.values, row * call_.value_row + head * call_.value_head), size);
        }
    }

    // All of a task's rows, for the query heads of one KV head.
    void attend(const Task& task, int kv_head) {
        const int count = task.rows * groups_;
        buffers_.take(*this, count);
        for (int i = 0; i < count; i++) {
            totals_[i] = {UNSEEN, 0};
            std::memset(sums_ + i * dims_, 0, size_t(dims_) * 4);
            const void* query = element(call_.queries, row_of(task, i) * call_.query_row + head_of(kv_head, i) * call_.query_head);
            queries_[i * unit_stride_ + units_ - 1] = 0;
            widen(query, type_, call_.dim, queries_ + i * unit_stride_);
        }
        for (int span = task.first_span; span < task.last_span; span++) {
            const int begin = span * SPAN, keys = std::min(SPAN, task.stop - begin);
            if (keys <= 0) break;
            pack(task, kv_head, begin, keys);
            for (int first = 0; first < count; first += BATCH)
                attend_span(task, kv_head, span, keys, first, std::min(BATCH, count - first));
        }
        if (task.whole)
            for (int i = 0; i < count; i++) finish(row_of(task, i), head_of(kv_head, i), totals_[i], sums_ + i * dims_);
    }

    void fold_partials(int row, int head) {
        buffers_.take(*this, 1);
        Softmax total{UNSEEN, 0};
        std::memset(sums_, 0, size_t(dims_) * 4);
        for (int span = 0; span <= call_.positions[row] / SPAN; span++) {
            const float* partial = partial_at(row, head, span);
            fold(total, sums_, {partial[dims_], partial[dims_ + 1]}, partial, dims_);
        }
        finish(row, head, total, sums_);
    }

private:
    int row_of(const Task& task, int i) const { return call_.row_ids[task.first_row + i / groups_]; }
    int head_of(int kv_head, int i) const { return kv_head * groups_ + i % groups_; }
    const char* element(const void* base, int64_t index) const { return static_cast<const char*>(base) + index * element_; }
    char* at(int64_t table, int64_t position) const {
        const int64_t slot = call_.slots[table + position / call_.block_size];
        return call_.pool + slot * call_.slot_bytes + position % call_.block_size * call_.kv_heads * call_.dim * element_;
    }
    float* partial_at(int row, int head, int span) const {
        return call_.partials + ((call_.partial_of[row] + span) * call_.heads + head) * (dims_ + LANES);
    }

    // Lays a span out for products: keys transposed, values as they are.
    void pack(const Task& task, int kv_head, int begin, int keys) {
        const char* from[SPAN];
        for (int k = 0; k < keys; k++) from[k] = at(task.table, begin + k) + int64_t(kv_head) * call_.dim * element_;
        for (int k = 0; k < keys; k += LANES) {
            for (int lane = 0; lane < LANES; lane++) {
                Unit* row = rows_ + lane * unit_stride_;
                row[units_ - 1] = 0;
                if (k + lane < keys) widen(from[k + lane], type_, call_.dim, row);
                else std::memset(row, 0, size_t(units_) * sizeof(Unit));
            }
            transpose(rows_, unit_stride_, unit_stride_, keys_ + k / COLUMNS * unit_stride_ * COLUMNS + k % COLUMNS);
        }
        constexpr int DEPTH = SPAN / Arithmetic::VALUES;
        const int depth = round_up(keys, LANES) / Arithmetic::VALUES;
        for (int u = 0; u < depth; u++) {
            const int k = u * Arithmetic::VALUES;
            for (int d = 0; d < dims_; d += COLUMNS) {
                Unit* to = values_ + (d / COLUMNS * DEPTH + u) * COLUMNS;
                const int count = std::min(COLUMNS, call_.dim - d);
                if (k >= keys) std::memset(to, 0, COLUMNS * sizeof(Unit));
                else put_values(from[k] + d * element_ + call_.value_bytes, k + 1 < keys ? from[k + 1] + d * element_ + call_.value_bytes : nullptr, count, to);
            }
        }
    }

    void put_values(const char* even, const char* odd, int count, uint32_t* to) { interleave(even, odd, type_, count, to); }
    void put_values(const char* even, const char*, int count, float* to) { widen(even, type_, count, to); }

    void attend_span(const Task& task, int kv_head, int span, int keys, int first, int count) {
        const int begin = span * SPAN, columns = round_up(keys, LANES);
        constexpr int DEPTH = SPAN / Arithmetic::VALUES;
        multiply<Arithmetic>(
            queries_ + first * unit_stride_, count, unit_stride_, keys_, columns, unit_stride_, units_, scores_, SPAN
        );
        Softmax spans[BATCH];
        for (int i = 0; i < count; i++) {
            const int position = call_.positions[row_of(task, first + i)];
            const int seen_from = call_.window > 0 ? std::max(0, position - call_.window + 1 - begin) : 0;
            const int seen_to = std::clamp(position + 1 - begin, 0, keys);
            spans[i] = softmax<Arithmetic>(
                scores_ + i * SPAN, columns, std::min(seen_from, columns), seen_to, call_.scale, call_.softcap, weights_ + i * DEPTH
            );
        }
        multiply<Arithmetic>(
            weights_, count, DEPTH, values_, dims_, DEPTH, columns / Arithmetic::VALUES, products_, dims_
        );
        for (int i = 0; i < count; i++) {
            const float* product = products_ + i * dims_;
            if (task.whole) {
                fold(totals_[first + i], sums_ + (first + i) * dims_, spans[i], product, dims_);
                continue;
            }
            float* partial = partial_at(row_of(task, first + i), head_of(kv_head, first + i), span);
            copy(partial, product, size_t(dims_) * 4);
            partial[dims_] = spans[i].maximum;
            partial[dims_ + 1] = spans[i].sum;
        }
    }

    void finish(int row, int head, const Softmax& whole, float* sums) const {
        const float factor = 1.0f / whole.sum;
        for (int d = 0; d < dims_; d += LANES) store(sums + d, load<Floats>(sums + d) * factor);
        char* to = static_cast<char*>(call_.out) + (int64_t(row) * call_.heads + head) * call_.dim * element_;
        narrow(sums, type_, call_.dim, to);
    }

    // Memory of one thread, kept from call to call.
    struct Buffers {
        std::unique_ptr<char[]> memory;
        size_t size = 0;

        void take(Worker& worker, int count) {
            const size_t units = worker.unit_stride_, dims = worker.dims_, depth = SPAN / Arithmetic::VALUES;
            const size_t columns = round_up(int(dims), COLUMNS);
            char* next = nullptr;
            for (int pass = 0; pass < 2; pass++) {  // first how much, then where
                auto put = [&](auto*& where, size_t length) {
                    where = reinterpret_cast<std::remove_reference_t<decltype(where)>>(next);
                    next += (length * sizeof *where + 63) / 64 * 64;
                };
                put(worker.queries_, units * count);
                put(worker.totals_, count);
                put(worker.sums_, dims * count);
                put(worker.rows_, units * LANES);
                put(worker.keys_, units * SPAN);
                put(worker.values_, columns * depth);
                put(worker.scores_, size_t(SPAN) * BATCH);
                put(worker.weights_, depth * BATCH);
                put(worker.products_, dims * BATCH);
                if (pass == 1) return;
                const size_t needed = size_t(next - static_cast<char*>(nullptr)) + 64;
                if (needed > size) {
                    memory.reset(new char[needed]());
                    size = needed;
                }
                next = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
            }
        }
    };

    const AttentionCall& call_;
    const Type type_;
    const int element_, groups_, dims_, units_, unit_stride_;
    Unit *queries_, *rows_, *keys_, *values_, *weights_;
    float *sums_, *scores_, *products_;
    Softmax* totals_;
    static thread_local Buffers buffers_;
};

template <class Arithmetic>
thread_local typename Worker<Arithmetic>::Buffers Worker<Arithmetic>::buffers_;

template <class Arithmetic>
void attend(const AttentionCall& call) {
#pragma omp parallel num_threads(call.threads)
    {
        Worker<Arithmetic> worker(call);
#pragma omp for schedule(static)
        for (int row = 0; row < call.rows; row++) worker.store_new(row);
#pragma omp for schedule(dynamic, 1)
        for (int64_t unit = 0; unit < call.num_tasks * call.kv_heads; unit++)
            worker.attend(call.tasks[unit / call.kv_heads], int(unit % call.kv_heads));
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < int64_t(call.rows) * call.heads; unit++)
            if (call.partial_of[unit / call.heads] >= 0) worker.fold_partials(int(unit / call.heads), int(unit % call.heads));
    }
}

}  // namespace emberkv

EMBERKV_EXPORT int32_t emberkv_span() { return emberkv::SPAN; }

EMBERKV_EXPORT void emberkv_attend(const AttentionCall* call) {
#if defined(__AVX512BF16__)
    if (call->type == emberkv::BF16) return emberkv::attend<emberkv::Bf16Pairs>(*call);
#endif
    emberkv::attend<emberkv::SinglePrecision>(*call);
}
