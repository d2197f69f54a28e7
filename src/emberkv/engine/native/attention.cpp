// Attention over a paged pool on CPU, for rows of many sequences at once.
//
// A row is one new token of one sequence. It sees its sequence's keys from position 0 (or from its window's begin) to
// its own. Keys are taken in spans cut at absolute positions. Over one span a row's softmax and weighted sum are
// computed whole; spans are folded together in order, by their log-sum-exps, as in flash attention (Dao et al. 2022,
// arXiv:2205.14135). No operation on a row depends on which rows are computed beside it, so a row has the same bits in
// a prompt computed at once, in one computed piece by piece, and in a decode step.

#include <memory>
#include <type_traits>

#include "calls.hpp"
#include "layout.hpp"
#include "softmax.hpp"

namespace emberkv {

constexpr int SPAN = 512;        // keys
constexpr int BATCH = 2 * ROWS;  // query rows whose scores over a span are held at once

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
            const int64_t at = row_of(task, i) * call_.query_row + head_of(kv_head, i) * call_.query_head;
            queries_[i * unit_stride_ + units_ - 1] = 0;
            widen(element(call_.queries, at), type_, call_.dim, queries_ + i * unit_stride_);
        }
        const char *here[SPAN], *next[SPAN];
        locate(task, kv_head, task.first_span * SPAN, next);
        for (int span = task.first_span; span < task.last_span; span++) {
            const int keys = std::min(SPAN, task.stop - span * SPAN);
            if (keys <= 0) break;
            std::copy(next, next + keys, here);
            pack(here, keys);
            locate(task, kv_head, (span + 1) * SPAN, next);
            const int ahead = span + 1 < task.last_span ? std::clamp(task.stop - (span + 1) * SPAN, 0, SPAN) : 0;
            for (int first = 0; first < count; first += BATCH) {
                const int last = std::min(first + BATCH, count);
                prefetch(next + ahead * first / count, next + ahead * last / count);
                attend_span(task, kv_head, span, keys, first, last - first);
            }
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

    const char* element(const void* base, int64_t index) const {
        return static_cast<const char*>(base) + index * element_;
    }

    char* at(int64_t table, int64_t position) const {
        const int64_t slot = call_.slots[table + position / call_.block_size], offset = position % call_.block_size;
        return call_.pool + slot * call_.slot_bytes + offset * call_.kv_heads * call_.dim * element_;
    }

    float* partial_at(int row, int head, int span) const {
        return call_.partials + ((call_.partial_of[row] + span) * call_.heads + head) * (dims_ + LANES);
    }

    // Where a span's keys of one head lie.
    void locate(const Task& task, int kv_head, int begin, const char** keys) const {
        const int size = call_.dim * element_, token = call_.kv_heads * size, stop = std::min(begin + SPAN, task.stop);
        const char* key = nullptr;
        for (int k = begin, left = 0; k < stop; k++, left--, key += token) {
            if (left == 0) {
                key = at(task.table, k) + int64_t(kv_head) * size;
                left = call_.block_size - k % call_.block_size;
            }
            keys[k - begin] = key;
        }
    }

    // Has the cache load keys and their values while others are computed: blocks lie apart, and no processor foresees
    // where.
    void prefetch(const char* const* key, const char* const* last) const {
        const int size = call_.dim * element_;
        for (; key < last; key++)
            for (int byte = 0; byte < size; byte += 64) {
                __builtin_prefetch(*key + byte, 0, 2);
                __builtin_prefetch(*key + byte + call_.value_bytes, 0, 2);
            }
    }

    // Lays a span out for products: keys transposed, values as they are.
    void pack(const char* const* from, int keys) {
        for (int k = 0; k < keys; k += LANES) {
            const char* rows[LANES];
            for (int lane = 0; lane < LANES; lane++) rows[lane] = row_of_units(from, k + lane, keys, lane);
            transpose(rows, unit_stride_, keys_ + k / COLUMNS * unit_stride_ * COLUMNS + k % COLUMNS);
        }
        constexpr int DEPTH = SPAN / Arithmetic::VALUES;
        const int depth = round_up(keys, LANES) / Arithmetic::VALUES;
        for (int u = 0; u < depth; u++) {
            const int k = u * Arithmetic::VALUES;
            for (int d = 0; d < dims_; d += COLUMNS) {
                Unit* to = values_ + (d / COLUMNS * DEPTH + u) * COLUMNS;
                const int64_t value = d * element_ + call_.value_bytes;
                const char* odd = k + 1 < keys ? from[k + 1] + value : nullptr;
                if (k >= keys) std::memset(to, 0, COLUMNS * sizeof(Unit));
                else put_values(from[k] + value, odd, std::min(COLUMNS, call_.dim - d), to);
            }
        }
    }

    // A key in units, of which there are as many as lanes or a multiple; copied unless it is like that where it lies.
    const char* row_of_units(const char* const* from, int k, int keys, int lane) {
        const bool in_units = element_ * Arithmetic::VALUES == sizeof(Unit);
        if (in_units && call_.dim == unit_stride_ * Arithmetic::VALUES && k < keys) return from[k];
        Unit* row = rows_ + lane * unit_stride_;
        row[units_ - 1] = 0;
        if (k < keys) widen(from[k], type_, call_.dim, row);
        else std::memset(row, 0, size_t(units_) * sizeof(Unit));
        return reinterpret_cast<const char*>(row);
    }

    void put_values(const char* even, const char* odd, int count, uint32_t* to) { interleave(even, odd, count, to); }
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
            const int first_seen = call_.window > 0 ? position - call_.window + 1 - begin : 0;
            const int seen_from = std::clamp(first_seen, 0, columns);
            const int seen_to = std::clamp(position + 1 - begin, 0, keys);
            float* scores = scores_ + i * SPAN;
            Unit* weights = weights_ + i * DEPTH;
            spans[i] = softmax<Arithmetic>(scores, columns, seen_from, seen_to, call_.scale, call_.softcap, weights);
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
            const int row = row_of(task, first + i);
            if (begin > call_.positions[row]) continue;  // it has no place for what it does not see
            float* partial = partial_at(row, head_of(kv_head, first + i), span);
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
            const size_t needed = lay_out(worker, count, 0) + 64;
            if (needed > size) {
                memory.reset(new char[needed]());
                size = needed;
            }
            lay_out(worker, count, (reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
        }

        // From ``next`` on; returns where it ends.
        static uintptr_t lay_out(Worker& worker, int count, uintptr_t next) {
            const size_t units = worker.unit_stride_, dims = worker.dims_, depth = SPAN / Arithmetic::VALUES;
            auto put = [&](auto*& where, size_t length) {
                where = reinterpret_cast<std::remove_reference_t<decltype(where)>>(next);
                next += (length * sizeof *where + 63) / 64 * 64;
            };
            put(worker.queries_, units * count);
            put(worker.totals_, count);
            put(worker.sums_, dims * count);
            put(worker.rows_, units * LANES);
            put(worker.keys_, units * SPAN);
            put(worker.values_, round_up(int(dims), COLUMNS) * depth);
            put(worker.scores_, size_t(SPAN) * BATCH);
            put(worker.weights_, depth * BATCH);
            put(worker.products_, dims * BATCH);
            return next;
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
        for (int64_t unit = 0; unit < int64_t(call.rows) * call.heads; unit++) {
            const int row = int(unit / call.heads);
            if (call.partial_of[row] >= 0) worker.fold_partials(row, int(unit % call.heads));
        }
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
