// Linear recurrences on CPU with a matrix a head as their state: Mamba-2 (Dao and Gu 2024, arXiv:2405.21060) and gated
// delta nets (Yang, Kautz and Hatamizadeh 2024, arXiv:2412.06464). Token by token, so that nothing depends on how a
// prompt is cut; recurrence.py says what is computed.
//
// A state [depth, width] is computed in panels of COLUMNS of its columns, which do not depend on one another and fit the
// first cache.

#include <cmath>

#include "calls.hpp"
#include "team.hpp"
#include "vectors.hpp"

namespace emberkv {

constexpr int MOST_COLUMNS = 15;  // of earlier tokens that a convolution sees; recurrence.py looks at it
constexpr float NORM_EPSILON = 1e-6f;

inline float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

inline float value_at(const void* from, Type type, int64_t index) {
    return type == FP32 ? static_cast<const float*>(from)[index] : widened(static_cast<const uint16_t*>(from)[index]);
}

// The first ``count`` of LANES values, and zeros.
inline Floats some_values(const void* from, Type type, int64_t index, int count) {
    if (count >= LANES) return values_at(from, type, index);
    float values[LANES] = {};
    for (int i = 0; i < count; i++) values[i] = value_at(from, type, index + i);
    return load<Floats>(values);
}

inline void put_some(void* to, Type type, int64_t index, Floats values, int count) {
    float wide[LANES];
    store(wide, values);
    narrow(wide, type, std::min(count, LANES), static_cast<char*>(to) + index * (type == FP32 ? 4 : 2));
}

class Pass {
public:
    Pass(const RecurrenceCall& call) : call_(call), type_(Type(call.type)), inner_(int64_t(call.heads) * call.width) {}

    // Of LANES channels from ``channel`` on, for all tokens of a run.
    void convolve(const StateRun& run, int channel) const {
        const int columns = call_.columns, count = call_.channels - channel;
        Floats seen[MOST_COLUMNS + 1] = {}, taps[MOST_COLUMNS + 1];
        for (int c = 0; c < columns && run.start > 0; c++)
            seen[c] = some_values(convolved_before(run), type_, int64_t(c) * call_.channels + channel, count);
        for (int c = 0; c <= columns; c++)
            taps[c] = some_values(call_.taps, FP32, int64_t(c) * call_.channels + channel, count);
        const Floats bias = call_.bias ? some_values(call_.bias, FP32, channel, count) : Floats{};
        for (int i = 0; i < run.count; i++) {
            const int64_t row = run.first_row + i;
            seen[columns] = some_values(call_.mixed, type_, row * call_.mixed_row + channel, count);
            Floats sum = bias;
            for (int c = 0; c <= columns; c++) sum = multiply_add(seen[c], taps[c], sum);
            put_some(call_.convolved, FP32, row * call_.channels + channel, times_sigmoid(sum, sum), count);
            for (int c = 0; c < columns; c++) seen[c] = seen[c + 1];
            if (char* to = state_behind(run, i, call_.convolved_states))
                for (int c = 0; c < columns; c++)
                    put_some(to, type_, int64_t(c) * call_.channels + channel, seen[c], count);
        }
    }

    // The decay of each head and what its values are multiplied by; and a delta net's keys and queries, normalised.
    void prepare(int row) const {
        float* decays = call_.decays + int64_t(row) * 2 * call_.heads;
        float* factors = decays + call_.heads;
        for (int head = 0; head < call_.heads; head++) {
            float step = softplus(value_at(call_.steps, type_, row * call_.steps_row + head) + call_.step_bias[head]);
            step = std::min(std::max(step, call_.least_step), call_.most_step);
            decays[head] = std::exp(-std::exp(call_.log_decay[head]) * step);
            factors[head] = step;
            if (!call_.delta) continue;
            const float beta = value_at(call_.betas, type_, row * call_.betas_row + head);
            factors[head] = call_.beta_factor / (1.0f + std::exp(-beta));
        }
        if (!call_.delta) return;
        float* convolved = call_.convolved + int64_t(row) * call_.channels;
        for (int head = 0; head < call_.key_heads; head++) {
            make_unit(convolved + call_.queries_at + head * call_.depth, 1.0f / std::sqrt(float(call_.depth)));
            make_unit(convolved + call_.keys_at + head * call_.depth, 1.0f);
        }
    }

