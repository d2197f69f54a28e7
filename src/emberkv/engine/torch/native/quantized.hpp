// Products with quantised weights in integers: values are rounded to 16 bits, a scale for each group of a row, and
// multiplied with codes of 8 or 4 bits. The sum over a group is exact; groups are added up in fp32, one after the other.
//
// A packed weight, for each COLUMNS outputs:
//
//   | a factor an output, fp32 | group 0 of the inputs | group 1 | ...
//   a group:  | codes | a scale an output, fp16 | an offset an output, fp16, where there are offsets |
//   codes:    | step 0: 4 bytes an output | step 1 | ...
//
// A step's 4 bytes hold 4 inputs of 8 bits, in the order 0 2 1 3, or 8 of 4 bits: inputs 0 2 4 6 in the lower half, and
// 1 3 5 7 in the upper one, each from the lowest bits on, as code + 8. A shift then makes pairs of neighbouring inputs
// in 16 bits, which is what a processor multiplies and adds at once. A weight is factor * (scale * code + offset).

#pragma once

#include "calls.hpp"
#include "vectors.hpp"

namespace emberkv {

typedef int16_t Shorts __attribute__((vector_size(LANES * 4)));
typedef int16_t HalfShorts __attribute__((vector_size(LANES * 2)));

constexpr float LARGEST_CODE = 32767.0f;  // of a value

// sum + a[0] b[0] + a[1] b[1], of pairs in 16 bits; none of them may be -32768 in both. Exact.
inline Ints add_pair_products(Ints sum, Ints a, Ints b) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
    return sum + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__) && defined(__AVX2__) && !defined(__AVX512F__)
    return (Ints)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return sum + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// LANES values of fp16.
inline Floats half_values(const char* from) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(load<__m256i>(from));
#elif defined(__AVX2__) && defined(__F16C__)
    return (Floats)_mm256_cvtph_ps(load<__m128i>(from));
#else
    Floats values;
    for (int lane = 0; lane < LANES; lane++) {
        uint16_t bits;
        std::memcpy(&bits, from + lane * 2, 2);
        // The exponent is moved to fp32's place and corrected by a product, which is exact for small numbers as well.
        const uint32_t magnitude = uint32_t(bits & 0x7fff) << 13;
        float value;
        std::memcpy(&value, &magnitude, 4);
        values[lane] = (bits & 0x8000 ? -value : value) * 0x1p112f;
    }
    return values;
#endif
}

inline int32_t total_of(Ints vector) {
    int32_t sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += vector[lane];
    return sum;
}

// Rows of values in 16 bits. codes: [rows, in]. scales, and sums of a group's values: [rows, in / group].
struct RoundedRows {
    int16_t* codes;
    float* scales;
    int32_t* sums;
    int in, group;

    int groups() const { return in / group; }

    static int64_t bytes(int64_t rows, int in, int group) { return round_up(rows * (in * 2 + in / group * 8)); }

    static RoundedRows at(char* memory, int64_t rows, int in, int group) {
        char* scales = memory + rows * in * 2;
        char* sums = scales + rows * (in / group) * 4;
        return {
            reinterpret_cast<int16_t*>(memory), reinterpret_cast<float*>(scales), reinterpret_cast<int32_t*>(sums), in,
            group
        };
    }

    // A group with a value that is not finite gets a scale that is none either, and so does what is computed from it.
    void round(const LinearCall& call, int row) const {
        const int64_t begin = row * call.input_row;
        int16_t* to = codes + int64_t(row) * in;
        for (int g = 0; g < groups(); g++, to += group) {
            Floats most = {}, poison = {};
            for (int i = 0; i < group; i += LANES) {
                const Floats value = values_at(call.inputs, Type(call.type), begin + g * group + i);
                most = larger(most, value > Floats{} ? value : -value);
                poison += value * 0.0f;
            }
            const float largest_value = largest(most);
            const float inverse = largest_value > 1e-30f ? LARGEST_CODE / largest_value : 0.0f;
            Ints sum = {};
            for (int i = 0; i < group; i += LANES) {
                const Floats value = values_at(call.inputs, Type(call.type), begin + g * group + i);
                const Floats nearest = splat(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded
                const Ints code = (Ints)(value * inverse + nearest) - (Ints)nearest;
                sum += code;
                emberkv::store(to + i, __builtin_convertvector(code, HalfShorts));
            }
            const int64_t at = int64_t(row) * groups() + g;
            scales[at] = largest_value * (1.0f / LARGEST_CODE) + total(poison);
            sums[at] = total_of(sum);
        }
    }

private:
    static int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }
};

