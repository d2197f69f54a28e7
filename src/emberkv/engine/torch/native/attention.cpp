// Attention over a paged pool on CPU, for rows of many sequences at once.
//
// A row is one new token of one sequence. It sees its sequence's keys from position 0 (or from where its window or chunk begins) to
// its own. Keys are taken in spans cut at absolute positions. Over one span a row's softmax and weighted sum are
// computed whole; spans are folded together in order, by their log-sum-exps, as in flash attention (Dao et al. 2022,
// arXiv:2205.14135). No operation on a row depends on which rows are computed beside it, so a row has the same bits in
// a prompt computed at once, in one computed piece by piece, and in a decode step.

#include <memory>
#include <type_traits>
#include <vector>

#include "calls.hpp"
#include "layout.hpp"
#include "layout_int8.hpp"
#include "softmax.hpp"
#include "team.hpp"

namespace emberkv {

constexpr int SPAN = 512;        // keys
constexpr int BATCH = 2 * ROWS;  // query rows whose scores over a span are held at once

template <class Arithmetic, class Layout>
class Worker {
    using Unit = typename Arithmetic::Unit;
    using Piece = typename Layout::Piece;
    static constexpr int UNITS = LANES / Arithmetic::VALUES;  // of values, for a vector of keys

public:
    explicit Worker(const AttentionCall& call)
        : call_(call),
          type_(Type(call.type)),
          element_(call.type == FP32 ? 4 : 2),
          groups_(call.heads / call.kv_heads),
          dims_(round_up(call.dim, LANES)),
          units_(call.dim / Arithmetic::VALUES),
          layout_(call),
          in_place_(layout_.pair == Arithmetic::VALUES && layout_.piece == LANES && dims_ == call.dim),
          key_stride_(in_place_ ? call.block_size : LANES) {}

