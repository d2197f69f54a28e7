// Root-mean-square normalization on CPU (Zhang and Sennrich 2019, arXiv:1910.07467).

#include <cmath>

#include "calls.hpp"
#include "team.hpp"
#include "vectors.hpp"

namespace emberkv {

void rms_norm_row(const NormCall& call, int row) {
    const Type type = Type(call.type);
    const int64_t first = row * call.input_row, out = int64_t(row) * call.size;
    Floats squares = {};
    for (int i = 0; i < call.size; i += LANES) {
        const Floats value = values_at(call.inputs, type, first + i);
        squares = multiply_add(value, value, squares);
    }
    const float mean = total(squares) / float(call.size);
    const float factor = 1.0f / std::sqrt(mean + call.epsilon);
    for (int i = 0; i < call.size; i += LANES) {
        float values[LANES];
        store(values, values_at(call.inputs, type, first + i) * factor * load<Floats>(call.scale + i));
        narrow(values, type, LANES, static_cast<char*>(call.out) + (out + i) * (type == FP32 ? 4 : 2));
    }
}

void rms_norm_by_team(Team& team, const NormCall& call) {
    team.share(call.rows, grain_of(call.size), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) rms_norm_row(call, int(row));
    });
}

}  // namespace emberkv

EMBERKV_EXPORT void emberkv_rms_norm(const NormCall* call) {
    const int threads = call->rows >= 8 ? call->threads : 1;  // a few rows are done before another thread has woken
    emberkv::rms_norm_by_team(emberkv::Team::of_this_thread(threads), *call);
}
