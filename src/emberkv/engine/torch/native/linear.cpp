// Linear layers on CPU, and two of them with a gate between: act(x Wg) * (x Wu).
//
// Weights are `Packed` in panels: COLUMNS outputs side by side, unit after unit of the inputs. Quantised ones: see
// quantized.hpp.

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
    return times_sigmoid(x, t);
}

// What the gate and the values of the layer beside it become together.
inline Floats gated_by(Floats gate, Floats up, const LinearCall& call) {
    if (call.activation != CLAMPED_SWIGLU) return activated(gate, call.activation) * up;
    const Floats limit = splat(call.limit);
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : up < -limit ? -limit : up;
    return activated(gate * call.slope, SILU) * (1.0f / call.slope) * (up + 1.0f);
}

#if defined(__AVX512BF16__)
constexpr bool WIDENS = false;  // whether inputs in bf16 are widened to fp32 before they are multiplied
#else
constexpr bool WIDENS = true;
#endif

constexpr int FEW_ROWS = 4;  // for which it does not pay to widen weights in advance

#if defined(__AVX512F__)
constexpr int SUMS = 24;  // vectors of sums, with few rows, that registers have room for
#else
constexpr int SUMS = 12;
#endif

// Panels whose products with so few rows are computed at once. A sum waits for the multiplication before it, so that a
// processor with one panel's sums alone waits more than it multiplies, and memory waits with it. Codes of 4 bits take
// registers of their own.
inline int panels_at_once(int rows, int bits) {
    if (bits == 4 && rows > 1) return 1;
    const int room = SUMS / (VECTORS * std::max(1, rows));
    return room >= 4 ? 4 : room >= 2 ? 2 : 1;
}

// Rows as products take them.
struct PreparedRows {
    RoundedRows rounded;   // where weights are quantised
    const char* plain;     // else the first one
    int64_t stride;        // bytes between plain ones
};

// sums: [rows, panels * COLUMNS]. panels: as `panels_at_once` allows.
template <class Arithmetic, class Weight>
void multiply_plain(
    const PreparedRows& inputs, int first, int rows, const Weight* weight, int units, int panels, float* sums
) {
    using Unit = typename Arithmetic::Unit;
    const Unit* begin = reinterpret_cast<const Unit*>(inputs.plain + first * inputs.stride);
    const int stride = int(inputs.stride / int64_t(sizeof(Unit)));
    const Packed<Weight> factor{weight, units};
    if (panels == 4) return multiply_panels<Arithmetic, 4, 1>(begin, rows, stride, factor, units, sums);
    if (panels == 2) return multiply_panels<Arithmetic, 2, 3>(begin, rows, stride, factor, units, sums);
    multiply_rows<Arithmetic, VECTORS>(begin, rows, stride, factor, units, sums, COLUMNS);
}

// Weights in bf16 are widened as well, some at a time for all rows. The same sums in the same order as `multiply_plain`'s.
void multiply_widened(const PreparedRows& inputs, int first, int rows, const uint32_t* weight, int units, float* sums) {
    constexpr int DEPTH = 128;  // units, whose weights stay in a core's first cache (AVX2) or second (AVX-512)
    alignas(64) float widened[2 * DEPTH * COLUMNS];
    std::memset(sums, 0, size_t(rows) * COLUMNS * 4);
    const float* begin = reinterpret_cast<const float*>(inputs.plain + first * inputs.stride);
    for (int unit = 0; unit < units; unit += DEPTH) {
        const int depth = std::min(DEPTH, units - unit);
        for (int u = 0; u < depth; u++)
            for (int c = 0; c < COLUMNS; c += LANES) {
                const Ints pair = load<Ints>(weight + (unit + u) * COLUMNS + c);
                store(widened + 2 * u * COLUMNS + c, pair << 16);
                store(widened + (2 * u + 1) * COLUMNS + c, pair & int32_t(0xffff0000));
            }
        const int stride = int(inputs.stride / 4);
        const Packed<float> factor{widened, 2 * depth};
        for (int r = 0; r < rows; r += ROWS) {
            const int some = std::min(ROWS, rows - r);
            prefetch_share(weight + (unit + depth) * COLUMNS, depth * COLUMNS * 4, r, r + some, rows);
            multiply_rows<SinglePrecision, VECTORS, true>(
                begin + int64_t(r) * stride + 2 * unit, some, stride, factor, 2 * depth, sums + r * COLUMNS, COLUMNS
            );
        }
    }
}

