// Linear layers on CPU, and two of them with a gate between: act(x Wg) * (x Wu).
//
// Weights are `Packed`: COLUMNS outputs side by side, unit after unit of the inputs.

#include "calls.hpp"
#include "team.hpp"
#include "vectors.hpp"

namespace emberkv {

constexpr int BATCH = 8 * ROWS;  // input rows that take their turn with the same weights

enum Activation : int32_t { NONE, SILU, GELU_TANH };

// x / (1 + e^-t), with t = x for SiLU and 2 sqrt(2 / pi) (x + 0.044715 x^3) for GELU in its tanh form.
inline Floats activated(Floats x, int32_t activation) {
    const Floats t = activation == SILU ? x : 1.5957691216057308f * (x + 0.044715f * x * x * x);
    const Floats e = exp2_of((t > Floats{} ? -t : t) * LOG2_E);  // e^-|t|
    return x * (t > Floats{} ? splat(1.0f) : e) / (1.0f + e);
}

template <class Arithmetic, class Unit = typename Arithmetic::Unit>
void linear_unit(const LinearCall& call, int64_t group, int first, int rows) {
    const bool gated = call.activation != NONE;
    const int units = call.in / Arithmetic::VALUES, element = call.type == FP32 ? 4 : 2;
    const int columns = int(std::min<int64_t>(COLUMNS, call.out_features - group * COLUMNS));
    const char* begin = static_cast<const char*>(call.inputs) + first * call.input_row * element;
    const Unit* inputs = reinterpret_cast<const Unit*>(begin);
    const Unit* weight = static_cast<const Unit*>(call.weight) + group * (gated ? 2 : 1) * units * COLUMNS;
    const int stride = int(call.input_row / Arithmetic::VALUES);
    alignas(64) float sums[BATCH * COLUMNS], ups[BATCH * COLUMNS];
    const Packed<Unit> gate{weight, units}, up = gate.from(COLUMNS);
    multiply_rows<Arithmetic, VECTORS>(inputs, rows, stride, gate, units, sums, COLUMNS);
    if (gated) multiply_rows<Arithmetic, VECTORS>(inputs, rows, stride, up, units, ups, COLUMNS);
    for (int row = 0; row < rows; row++) {
        float* sum = sums + row * COLUMNS;
        for (int c = 0; c < COLUMNS; c += LANES) {
            Floats value = load<Floats>(sum + c);
            if (call.bias) value += load<Floats>(call.bias + group * COLUMNS + c);
            if (gated) value = activated(value, call.activation) * load<Floats>(ups + row * COLUMNS + c);
            store(sum + c, value);
        }
        const int64_t at = int64_t(first + row) * call.out_features + group * COLUMNS;
        narrow(sum, Type(call.type), columns, static_cast<char*>(call.out) + at * element);
    }
}

inline int batches_of(const LinearCall& call) { return (call.rows + BATCH - 1) / BATCH; }

inline int64_t units_of(const LinearCall& call) {
    return int64_t((call.out_features + COLUMNS - 1) / COLUMNS) * batches_of(call);
}

inline void compute_unit(const LinearCall& call, int64_t unit) {
    const int batches = batches_of(call), first = int(unit % batches) * BATCH;
    const int rows = std::min(BATCH, call.rows - first);
    if (call.type == BF16) return linear_unit<Bf16Pairs>(call, unit / batches, first, rows);
    linear_unit<SinglePrecision>(call, unit / batches, first, rows);
}

void linear_by_team(const LinearCall* calls, int count) {
    int64_t total = 0;
    for (int i = 0; i < count; i++) total += units_of(calls[i]);
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < total; unit++) {
        const LinearCall* call = calls;
        int64_t rest = unit;
        for (; rest >= units_of(*call); call++) rest -= units_of(*call);
        compute_unit(*call, rest);
    }
}

}  // namespace emberkv

EMBERKV_EXPORT int32_t emberkv_columns() { return emberkv::COLUMNS; }

EMBERKV_EXPORT int32_t emberkv_lanes() { return emberkv::LANES; }

EMBERKV_EXPORT void emberkv_linear(const LinearCall* call) {
#pragma omp parallel num_threads(call->threads)
    emberkv::linear_by_team(call, 1);
}
