// Linear layers on CPU, and two of them with a gate between: act(x Wg) * (x Wu).
//
// Weights are `Packed`: COLUMNS outputs side by side, unit after unit of the inputs. Quantised ones: see quantized.hpp.

#include <memory>
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

// The rows of calls with quantised weights, rounded. Calls that follow one another with the same inputs share theirs.
class RoundedInputs {
public:
    RoundedInputs(Team& team, const LinearCall* calls, int count) : calls_(calls), places_(thread_places) {
        places_.clear();
        int64_t bytes = 0, rows = 0;
        int widest = 0;
        for (int i = 0; i < count; i++) {
            places_.push_back(rows_of(i) > 0 || i == 0 ? bytes : places_.back());
            if (rows_of(i) == 0) continue;
            bytes += RoundedRows::bytes(calls[i].rows, calls[i].in, calls[i].group);
            rows += rows_of(i);
            widest = std::max(widest, calls[i].in);
        }
        if (rows == 0) return;
        memory_ = thread_memory.take(bytes);
        team.share(rows, grain_of(2 * widest), [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; row++) {
                int index = 0;
                int64_t rest = row;
                for (; rest >= rows_of(index); index++) rest -= rows_of(index);
                of(index).round(calls[index], int(rest));
            }
        });
    }

    RoundedRows of(int index) const {
        const LinearCall& call = calls_[index];
        if (!call.bits) return {};
        return RoundedRows::at(memory_ + places_[size_t(index)], call.rows, call.in, call.group);
    }

private:
    // Those that are rounded for this call.
    int rows_of(int index) const {
        const LinearCall& call = calls_[index];
        return call.bits && !(index > 0 && shares(call, calls_[index - 1])) ? call.rows : 0;
    }

    static bool shares(const LinearCall& a, const LinearCall& b) {
        return a.bits && b.bits && a.inputs == b.inputs && a.rows == b.rows && a.in == b.in && a.group == b.group &&
               a.input_row == b.input_row && a.type == b.type;
    }

    // Of the leader, kept from call to call.
    static thread_local std::vector<int64_t> thread_places;
    static thread_local Memory thread_memory;

    const LinearCall* calls_;
    std::vector<int64_t>& places_;  // of each call's rows
    char* memory_ = nullptr;
};

thread_local std::vector<int64_t> RoundedInputs::thread_places;
thread_local Memory RoundedInputs::thread_memory;

constexpr int64_t WEIGHTS_PER_CHUNK = 1 << 14;

void linear_by_team(Team& team, const LinearCall* calls, int count) {
    int64_t total = 0, widest = 1;
    for (int i = 0; i < count; i++) {
        total += units_of(calls[i]);
        widest = std::max<int64_t>(widest, calls[i].in * (calls[i].activation == NONE ? 1 : 2));
    }
    const RoundedInputs rounded(team, calls, count);
    const int64_t grain = std::max<int64_t>(1, WEIGHTS_PER_CHUNK / (widest * COLUMNS));
    team.share(total, grain, [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; unit++) {
            int index = 0;
            int64_t rest = unit;
            for (; rest >= units_of(calls[index]); index++) rest -= units_of(calls[index]);
            const LinearCall& call = calls[index];
            const int batches = batches_of(call), first = int(rest % batches) * BATCH;
            linear_unit(call, rounded.of(index), rest / batches, first, std::min(BATCH, call.rows - first));
        }
    });
}

}  // namespace emberkv

EMBERKV_EXPORT int32_t emberkv_columns() { return emberkv::COLUMNS; }

EMBERKV_EXPORT int32_t emberkv_lanes() { return emberkv::LANES; }

EMBERKV_EXPORT void emberkv_linear(const LinearCall* call) {
    emberkv::linear_by_team(emberkv::Team::of_this_thread(call->threads), call, 1);
}

EMBERKV_EXPORT void emberkv_linears(const LinearCall* calls, int32_t count) {
    emberkv::linear_by_team(emberkv::Team::of_this_thread(calls->threads), calls, count);
}
