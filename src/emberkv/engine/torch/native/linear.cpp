// Linear layers on CPU, and two of them with a gate between: act(x Wg) * (x Wu).
//
// Weights are `Packed`: COLUMNS outputs side by side, unit after unit of the inputs. Quantised ones: see quantized.hpp.

#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "calls.hpp"
#include "quantized.hpp"
#include "team.hpp"
#include "vectors.hpp"

namespace emberkv {

constexpr int BATCH = 8 * ROWS;  // input rows that take their turn with the same weights

enum Activation : int32_t { NONE, SILU, GELU_TANH, CLAMPED_SWIGLU };

// x / (1 + e^-t), with t = x for SiLU and 2 sqrt(2 / pi) (x + 0.044715 x^3) for GELU in its tanh form.
inline Floats activated(Floats x, int32_t activation) {
    const Floats t = activation == SILU ? x : 1.5957691216057308f * (x + 0.044715f * x * x * x);
    const Floats e = exp2_of((t > Floats{} ? -t : t) * LOG2_E);  // e^-|t|
    return x * (t > Floats{} ? splat(1.0f) : e) / (1.0f + e);
}

// What the gate and the values of the layer beside it become together.
inline Floats gated_by(Floats gate, Floats up, const LinearCall& call) {
    if (call.activation != CLAMPED_SWIGLU) return activated(gate, call.activation) * up;
    const Floats limit = splat(call.limit);
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : up < -limit ? -limit : up;
    return activated(gate * call.slope, SILU) * (1.0f / call.slope) * (up + 1.0f);
}

// sums: of the layer, or of the gate, [rows, COLUMNS] for the ``group``-th COLUMNS outputs. ups: of the layer it gates.
template <class Arithmetic, class Unit = typename Arithmetic::Unit>
void multiply_plain(const LinearCall& call, int64_t group, int first, int rows, float* sums, float* ups) {
    const bool gated = call.activation != NONE;
    const int units = call.in / Arithmetic::VALUES, element = call.type == FP32 ? 4 : 2;
    const char* begin = static_cast<const char*>(call.inputs) + first * call.input_row * element;
    const Unit* inputs = reinterpret_cast<const Unit*>(begin);
    const Unit* weight = static_cast<const Unit*>(call.weight) + group * (gated ? 2 : 1) * units * COLUMNS;
    const int stride = int(call.input_row / Arithmetic::VALUES);
    const Packed<Unit> gate{weight, units}, up = gate.from(COLUMNS);
    multiply_rows<Arithmetic, VECTORS>(inputs, rows, stride, gate, units, sums, COLUMNS);
    if (gated) multiply_rows<Arithmetic, VECTORS>(inputs, rows, stride, up, units, ups, COLUMNS);
}

// rounded: the call's rows, where its weights are quantised.
inline void linear_unit(const LinearCall& call, const RoundedRows& rounded, int64_t group, int first, int rows) {
    const bool gated = call.activation != NONE;
    const int columns = int(std::min<int64_t>(COLUMNS, call.out_features - group * COLUMNS));
    const float* bias = call.bias ? call.bias + group * (gated ? 2 : 1) * COLUMNS : nullptr;
    alignas(64) float sums[BATCH * COLUMNS], ups[BATCH * COLUMNS];
    if (call.bits) {
        const int layers = gated ? 2 : 1;
        multiply_quantized(rounded, first, rows, QuantizedColumns(call, group * layers), sums);
        if (gated) multiply_quantized(rounded, first, rows, QuantizedColumns(call, group * layers + 1), ups);
    } else if (call.type == BF16) {
        multiply_plain<Bf16Pairs>(call, group, first, rows, sums, ups);
    } else {
        multiply_plain<SinglePrecision>(call, group, first, rows, sums, ups);
    }
    for (int row = 0; row < rows; row++) {
        float* sum = sums + row * COLUMNS;
        for (int c = 0; c < COLUMNS; c += LANES) {
            Floats value = load<Floats>(sum + c);
            if (bias) value += load<Floats>(bias + c);
            if (gated) {
                Floats up = load<Floats>(ups + row * COLUMNS + c);
                if (bias) up += load<Floats>(bias + COLUMNS + c);
                value = gated_by(value, up, call);
            }
            store(sum + c, value);
        }
        const int64_t at = int64_t(first + row) * call.out_features + group * COLUMNS;
        narrow(sum, Type(call.type), columns, static_cast<char*>(call.out) + at * (call.type == FP32 ? 4 : 2));
    }
}

inline int batches_of(const LinearCall& call) { return (call.rows + BATCH - 1) / BATCH; }

inline int64_t units_of(const LinearCall& call) {
    return int64_t((call.out_features + COLUMNS - 1) / COLUMNS) * batches_of(call);
}

// Memory that only grows.
struct Memory {
    std::unique_ptr<char[]> bytes;
    int64_t size = 0;