// sums: [rows, panels * COLUMNS], of ``panels`` panels of the weight from the ``index``-th on.
inline void multiply(
    const LinearCall& call, const PreparedRows& inputs, int64_t index, int panels, int first, int rows, float* sums
) {
    if (call.bits) return multiply_quantized(inputs.rounded, first, rows, QuantizedColumns(call, index), panels, sums);
    if (call.type == FP32) {
        const float* weight = static_cast<const float*>(call.weight) + index * call.in * COLUMNS;
        return multiply_plain<SinglePrecision>(inputs, first, rows, weight, call.in, panels, sums);
    }
    const int units = call.in / 2;
    const uint32_t* weight = static_cast<const uint32_t*>(call.weight) + index * units * COLUMNS;
    if (WIDENS && rows > FEW_ROWS) return multiply_widened(inputs, first, rows, weight, units, sums);
    multiply_plain<Bf16Pairs>(inputs, first, rows, weight, units, panels, sums);
}

// The outputs of ``panels`` panels of the weight from the ``index``-th on; gated ones are pairs of a gate's and its values'.
inline void linear_unit(
    const LinearCall& call, const PreparedRows& inputs, int64_t index, int panels, int first, int rows
) {
    const bool gated = call.activation != NONE;
    const int layers = gated ? 2 : 1, beside = panels_at_once(rows, call.bits);
    alignas(64) float sums[2 * BATCH * COLUMNS];
    int row_stride = COLUMNS, panel_stride = BATCH * COLUMNS;
    if (beside >= panels) {
        row_stride = panels * COLUMNS, panel_stride = COLUMNS;
        multiply(call, inputs, index, panels, first, rows, sums);
    } else {
        for (int p = 0; p < panels; p++) multiply(call, inputs, index + p, 1, first, rows, sums + p * panel_stride);
    }
    for (int p = 0; p < panels; p += layers) {
        const int64_t column = (index + p) / layers * COLUMNS;
        const int columns = int(std::min<int64_t>(COLUMNS, call.out_features - column));
        const float* bias = call.bias ? call.bias + (index + p) * COLUMNS : nullptr;
        for (int row = 0; row < rows; row++) {
            float* sum = sums + row * row_stride + p * panel_stride;
            for (int c = 0; c < COLUMNS; c += LANES) {
                Floats value = load<Floats>(sum + c);
                if (bias) value += load<Floats>(bias + c);
                if (gated) {
                    Floats up = load<Floats>(sum + panel_stride + c);
                    if (bias) up += load<Floats>(bias + COLUMNS + c);
                    value = gated_by(value, up, call);
                }
                store(sum + c, value);
            }
            const int64_t at = int64_t(first + row) * call.out_features + column;
            narrow(sum, Type(call.type), columns, static_cast<char*>(call.out) + at * (call.type == FP32 ? 4 : 2));
        }
    }
}

// How a layer is cut into units of work: ``width`` times COLUMNS outputs of a batch of rows each.
class Units {
public:
    // most: of the width.
    Units(const LinearCall& call, int64_t most)
        : call_(call),
          layers_(call.activation == NONE ? 1 : 2),
          batches_((call.rows + BATCH - 1) / BATCH),
          groups_((call.out_features + COLUMNS - 1) / COLUMNS) {
        width_ = std::max(1, panels_at_once(call.rows, call.bits) / layers_);
        while (width_ > 1 && width_ > most) width_ /= 2;
    }

    int64_t count() const { return (groups_ + width_ - 1) / width_ * batches_; }

    int64_t weights() const { return int64_t(call_.in) * COLUMNS * layers_ * width_; }

    void compute(const PreparedRows& inputs, int64_t unit) const {
        const int first = int(unit % batches_) * BATCH, rows = std::min(BATCH, call_.rows - first);
        int64_t group = unit / batches_ * width_;
        const int64_t end = std::min(group + width_, groups_);
        for (int some = width_; group < end; group += some) {
            while (some > end - group) some /= 2;
            linear_unit(call_, inputs, group * layers_, some * layers_, first, rows);
        }
    }

private:
    const LinearCall& call_;
    int layers_, batches_, width_;
    int64_t groups_;
};