    void store_new(int row) const {
        const int64_t position = call_.positions[row], offset = position % call_.block_size;
        char* block = block_at(call_.block_tables[row], position);
        for (int head = 0; head < call_.kv_heads; head++) {
            const char* key = element(call_.keys, row * call_.key_row + head * call_.key_head);
            const char* value = element(call_.values, row * call_.value_row + head * call_.value_head);
            layout_.store(block, head, int(offset), key, value);
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
            widen(element(call_.queries, at), type_, call_.dim, queries_ + i * units_);
        }
        Piece here[SPAN], next[SPAN];
        int ahead = locate(task, kv_head, task.first_span, next);
        for (int span = task.first_span; span < task.last_span; span++) {
            const int keys = std::min(SPAN, task.stop - span * SPAN);
            if (keys <= 0) break;
            std::copy(next, next + ahead, here);
            open(here, keys);
            ahead = span + 1 < task.last_span ? locate(task, kv_head, span + 1, next) : 0;
            for (int first = 0; first < count; first += BATCH) {
                const int last = std::min(first + BATCH, count);
                for (int p = ahead * first / count; p < ahead * last / count; p++) layout_.prefetch(next[p]);
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
    int first_seen(int position) const {
        if (call_.chunk > 0) return position / call_.chunk * call_.chunk;
        return call_.window > 0 ? position - call_.window + 1 : 0;
    }
    int head_of(int kv_head, int i) const { return kv_head * groups_ + i % groups_; }

    const char* element(const void* base, int64_t index) const {
        return static_cast<const char*>(base) + index * element_;
    }

    char* block_at(int64_t table, int64_t position) const {
        return call_.pool + call_.block_ids[table + position / call_.block_size] * call_.block_bytes;
    }

    float* partial_at(int row, int head, int span) const {
        return call_.partials + ((call_.partial_of[row] + span) * call_.heads + head) * (dims_ + LANES);
    }

    // Where a span's keys of one head lie. Returns the number of pieces.
    int locate(const Task& task, int kv_head, int span, Piece* pieces) const {
        const int begin = span * SPAN, stop = std::min(begin + SPAN, task.stop);
        int count = 0;
        for (int k = begin; k < stop; k += layout_.piece)
            pieces[count++] = layout_.piece_at(block_at(task.block_table, k), kv_head, k % call_.block_size);
        return count;
    }

    // Finds a span's factors: where they lie, or in copies of what cannot be multiplied from there.
    void open(const Piece* pieces, int keys) {
        for (int first = 0; first < keys; first += LANES, pieces += LANES / layout_.piece) {
            const bool there = in_place_ && first + LANES <= keys;
            const Piece vector = there ? *pieces : copied(pieces, std::min(LANES, keys - first), first);
            key_vectors_[first / LANES] = reinterpret_cast<const Unit*>(vector.keys);
            const Unit* values = reinterpret_cast<const Unit*>(vector.values);
            for (int u = 0; u < UNITS; u++) value_units_[first / Arithmetic::VALUES + u] = values + u * dims_;
        }
    }

    // A vector of keys, of which there may be fewer: the others' values are zero. first: its place in the span.
    Piece copied(const Piece* pieces, int count, int first) {
        const int vector = in_place_ ? 0 : first / LANES;
        Unit *keys = keys_ + vector * units_ * key_stride_, *values = values_ + vector * UNITS * dims_;
        std::memset(values, 0, size_t(UNITS) * dims_ * sizeof(Unit));
        if constexpr (Layout::SCALED)
            for (float* scales : {key_scales_, value_scales_}) std::fill_n(scales + first, LANES, 0.0f);
        for (int k = 0; k < count; k += layout_.piece, pieces++) {
            const int some = std::min(layout_.piece, count - k);
            if constexpr (Layout::SCALED)
                layout_.copy_scales(*pieces, some, key_scales_ + first + k, value_scales_ + first + k);
            layout_.copy_piece(*pieces, some, keys + k, key_stride_, values + k / Arithmetic::VALUES * dims_, dims_);
        }
        Piece copied{};
        copied.keys = reinterpret_cast<const char*>(keys);
        copied.values = reinterpret_cast<const char*>(values);
        return copied;
    }

    void attend_span(const Task& task, int kv_head, int span, int keys, int first, int count) {
        const int begin = span * SPAN, columns = round_up(keys, LANES);
        constexpr int DEPTH = SPAN / Arithmetic::VALUES;
        const ByVector<Unit> keys_by_vector{key_vectors_, key_stride_};
        multiply<Arithmetic>(
            queries_ + first * units_, count, units_, keys_by_vector, columns, units_, scores_, SPAN
        );
        Softmax spans[BATCH];
        int seen_from[BATCH], seen_to[BATCH];
        for (int i = 0; i < count; i++) {
            const int position = call_.positions[row_of(task, first + i)];
            seen_from[i] = std::clamp(first_seen(position) - begin, 0, columns);
            seen_to[i] = std::clamp(position + 1 - begin, 0, keys);
            float* scores = scores_ + i * SPAN;
            Unit* weights = weights_ + i * DEPTH;
            const float slope = call_.slopes ? call_.slopes[head_of(kv_head, first + i)] : 0;
            const Scoring scoring{call_.scale, call_.softcap, slope, position - begin};
            const Scales scales{key_scales_, value_scales_};
            spans[i] = softmax<Arithmetic, Layout::SCALED>(
                scores, columns, seen_from[i], seen_to[i], scoring, scales, weights
            );
        }
        const ByUnit<Unit> values_by_unit{value_units_, 0};
        multiply<Arithmetic>(
            weights_, count, DEPTH, values_by_unit, dims_, columns / Arithmetic::VALUES, products_, dims_
        );
        for (int i = 0; i < count; i++) {
            float* product = products_ + i * dims_;
            if (spans[i].maximum != UNSEEN && has_nan(product, dims_))
                multiply_seen(weights_ + i * DEPTH, seen_from[i], seen_to[i], columns, product);
            if (task.whole) {
                fold(totals_[first + i], sums_ + (first + i) * dims_, spans[i], product, dims_);
                continue;
            }
            const int row = row_of(task, first + i);
            if (begin > call_.positions[row]) continue;  // it has no partial result for what it does not see
            float* partial = partial_at(row, head_of(kv_head, first + i), span);
            copy(partial, product, size_t(dims_) * 4);
            partial[dims_] = spans[i].maximum;
            partial[dims_ + 1] = spans[i].sum;
        }
    }

    // The product of a row's weights with the values of the keys [from, to) that it sees. Those of others, which rows
    // beside it see, have weights of zero, and zero times what is not finite is NaN.
    void multiply_seen(Unit* weights, int from, int to, int columns, float* product) const {
        constexpr int VALUES = Arithmetic::VALUES;
        const std::vector<Unit> zeros(dims_);
        const Unit* values[SPAN / VALUES];
        std::vector<Unit> parts[2];  // copies of the units of which only a part is seen: the first, and another one
        for (int u = 0; u < columns / VALUES; u++) {
            const int first = std::clamp(from - u * VALUES, 0, VALUES), last = std::clamp(to - u * VALUES, 0, VALUES);
            values[u] = first < last ? value_units_[u] : zeros.data();
            keep_values(weights + u, 1, first, last);
            if (first >= last || last - first == VALUES) continue;
            std::vector<Unit>& part = parts[parts[0].empty() ? 0 : 1];
            part.assign(value_units_[u], value_units_[u] + dims_);
            keep_values(part.data(), dims_, first, last);
            values[u] = part.data();
        }
        multiply<Arithmetic>(weights, 1, 0, ByUnit<Unit>{values, 0}, dims_, columns / VALUES, product, dims_);
    }

    void finish(int row, int head, const Softmax& whole, float* sums) const {
        const float factor = normalizer(whole, call_.sinks ? call_.sinks + head : nullptr);
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
            const size_t units = worker.units_, dims = worker.dims_, depth = SPAN / Arithmetic::VALUES;
            const size_t copied = worker.in_place_ ? LANES : SPAN;  // keys
            auto put = [&](auto*& where, size_t length) {
                where = reinterpret_cast<std::remove_reference_t<decltype(where)>>(next);
                next += (length * sizeof *where + 63) / 64 * 64;
            };
            put(worker.queries_, units * count);
            put(worker.totals_, count);
            put(worker.sums_, dims * count);
            put(worker.keys_, copied / LANES * units * worker.key_stride_);
            put(worker.values_, copied / Arithmetic::VALUES * dims);
            put(worker.scores_, size_t(SPAN) * BATCH);
            put(worker.weights_, depth * BATCH);
            put(worker.products_, dims * BATCH);
            return next;
        }
    };

    const AttentionCall& call_;
    const Type type_;
    const int element_, groups_, dims_, units_;
    const Layout layout_;
    const bool in_place_;   // whether products take all but a last, half-filled vector of keys from the pool
    const int key_stride_;  // units, from one unit of a vector's keys to the next
    Unit *queries_, *keys_, *values_, *weights_;
    const Unit *key_vectors_[SPAN / LANES], *value_units_[SPAN / Arithmetic::VALUES];
    float *sums_, *scores_, *products_;
    float key_scales_[SPAN], value_scales_[SPAN];  // of a span, where the layout has scales
    Softmax* totals_;
    static thread_local Buffers buffers_;
};

template <class Arithmetic, class Layout>
thread_local typename Worker<Arithmetic, Layout>::Buffers Worker<Arithmetic, Layout>::buffers_;

template <class Arithmetic, class Layout>
void attend_by_team(Team& team, const AttentionCall& call) {
    const int64_t row_values = 2 * int64_t(call.kv_heads) * call.dim;
    team.share(call.rows, grain_of(row_values), [&](int64_t begin, int64_t end) {
        const Worker<Arithmetic, Layout> worker(call);
        for (int64_t row = begin; row < end; row++) worker.store_new(int(row));
    });
    team.share(call.num_tasks * call.kv_heads, 1, [&](int64_t begin, int64_t end) {
        Worker<Arithmetic, Layout> worker(call);
        for (int64_t unit = begin; unit < end; unit++)
            worker.attend(call.tasks[unit / call.kv_heads], int(unit % call.kv_heads));
    });
    const bool partial = std::any_of(call.partial_of, call.partial_of + call.rows, [](int64_t at) { return at >= 0; });
    if (!partial) return;
    team.share(int64_t(call.rows) * call.heads, grain_of(8 * call.dim), [&](int64_t begin, int64_t end) {
        Worker<Arithmetic, Layout> worker(call);
        for (int64_t unit = begin; unit < end; unit++) {
            const int row = int(unit / call.heads);
            if (call.partial_of[row] >= 0) worker.fold_partials(row, int(unit % call.heads));
        }
    });
}

template <class Arithmetic>
void attend_by_team(Team& team, const AttentionCall& call) {
    if (call.quantised) return attend_by_team<Arithmetic, Int8Layout>(team, call);
    attend_by_team<Arithmetic, BlockLayout>(team, call);
}

void attend_by_team(Team& team, const AttentionCall& call) {
#if defined(__AVX512BF16__)
    if (call.type == BF16) return attend_by_team<Bf16Pairs>(team, call);
#endif
    attend_by_team<SinglePrecision>(team, call);
}

}  // namespace emberkv

EMBERKV_EXPORT int32_t emberkv_span() { return emberkv::SPAN; }

EMBERKV_EXPORT void emberkv_attend(const AttentionCall* call) {
    emberkv::attend_by_team(emberkv::Team::of_this_thread(call->threads), *call);
}
