// The largest logit of each row, and the first place that has it.

#include <limits>

#include "team.hpp"
#include "vectors.hpp"

namespace emberkv {

inline float value_at(const void* from, Type type, int64_t index) {
    return type == FP32 ? static_cast<const float*>(from)[index] : widened(static_cast<const uint16_t*>(from)[index]);
}

constexpr int STRETCH = 1024;  // columns, a multiple of LANES

struct Likeliest {
    int place;
    float value;
};

// The first of the largest in [begin, end), or the first NaN.
inline Likeliest likeliest_within(const LikeliestCall& call, int64_t first, int begin, int end) {
    Likeliest best{begin, value_at(call.logits, Type(call.type), first + begin)};
    for (int i = begin + 1; i < end && best.value == best.value; i++) {
        const float value = value_at(call.logits, Type(call.type), first + i);
        if (value > best.value || value != value) best = {i, value};
    }
    return best;
}

inline void likeliest_of_row(const LikeliestCall& call, int row) {
    const Type type = Type(call.type);
    const int64_t first = int64_t(row) * call.columns;
    const int whole = call.columns / STRETCH * STRETCH;
    float most = -std::numeric_limits<float>::infinity();
    int begin = 0;  // of the first stretch with the largest, or with a NaN
    bool numbers = true;
    for (int at = 0; at < whole && numbers; at += STRETCH) {
        Floats values = values_at(call.logits, type, first + at), unordered = {};
        for (int i = 0; i < STRETCH; i += LANES) {
            const Floats some = values_at(call.logits, type, first + at + i);
            values = some > values ? some : values;
            unordered = some == some ? unordered : splat(1.0f);
        }
        numbers = total(unordered) == 0;
        const float here = largest(values);
        if (here > most || !numbers) begin = at, most = here;
    }
    Likeliest best = likeliest_within(call, first, begin, std::min(begin + STRETCH, call.columns));
    if (numbers && whole < call.columns && begin < whole) {
        const Likeliest rest = likeliest_within(call, first, whole, call.columns);
        if (rest.value > best.value || rest.value != rest.value) best = rest;
    }
    call.places[row] = best.place;
    call.values[row] = best.value;
}

}  // namespace emberkv

EMBERKV_EXPORT void emberkv_likeliest(const LikeliestCall* call) {
    emberkv::Team::of_this_thread(call->threads).share(call->rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) emberkv::likeliest_of_row(*call, int(row));
    });
}