    // Of COLUMNS columns of a head's state from ``column`` on, for all tokens of a run.
    void recur(const StateRun& run, int head, int column, float* state) const {
        const int depth = call_.depth, count = std::min(call_.width - column, COLUMNS);
        const int64_t place = int64_t(head) * depth * call_.width + column;
        std::fill(state, state + int64_t(depth) * COLUMNS, 0.0f);
        if (run.start > 0) {
            const float* from = reinterpret_cast<const float*>(block_before(run, call_.states)) + place;
            for (int d = 0; d < depth; d++) std::copy_n(from + int64_t(d) * call_.width, count, state + d * COLUMNS);
        }
        const int key_head = head / (call_.heads / call_.key_heads);
        for (int i = 0; i < run.count; i++) {
            const int64_t row = run.first_row + i;
            const float* convolved = call_.convolved + row * call_.channels;
            const float* query = convolved + call_.queries_at + key_head * depth;
            const float* key = convolved + call_.keys_at + key_head * depth;
            float values[COLUMNS] = {}, out[COLUMNS];
            std::copy_n(convolved + call_.values_at + head * call_.width + column, count, values);
            const float decay = call_.decays[row * 2 * call_.heads + head];
            const float factor = call_.decays[row * 2 * call_.heads + call_.heads + head];
            if (call_.delta) correct(state, decay, key, values);
            add(state, decay, factor, key, query, values, out);
            if (call_.skip)
                for (int c = 0; c < COLUMNS; c++) out[c] += call_.skip[head] * values[c];
            std::copy_n(out, count, call_.results + row * inner_ + head * call_.width + column);
            if (char* block = state_behind(run, i, call_.states)) {
                float* to = reinterpret_cast<float*>(block) + place;
                for (int d = 0; d < depth; d++) std::copy_n(state + d * COLUMNS, count, to + int64_t(d) * call_.width);
            }
        }
    }

    // The gate and the norm of a row.
    void finish(int row) const {
        float* results = call_.results + int64_t(row) * inner_;
        const int size = call_.norm_size ? call_.norm_size : int(inner_);
        for (int64_t first = 0; first < inner_; first += size) {
            Floats squares = {};
            for (int c = 0; c < size; c += LANES) {
                Floats value = some_values(results, FP32, first + c, size - c);
                if (call_.gated_first) value *= gate_at(row, first + c, size - c);
                put_some(results, FP32, first + c, value, size - c);
                squares = multiply_add(value, value, squares);
            }
            const float norm = 1.0f / std::sqrt(total(squares) / float(size) + call_.epsilon);
            for (int c = 0; c < size; c += LANES) {
                Floats value = some_values(results, FP32, first + c, size - c);
                if (call_.norm_size) value = value * norm * some_values(call_.scale, FP32, first + c, size - c);
                if (!call_.gated_first) value *= gate_at(row, first + c, size - c);
                put_some(call_.out, type_, row * inner_ + first + c, value, size - c);
            }
        }
    }

private:
    Floats gate_at(int row, int64_t channel, int count) const {
        const Floats gate = some_values(call_.gate, type_, row * call_.gate_row + channel, count);
        return times_sigmoid(gate, gate);
    }

    void make_unit(float* vector, float factor) const {
        Floats squares = {};
        for (int d = 0; d < call_.depth; d += LANES) {
            const Floats value = some_values(vector, FP32, d, call_.depth - d);
            squares = multiply_add(value, value, squares);
        }
        const float scale = factor / std::sqrt(total(squares) + NORM_EPSILON);
        for (int d = 0; d < call_.depth; d += LANES)
            put_some(vector, FP32, d, some_values(vector, FP32, d, call_.depth - d) * scale, call_.depth - d);
    }

