// Rounds groups of weights to 4 bits with a scale and an offset: the search of `fitted` in quantization/weight.py, by the
// same operations in the same order, so that the bits are the same. A vector holds one value of LANES groups each.

#include <cfloat>
#include <cmath>
#include <limits>

#include "team.hpp"
#include "vectors.hpp"

namespace emberkv {

constexpr int LARGEST_GROUP = 128;
constexpr double WIDTHS[] = {1.0, 0.93, 0.86};  // shares of a group's range over which the search begins
constexpr int FITS = 2;                        // times that codes, scale and offset are found anew for each of these

inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }

inline Floats rounded(Floats x) {  // half to even
#if defined(__AVX512F__)
    return (Floats)_mm512_roundscale_ps((__m512)x, 0);
#elif defined(__AVX2__)
    return (Floats)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    for (int lane = 0; lane < LANES; lane++) x[lane] = std::nearbyint(x[lane]);
    return x;
#endif
}

struct Groups {
    Floats values[LARGEST_GROUP];  // less their group's middle
    Floats total;                  // of these
    int size;

    Floats code(int i, Floats inverse, Floats offset) const {
        const Floats found = rounded((values[i] - offset) * inverse);
        return smaller(larger(found, splat(-8.0f)), splat(7.0f));
    }
};

struct Fitted {
    Floats gain, scale, offset;  // gain: by how much the squared error is smaller than without codes
};

inline Floats inverse_of(Floats scale) {
    const Floats size = scale < 0 ? -scale : scale;
    return size > splat(FLT_MIN) ? 1.0f / scale : Floats{};
}

// The scale and the offset with the least squared error for the codes that these two give.
inline Fitted fit(const Groups& groups, Floats scale, Floats offset) {
    const Floats inverse = inverse_of(scale);
    Floats sum = groups.code(0, inverse, offset), products = sum * groups.values[0], squares = sum * sum;
    for (int i = 1; i < groups.size; i++) {
        const Floats code = groups.code(i, inverse, offset);
        sum += code;
        products += code * groups.values[i];
        squares += code * code;
    }
    const float size = float(groups.size);
    const Floats mean = sum / size;
    products -= mean * groups.total;
    squares -= size * mean * mean;
    const Floats found = squares > Floats{} ? products / squares : Floats{};
    return {found * products, found, groups.total / size - found * mean};
}

// LANES groups, or ``count`` of them.
inline void fit_groups(const FitCall& call, int64_t first, int count) {
    Groups groups;
    groups.size = call.size;
    const float* from = call.values + first * call.size;
    for (int i = 0; i < call.size; i++) {
        groups.values[i] = Floats{};
        for (int lane = 0; lane < count; lane++) groups.values[i][lane] = from[lane * call.size + i];
    }
    Floats least = groups.values[0], most = groups.values[0];
    for (int i = 1; i < call.size; i++) {
        least = smaller(groups.values[i], least);
        most = larger(groups.values[i], most);
    }
    const Floats middle = (least + most) / 2.0f;
    for (int i = 0; i < call.size; i++) groups.values[i] -= middle;
    groups.total = groups.values[0];
    for (int i = 1; i < call.size; i++) groups.total += groups.values[i];
    Fitted best{splat(-std::numeric_limits<float>::infinity()), groups.total, groups.total};
    for (double width : WIDTHS) {
        const Floats scale = (most - least) * float(width / 15);
        Fitted found{Floats{}, scale, scale / 2.0f};
        for (int i = 0; i < FITS; i++) found = fit(groups, found.scale, found.offset);
        const Ints better = found.gain > best.gain;
        best = {
            better ? found.gain : best.gain, better ? found.scale : best.scale, better ? found.offset : best.offset
        };
    }
    const Floats inverse = inverse_of(best.scale), offset = best.offset + middle;
    uint8_t* codes = call.codes + first * call.size / 2;
    for (int i = 0; i < call.size; i += 2) {
        const Floats low = groups.code(i, inverse, best.offset) + 8.0f;
        const Floats high = groups.code(i + 1, inverse, best.offset) + 8.0f;
        const Ints both = __builtin_convertvector(low + high * 16.0f, Ints);
        for (int lane = 0; lane < count; lane++) codes[(lane * call.size + i) / 2] = uint8_t(both[lane]);
    }
    for (int lane = 0; lane < count; lane++) {
        call.scales[first + lane] = best.scale[lane];
        call.offsets[first + lane] = offset[lane];
    }
}

}  // namespace emberkv

EMBERKV_EXPORT int32_t emberkv_largest_group() { return emberkv::LARGEST_GROUP; }

EMBERKV_EXPORT void emberkv_fit_groups(const FitCall* call) {
    using namespace emberkv;
    const int64_t vectors = (call->groups + LANES - 1) / LANES;
    Team::of_this_thread(call->threads).share(vectors, 16, [&](int64_t begin, int64_t end) {
        for (int64_t vector = begin; vector < end; vector++) {
            const int64_t first = vector * LANES;
            fit_groups(*call, first, int(std::min<int64_t>(LANES, call->groups - first)));
        }
    });
}