// The pairs of inputs that a step's 4 bytes hold, in 16 bits; of 4 bits as code + 8.
template <int BITS>
inline Ints pair_of(Ints step, int pair) {
    if (BITS == 4) return (step >> (4 * pair)) & 0x000f000f;
    const Shorts bytes = (Shorts)step;
    return pair == 0 ? (Ints)(bytes << 8 >> 8) : (Ints)(bytes >> 8);
}

struct QuantizedColumns {
    const char* begin;
    int groups, group, bits;
    bool offsets;

    QuantizedColumns(const LinearCall& call, int64_t index)
        : groups(call.in / call.group), group(call.group), bits(call.bits), offsets(call.offsets) {
        begin = static_cast<const char*>(call.weight) + index * bytes();
    }

    int64_t code_bytes() const { return int64_t(COLUMNS) * group * bits / 8; }
    int64_t group_bytes() const { return code_bytes() + COLUMNS * 2 * (offsets ? 2 : 1); }
    int64_t bytes() const { return COLUMNS * 4 + groups * group_bytes(); }
};

// c[r][column] of R rows from ``first`` on.
template <int BITS, int R>
void multiply_few_quantized(const RoundedRows& rows, int first, const QuantizedColumns& columns, float* c) {
    constexpr int PAIRS = BITS == 4 ? 4 : 2;
    const int steps = columns.group / (2 * PAIRS), stride = rows.in / 2;  // in pairs
    const int32_t* values = reinterpret_cast<const int32_t*>(rows.codes) + int64_t(first) * stride;
    const int64_t of_first = int64_t(first) * columns.groups;
    const char* at = columns.begin + COLUMNS * 4;
    Floats totals[R][VECTORS] = {};
    for (int g = 0; g < columns.groups; g++, at += columns.group_bytes(), values += columns.group / 2) {
        Ints sums[R][VECTORS] = {};
        for (int step = 0; step < steps; step++) {
            const char* codes = at + step * COLUMNS * 4;
#pragma GCC unroll 4
            for (int pair = 0; pair < PAIRS; pair++) {
                Ints weights[VECTORS];
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; v++)
                    weights[v] = pair_of<BITS>(load<Ints>(codes + v * LANES * 4), pair);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) {
                    const Ints value = Ints{} + values[r * stride + step * PAIRS + pair];
#pragma GCC unroll 8
                    for (int v = 0; v < VECTORS; v++) sums[r][v] = add_pair_products(sums[r][v], weights[v], value);
                }
            }
        }
        const char* scales = at + columns.code_bytes();
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const int64_t index = of_first + r * columns.groups + g;
            const float scale = rows.scales[index];
            const int32_t sum = rows.sums[index];
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) {
                const Ints exact = BITS == 4 ? sums[r][v] - 8 * sum : sums[r][v];
                const Floats product = __builtin_convertvector(exact, Floats) * half_values(scales + v * LANES * 2);
                totals[r][v] = multiply_add(product, splat(scale), totals[r][v]);
                if (!columns.offsets) continue;
                const Floats offset = half_values(scales + (COLUMNS + v * LANES) * 2);
                totals[r][v] = multiply_add(offset, splat(float(sum) * scale), totals[r][v]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++)
            store(c + r * COLUMNS + v * LANES, totals[r][v] * load<Floats>(columns.begin + v * LANES * 4));
}

// Rows of a product held in registers at once: as many as leave room for weights, a value and a product.
#if defined(__AVX512F__)
constexpr int QUANTIZED_ROWS = ROWS;
#else
constexpr int QUANTIZED_ROWS = 4;
#endif

template <int BITS>
void multiply_quantized(const RoundedRows& rows, int first, int count, const QuantizedColumns& columns, float* c) {
    for (; count >= QUANTIZED_ROWS; count -= QUANTIZED_ROWS, first += QUANTIZED_ROWS, c += QUANTIZED_ROWS * COLUMNS)
        multiply_few_quantized<BITS, QUANTIZED_ROWS>(rows, first, columns, c);
    switch (count) {
        case 5: return multiply_few_quantized<BITS, 5>(rows, first, columns, c);
        case 4: return multiply_few_quantized<BITS, 4>(rows, first, columns, c);
        case 3: return multiply_few_quantized<BITS, 3>(rows, first, columns, c);
        case 2: return multiply_few_quantized<BITS, 2>(rows, first, columns, c);
        case 1: return multiply_few_quantized<BITS, 1>(rows, first, columns, c);
    }
}

inline void multiply_quantized(
    const RoundedRows& rows, int first, int count, const QuantizedColumns& columns, float* c
) {
    if (columns.bits == 4) return multiply_quantized<4>(rows, first, count, columns, c);
    multiply_quantized<8>(rows, first, count, columns, c);
}

}  // namespace emberkv