    // Takes from the values what the decayed state holds under the key. Sums of four are added up side by side, as one
    // sum would wait for itself.
    void correct(const float* state, float decay, const float* key, float* values) const {
        Floats sums[4][VECTORS] = {};
        for (int d = 0; d < call_.depth; d++)
            for (int v = 0; v < VECTORS; v++)
                sums[d % 4][v] = multiply_add(splat(key[d]), load<Floats>(state + d * COLUMNS + v * LANES), sums[d % 4][v]);
        for (int v = 0; v < VECTORS; v++) {
            const Floats held = (sums[0][v] + sums[1][v]) + (sums[2][v] + sums[3][v]);
            store(values + v * LANES, load<Floats>(values + v * LANES) - held * decay);
        }
    }

    void add(
        float* state, float decay, float factor, const float* key, const float* query, const float* values, float* out
    ) const {
        Floats sums[2][VECTORS] = {}, added[VECTORS];
        for (int v = 0; v < VECTORS; v++) added[v] = load<Floats>(values + v * LANES) * factor;
        for (int d = 0; d < call_.depth; d++)
            for (int v = 0; v < VECTORS; v++) {
                float* at = state + d * COLUMNS + v * LANES;
                const Floats value = multiply_add(splat(key[d]), added[v], load<Floats>(at) * decay);
                store(at, value);
                sums[d % 2][v] = multiply_add(splat(query[d]), value, sums[d % 2][v]);
            }
        for (int v = 0; v < VECTORS; v++) store(out + v * LANES, sums[0][v] + sums[1][v]);
    }

    char* block_at(const StateRun& run, int position, char* states) const {
        return states + call_.block_ids[run.block_table + position / call_.block_size] * call_.block_bytes;
    }

    const char* block_before(const StateRun& run, char* states) const { return block_at(run, run.start - 1, states); }

    const char* convolved_before(const StateRun& run) const { return block_before(run, call_.convolved_states); }

    // Where the state goes behind the run's ``i``-th token: behind the last one of a block or of the run; else null.
    char* state_behind(const StateRun& run, int i, char* states) const {
        const int position = run.start + i;
        const bool last = i + 1 == run.count || (position + 1) % call_.block_size == 0;
        return last ? block_at(run, position, states) : nullptr;
    }

    const RecurrenceCall& call_;
    const Type type_;
    const int64_t inner_;
};

void recurrence_by_team(Team& team, const RecurrenceCall& call) {
    const Pass pass(call);
    const int64_t lanes = (call.channels + LANES - 1) / LANES, panels = (call.width + COLUMNS - 1) / COLUMNS;
    const int rows_of_a_run = std::max(1, call.rows / call.num_runs);
    team.share(call.num_runs * lanes, grain_of(LANES * rows_of_a_run), [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; unit++) pass.convolve(call.runs[unit / lanes], int(unit % lanes) * LANES);
    });
    team.share(call.rows, grain_of(call.heads * 8 + call.channels), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) pass.prepare(int(row));
    });
    const int64_t units = call.heads * panels;
    team.share(call.num_runs * units, grain_of(call.depth * COLUMNS * rows_of_a_run), [&](int64_t begin, int64_t end) {
        static thread_local Memory panel;
        float* state = reinterpret_cast<float*>(panel.take(int64_t(call.depth) * COLUMNS * 4));
        for (int64_t unit = begin; unit < end; unit++) {
            const int64_t of_run = unit % units;
            pass.recur(call.runs[unit / units], int(of_run / panels), int(of_run % panels) * COLUMNS, state);
        }
    });
    team.share(call.rows, grain_of(call.heads * call.width), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) pass.finish(int(row));
    });
}

}  // namespace emberkv

EMBERKV_EXPORT int32_t emberkv_most_columns() { return emberkv::MOST_COLUMNS; }

EMBERKV_EXPORT void emberkv_recurrence(const RecurrenceCall* call) {
    emberkv::recurrence_by_team(emberkv::Team::of_this_thread(call->threads), *call);
}
