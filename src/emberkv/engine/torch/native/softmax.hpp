// The softmax of a row's scores over a span of keys, and how the results over spans become one.

#pragma once

#include <cmath>

#include "vectors.hpp"

namespace emberkv {

constexpr float UNSEEN = -1e30f;  // a score so low that it weighs nothing

// cap * tanh(score / cap), with tanh|x| = (1 - e^-2|x|) / (1 + e^-2|x|), given the sign of x.
inline Floats capped(Floats score, float cap) {
    const Ints sign = Ints{} + INT32_MIN;
    Ints x = (Ints)(score * (1.0f / cap));
    Floats e = exp2_of((Floats)(x | sign) * (2.0f * LOG2_E));  // e^-2|x|
    Floats tanh = (1.0f - e) / (1.0f + e);
    return (Floats)((Ints)tanh | (x & sign)) * cap;
}

struct Softmax {
    float maximum, sum;  // maximum: of score * log2(e)
};

// What becomes of a product of query and key before the softmax.
struct Scoring {
    float scale, softcap;  // softcap 0: none
    float slope;           // of ALiBi: what is taken off for each token between query and key; 0: nothing
    int position;          // of the query, relative to the first key

    bool is_product() const { return softcap <= 0 && slope == 0; }

    // Scores of ``keys`` keys, a multiple of LANES, in place.
    void apply(float* scores, int keys) const {
        Floats distance = {};
        for (int i = 0; i < LANES; i++) distance[i] = float(i - position);
        for (int k = 0; k < keys; k += LANES, distance += float(LANES)) {
            Floats score = load<Floats>(scores + k) * scale;
            if (softcap > 0) score = capped(score, softcap);
            store(scores + k, multiply_add(distance, splat(slope), score));
        }
    }
};

// Where keys and values are held as integers: what each key's products, and each value's weights, are multiplied by.
struct Scales {
    const float *keys, *values;
};

// Makes weights 2^(score - maximum) of a row's products over ``keys`` keys, of which it sees [begin, end). scales: used
// where SCALED.
template <class Arithmetic, bool SCALED, class Unit = typename Arithmetic::Unit>
Softmax softmax(
    float* scores, int keys, int begin, int end, const Scoring& scoring, const Scales& scales, Unit* weights
) {
    constexpr int STEP = LANES / Arithmetic::VALUES;
    if (begin >= end) {
        std::memset(weights, 0, size_t(keys / LANES) * STEP * sizeof(Unit));
        return {UNSEEN, 0};
    }
    if constexpr (SCALED)
        for (int k = 0; k < keys; k += LANES)
            store(scores + k, load<Floats>(scores + k) * load<Floats>(scales.keys + k));
    if (!scoring.is_product()) scoring.apply(scores, keys);
    std::fill(scores, scores + begin, UNSEEN);
    std::fill(scores + end, scores + keys, UNSEEN);
    const float factor = (scoring.is_product() ? scoring.scale : 1) * LOG2_E;
    Floats most = splat(UNSEEN);
    for (int k = 0; k < keys; k += LANES) most = larger(most, load<Floats>(scores + k));
    const float maximum = factor * largest(most);
    Floats sums = {};
    for (int k = 0; k < keys; k += LANES) {
        const Floats exponent = multiply_add(load<Floats>(scores + k), splat(factor), splat(-maximum));
        const Floats weight = exp2_of<Arithmetic::EXP2_DEGREE>(exponent);
        sums += weight;
        Arithmetic::put(
            weights + k / LANES * STEP, SCALED ? weight * load<Floats>(scales.values + k) : weight
        );
    }
    return {maximum, total(sums)};
}

// What a row's weighted values are multiplied by, once all its spans are folded together: one over the sum of the
// weights. sink: a score that has a weight in that sum, and no value; null: none.
inline float normalizer(const Softmax& whole, const float* sink) {
    if (!sink) return 1.0f / whole.sum;
    const float difference = *sink * LOG2_E - whole.maximum, smaller = exp2_of(-std::fabs(difference));
    return difference > 0 ? smaller / (whole.sum * smaller + 1.0f) : 1.0f / (whole.sum + smaller);
}

// Adds a span's weighted values to those of the spans before it, both relative to their own maxima.
inline void fold(
    Softmax& whole, float* values, const Softmax& span, const float* more, int dim
) {
    if (span.maximum == UNSEEN) return;
    const float difference = span.maximum - whole.maximum, smaller = exp2_of(-std::fabs(difference));
    const float old_weight = difference > 0 ? smaller : 1.0f, new_weight = difference > 0 ? 1.0f : smaller;
    whole.sum = whole.sum * old_weight + span.sum * new_weight;
    whole.maximum = std::max(whole.maximum, span.maximum);
    for (int d = 0; d < dim; d += LANES) {
        const Floats added = load<Floats>(more + d) * new_weight;
        store(values + d, multiply_add(load<Floats>(values + d), splat(old_weight), added));
    }
}

}  // namespace emberkv