    char* take(int64_t needed) {
        if (needed > size) {
            bytes.reset(new char[size_t(needed) + 64]);
            size = needed;
        }
        return begin();
    }

    char* begin() const { return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(bytes.get()) + 63) / 64 * 64); }
};

// One for each team that is at work, kept for the next one. Each thread's own would be as many as there are threads.
class IdleMemory {
public:
    std::unique_ptr<Memory> borrow() {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (idle_.empty()) return std::make_unique<Memory>();
        std::unique_ptr<Memory> memory = std::move(idle_.back());
        idle_.pop_back();
        return memory;
    }

    void give_back(std::unique_ptr<Memory> memory) {
        const std::lock_guard<std::mutex> lock(mutex_);
        idle_.push_back(std::move(memory));
    }

private:
    std::mutex mutex_;
    std::vector<std::unique_ptr<Memory>> idle_;
};

IdleMemory idle_memory;

// The rows of calls with quantised weights, rounded. Calls that follow one another with the same inputs share theirs.
class RoundedInputs {
public:
    // By every thread of a team.
    RoundedInputs(const LinearCall* calls, int count) : places_(thread_places) {
        places_.clear();
        int64_t bytes = 0;
        for (int i = 0; i < count; i++) {
            const bool same = i > 0 && shares(calls[i], calls[i - 1]);
            places_.push_back(same ? places_.back() : bytes);
            if (!same && calls[i].bits) bytes += RoundedRows::bytes(calls[i].rows, calls[i].in, calls[i].group);
        }
        if (bytes == 0) return;
        // A few rows are rounded by each thread for itself before all threads have met.
        const bool alone = bytes <= ALONE;
        if (alone) {
            memory_ = thread_memory.take(bytes);
        } else {
            Memory* borrowed = nullptr;
#pragma omp single copyprivate(borrowed)
            {
                borrowed = idle_memory.borrow().release();
                borrowed->take(bytes);
            }
            borrowed_ = borrowed;
            memory_ = borrowed->begin();
        }
        for (int i = 0; i < count; i++) {
            if (!calls[i].bits || (i > 0 && shares(calls[i], calls[i - 1]))) continue;
            const RoundedRows rows = of(calls[i], i);
            if (alone) {
                for (int row = 0; row < calls[i].rows; row++) rows.round(calls[i], row);
            } else {
#pragma omp for schedule(static) nowait
                for (int row = 0; row < calls[i].rows; row++) rows.round(calls[i], row);
            }
        }
        if (!alone) {
#pragma omp barrier
        }
    }

    RoundedRows of(const LinearCall& call, int index) const {
        if (!call.bits) return {};
        return RoundedRows::at(memory_ + places_[size_t(index)], call.rows, call.in, call.group);
    }

    // By every thread of the team, once none of them reads the rows any more.
    void give_back() const {
        if (!borrowed_) return;
#pragma omp single nowait
        idle_memory.give_back(std::unique_ptr<Memory>(borrowed_));
    }

private:
    static constexpr int64_t ALONE = 1 << 16;

    static bool shares(const LinearCall& a, const LinearCall& b) {
        return a.bits && b.bits && a.inputs == b.inputs && a.rows == b.rows && a.in == b.in && a.group == b.group &&
               a.input_row == b.input_row && a.type == b.type;
    }

    std::vector<int64_t>& places_;  // of each call's rows
    char* memory_ = nullptr;
    Memory* borrowed_ = nullptr;
    static thread_local std::vector<int64_t> thread_places;
    static thread_local Memory thread_memory;
};

thread_local std::vector<int64_t> RoundedInputs::thread_places;
thread_local Memory RoundedInputs::thread_memory;

void linear_by_team(const LinearCall* calls, int count) {
    int64_t total = 0;
    for (int i = 0; i < count; i++) total += units_of(calls[i]);
    const RoundedInputs rounded(calls, count);
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < total; unit++) {
        int index = 0;
        int64_t rest = unit;
        for (; rest >= units_of(calls[index]); index++) rest -= units_of(calls[index]);
        const LinearCall& call = calls[index];
        const int batches = batches_of(call), first = int(rest % batches) * BATCH;
        linear_unit(call, rounded.of(call, index), rest / batches, first, std::min(BATCH, call.rows - first));
    }
    rounded.give_back();
}

}  // namespace emberkv

EMBERKV_EXPORT int32_t emberkv_columns() { return emberkv::COLUMNS; }

EMBERKV_EXPORT int32_t emberkv_lanes() { return emberkv::LANES; }

EMBERKV_EXPORT void emberkv_linear(const LinearCall* call) {
#pragma omp parallel num_threads(call->threads)
    emberkv::linear_by_team(call, 1);
}

EMBERKV_EXPORT void emberkv_linears(const LinearCall* calls, int32_t count) {
#pragma omp parallel num_threads(calls->threads)
    emberkv::linear_by_team(calls, count);
}