// The rows of calls as products take them: rounded, widened, or as they are. Calls that follow one another with the same
// inputs share theirs.
class PreparedInputs {
public:
    PreparedInputs(Team& team, const LinearCall* calls, int count) : calls_(calls), places_(thread_places) {
        places_.clear();
        int64_t bytes = 0, rows = 0;
        int widest = 0;
        for (int i = 0; i < count; i++) {
            places_.push_back(rows_of(i) > 0 || i == 0 ? bytes : places_.back());
            if (rows_of(i) == 0) continue;
            bytes += bytes_of(calls[i]);
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
                prepare(index, int(rest));
            }
        });
    }

    PreparedRows of(int index) const {
        const LinearCall& call = calls_[index];
        char* memory = memory_ + places_[size_t(index)];
        if (call.bits) return {RoundedRows::at(memory, call.rows, call.in, call.group), nullptr, 0};
        if (widens(call)) return {{}, memory, int64_t(call.in) * 4};
        return {{}, static_cast<const char*>(call.inputs), call.input_row * (call.type == FP32 ? 4 : 2)};
    }

private:
    static bool widens(const LinearCall& call) { return WIDENS && !call.bits && call.type == BF16; }

    static int64_t bytes_of(const LinearCall& call) {
        if (call.bits) return RoundedRows::bytes(call.rows, call.in, call.group);
        return (int64_t(call.rows) * call.in * 4 + 63) / 64 * 64;
    }

    void prepare(int index, int row) const {
        const LinearCall& call = calls_[index];
        if (call.bits) return of(index).rounded.round(call, row);
        float* to = reinterpret_cast<float*>(memory_ + places_[size_t(index)]) + int64_t(row) * call.in;
        const uint16_t* from = static_cast<const uint16_t*>(call.inputs) + row * call.input_row;
        for (int i = 0; i < call.in; i++) to[i] = widened(from[i]);
    }

    // Those that are prepared for this call.
    int rows_of(int index) const {
        const LinearCall& call = calls_[index];
        const bool prepared = call.bits || widens(call);
        return prepared && !(index > 0 && shares(call, calls_[index - 1])) ? call.rows : 0;
    }

    static bool shares(const LinearCall& a, const LinearCall& b) {
        return (a.bits > 0) == (b.bits > 0) && a.inputs == b.inputs && a.rows == b.rows && a.in == b.in &&
               a.group == b.group && a.input_row == b.input_row && a.type == b.type;
    }

    // Of the leader, kept from call to call.
    static thread_local std::vector<int64_t> thread_places;
    static thread_local Memory thread_memory;

    const LinearCall* calls_;
    std::vector<int64_t>& places_;  // of each call's rows
    char* memory_ = nullptr;
};

thread_local std::vector<int64_t> PreparedInputs::thread_places;
thread_local Memory PreparedInputs::thread_memory;

constexpr int64_t WEIGHTS_PER_CHUNK = 1 << 14;
constexpr int CHUNKS_PER_THREAD = 4;  // at least, so that no thread waits long for another at the end

void linear_by_team(Team& team, const LinearCall* calls, int count) {
    int64_t groups = 0;
    for (int i = 0; i < count; i++) groups += (calls[i].out_features + COLUMNS - 1) / COLUMNS;
    const int64_t most = groups / (CHUNKS_PER_THREAD * team.threads());
    int64_t total = 0, widest = 1;
    for (int i = 0; i < count; i++) {
        const Units units(calls[i], most);
        total += units.count();
        widest = std::max(widest, units.weights());
    }
    const PreparedInputs inputs(team, calls, count);
    team.share(total, std::max<int64_t>(1, WEIGHTS_PER_CHUNK / widest), [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; unit++) {
            int index = 0;
            int64_t rest = unit;
            for (; rest >= Units(calls[index], most).count(); index++) rest -= Units(calls[index], most).count();
            Units(calls[index], most).compute(inputs.of(index), rest);
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
