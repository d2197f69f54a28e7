// Products with quantised weights in integers: values are rounded to 16 bits, a scale for each group of a row, and
// multiplied with codes of 8 or 4 bits. The sum over a group is exact; groups are added up in fp32, one after the other.
//
// A packed weight, for each COLUMNS outputs:
//
//   | a factor an output, fp32 | group 0 of the inputs | group 1 | ...
//   a group:  | codes | a scale an output, fp16 | an offset an output, fp16, where there are offsets |
//   codes of 8 bits:  | inputs 0 and 1: 2 bytes an output | inputs 2 and 3 | ...
//   codes of 4 bits:  | inputs 0 to 7: 4 bytes an output | inputs 8 to 15 | ...
//
// 4 bytes of 4-bit codes hold inputs 0 2 4 6 in the lower half, and 1 3 5 7 in the upper one, each from the lowest bits
// on, as code + 8. Sign extension, or a shift, then makes pairs of neighbouring inputs in 16 bits, which is what a
// processor multiplies and adds at once. A weight is factor * (scale * code + offset).

#pragma once

#include "calls.hpp"
#include "vectors.hpp"

namespace emberkv {

typedef int16_t Shorts __attribute__((vector_size(LANES * 4)));
typedef int16_t HalfShorts __attribute__((vector_size(LANES * 2)));
typedef int8_t Bytes __attribute__((vector_size(LANES * 2)));

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

inline Ints splat(int32_t value) { return Ints{} + value; }

// Keeps a compiler from loading it again for each of its uses, of which the processor can do fewer than products.
inline Ints in_register(Ints vector) {
#if defined(__AVX2__)
    asm("" : "+v"(vector));
#endif
    return vector;
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
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i all = (__m256i)vector;
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
#endif
    int32_t sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += vector[lane];
    return sum;
}

// Rows of values in 16 bits. scales, and sums of a group's values: [rows, in / group]. codes: [rows / together, in / 2,
// together, 2], so that rows which are multiplied together are read from one place.
struct RoundedRows {
    int16_t* codes;
    float* scales;
    int32_t* sums;
    int in, group, together;

    int groups() const { return in / group; }

    // The pairs of a row, and with it those of the rows beside it, ``together`` apart from each other.
    int32_t* pairs_of(int row) const {
        return reinterpret_cast<int32_t*>(codes) + int64_t(row / together) * together * (in / 2) + row % together;
    }

    static int64_t bytes(int64_t rows, int in, int group) {
        return round_up(rows_held(rows) * in * 2 + rows * (in / group * 8));
    }

    static RoundedRows at(char* memory, int64_t rows, int in, int group) {
        char* scales = memory + rows_held(rows) * in * 2;
        char* sums = scales + rows * (in / group) * 4;
        return {
            reinterpret_cast<int16_t*>(memory), reinterpret_cast<float*>(scales), reinterpret_cast<int32_t*>(sums), in,
            group, int(std::min<int64_t>(rows, ROWS))
        };
    }

    // A group with a value that is not finite gets a scale that is none either, and so does what is computed from it.
    void round(const LinearCall& call, int row) const {
        const int64_t begin = row * call.input_row;
        int32_t* to = pairs_of(row);
        for (int g = 0; g < groups(); g++) {
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
                int32_t pairs[LANES / 2];
                emberkv::store(pairs, __builtin_convertvector(code, HalfShorts));
                for (int pair = 0; pair < LANES / 2; pair++, to += together) *to = pairs[pair];
            }
            const int64_t at = int64_t(row) * groups() + g;
            scales[at] = largest_value * (1.0f / LARGEST_CODE) + total(poison);
            sums[at] = total_of(sum);
        }
    }

private:
    static int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }
    static int64_t rows_held(int64_t rows) {
        return rows < ROWS ? rows : (rows + ROWS - 1) / ROWS * ROWS;
    }
};

// The ``pair``-th pairs of a group's inputs in 16 bits, for the outputs of vector ``v``; of 4 bits as code + 8.
template <int BITS>
inline Ints pair_of(const char* codes, int pair, int v) {
    if (BITS == 4) return (load<Ints>(codes + (pair / 4 * COLUMNS + v * LANES) * 4) >> (pair % 4 * 4)) & 0x000f000f;
    const char* from = codes + (pair * COLUMNS + v * LANES) * 2;
#if defined(__AVX512BW__)
    return (Ints)_mm512_cvtepi8_epi16(load<__m256i>(from));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return (Ints)_mm256_cvtepi8_epi16(load<__m128i>(from));
#else
    return (Ints)__builtin_convertvector(load<Bytes>(from), Shorts);
#endif
}

template <int BITS>
inline Ints signed_pair_of(const char* codes, int pair, int v) {
    const Ints codes_of_pair = pair_of<BITS>(codes, pair, v);
    return BITS == 8 ? codes_of_pair : (Ints)((Shorts)codes_of_pair - int16_t(8));
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
    const char* group_at(int g) const { return begin + COLUMNS * 4 + g * group_bytes(); }
};

// c[r][column] of R rows from ``first`` on, for the outputs of P panels after one another.
template <int BITS, int R, int P>
void multiply_few_quantized(const RoundedRows& rows, int first, const QuantizedColumns& columns, float* c) {
    constexpr int PAIRS = 4;  // whose codes of 4 bits lie together
    const int pairs = columns.group / 2, together = rows.together;
    const int64_t panel = columns.bytes(), of_first = int64_t(first) * columns.groups;
    const int32_t* values = rows.pairs_of(first);
    const char* at = columns.group_at(0);
    Floats totals[R][P][VECTORS] = {};
    for (int g = 0; g < columns.groups; g++, at += columns.group_bytes()) {
        Ints sums[R][P][VECTORS] = {};
        const char* codes = at;
        for (int begin = 0; begin < pairs; begin += PAIRS, codes += PAIRS * COLUMNS * BITS / 4) {
#pragma GCC unroll 4
            for (int pair = 0; pair < PAIRS; pair++, values += together)
#pragma GCC unroll 4
                for (int p = 0; p < P; p++) {
                    Ints weights[VECTORS];
#pragma GCC unroll 8
                    for (int v = 0; v < VECTORS; v++) weights[v] = pair_of<BITS>(codes + p * panel, pair, v);
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++) {
                        const Ints value = splat(values[r]);
#pragma GCC unroll 8
                        for (int v = 0; v < VECTORS; v++)
                            sums[r][p][v] = add_pair_products(sums[r][p][v], weights[v], value);
                    }
                }
        }
        const char* scales = at + columns.code_bytes();
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const int64_t index = of_first + r * columns.groups + g;
            const float scale = rows.scales[index];
            const int32_t sum = rows.sums[index];
#pragma GCC unroll 4
            for (int p = 0; p < P; p++)
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; v++) {
                    const char* here = scales + p * panel + v * LANES * 2;
                    const Ints exact = BITS == 4 ? sums[r][p][v] - 8 * sum : sums[r][p][v];
                    const Floats product = __builtin_convertvector(exact, Floats) * half_values(here);
                    Floats& total = totals[r][p][v];
                    total = multiply_add(product, splat(scale), total);
                    if (!columns.offsets) continue;
                    total = multiply_add(half_values(here + COLUMNS * 2), splat(float(sum) * scale), total);
                }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++)
                store(
                    c + (r * P + p) * COLUMNS + v * LANES,
                    totals[r][p][v] * load<Floats>(columns.begin + p * panel + v * LANES * 4)
                );
}

// Some groups of a weight's COLUMNS outputs, unpacked once for many rows: pairs of codes in 16 bits, and scales and offsets
// in fp32. With AVX2 it takes 10 KiB, which leave room for the values of some rows in a core's first cache; with AVX-512
// 40 KiB.
class UnpackedGroups {
public:
    // As many groups, from ``g`` on, as there is room for.
    template <int BITS>
    void unpack(const QuantizedColumns& columns, int g) {
        first_ = g;
        count_ = std::min(columns.groups - g, DEPTH / columns.group);
        pairs_ = columns.group / 2;
        offsets_ = columns.offsets;
        Ints* to = codes_;
        for (int i = 0; i < count_; i++) {
            const char* at = columns.group_at(g + i);
            const char* scales = at + columns.code_bytes();
            for (int pair = 0; pair < pairs_; pair += 4)
#pragma GCC unroll 4
                for (int p = pair; p < pair + 4; p++)
                    for (int v = 0; v < VECTORS; v++) *to++ = signed_pair_of<BITS>(at, p, v);
            for (int v = 0; v < VECTORS; v++) {
                scale_of_[i * VECTORS + v] = half_values(scales + v * LANES * 2);
                if (offsets_) offset_of_[i * VECTORS + v] = half_values(scales + (COLUMNS + v * LANES) * 2);
            }
        }
    }

    int end() const { return first_ + count_; }

    // Adds these groups' products with ``count`` rows from ``first`` on, at most ROWS, to c[r][column].
    void multiply(const RoundedRows& rows, int first, int count, float* c) const {
        if (offsets_) multiply_with<true>(rows, first, count, c);
        else multiply_with<false>(rows, first, count, c);
    }

private:
    static constexpr int DEPTH = 256;  // inputs, a multiple of any group

    template <bool OFFSETS>
    void multiply_with(const RoundedRows& rows, int first, int count, float* c) const {
        switch (count) {
            case 6: return multiply_rows<6, OFFSETS>(rows, first, c);
            case 5: return multiply_rows<5, OFFSETS>(rows, first, c);
            case 4: return multiply_rows<4, OFFSETS>(rows, first, c);
            case 3: return multiply_rows<3, OFFSETS>(rows, first, c);
            case 2: return multiply_rows<2, OFFSETS>(rows, first, c);
            case 1: return multiply_rows<1, OFFSETS>(rows, first, c);
        }
    }

    // A function of its own, because a compiler that has other values to keep as well runs out of registers.
    template <int R, bool OFFSETS>
    __attribute__((noinline)) void multiply_rows(const RoundedRows& rows, int first, float* c) const {
        const int together = rows.together;
        const int32_t* values = rows.pairs_of(first) + int64_t(first_) * pairs_ * together;
        const Ints* codes = codes_;
        const int count = count_, pairs = pairs_, row_groups = rows.groups();
        const int64_t at = int64_t(first) * row_groups + first_;
        const float* scales = rows.scales + at;
        const int32_t* value_sums = rows.sums + at;
        for (int i = 0; i < count; i++) {
            Ints sums[R][VECTORS] = {};
            for (int pair = 0; pair < pairs; pair++, values += together, codes += VECTORS) {
                Ints weights[VECTORS];
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; v++) weights[v] = in_register(codes[v]);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) {
                    const Ints value = splat(values[r]);
#pragma GCC unroll 8
                    for (int v = 0; v < VECTORS; v++) sums[r][v] = add_pair_products(sums[r][v], weights[v], value);
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const float scale = scales[r * row_groups + i];
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; v++) {
                    float* to = c + r * COLUMNS + v * LANES;
                    const Floats product = __builtin_convertvector(sums[r][v], Floats) * scale_of_[i * VECTORS + v];
                    Floats total = multiply_add(product, splat(scale), load<Floats>(to));
                    if (OFFSETS) {
                        const Floats sum = splat(float(value_sums[r * row_groups + i]) * scale);
                        total = multiply_add(offset_of_[i * VECTORS + v], sum, total);
                    }
                    store(to, total);
                }
            }
            // Else a compiler keeps the totals in a second place for the next group, and stores each of them twice.
            asm volatile("" ::: "memory");
        }
    }

    Ints codes_[DEPTH / 2 * VECTORS];
    Floats scale_of_[DEPTH / 16 * VECTORS], offset_of_[DEPTH / 16 * VECTORS];
    int first_, count_, pairs_;
    bool offsets_;
};

// c: [count, panels * COLUMNS]. panels: as `panels_at_once` allows.
template <int BITS>
void multiply_quantized(
    const RoundedRows& rows, int first, int count, const QuantizedColumns& columns, int panels, float* c
) {
    if (panels == 4) return multiply_few_quantized<BITS, 1, 4>(rows, first, columns, c);
    if (panels == 2) switch (count) {
        case 1: return multiply_few_quantized<BITS, 1, 2>(rows, first, columns, c);
        case 2: return multiply_few_quantized<BITS, 2, 2>(rows, first, columns, c);
        case 3: return multiply_few_quantized<BITS, 3, 2>(rows, first, columns, c);
    }
    switch (count) {  // it does not pay to unpack weights in advance for rows that are multiplied once with them
        case 1: return multiply_few_quantized<BITS, 1, 1>(rows, first, columns, c);
        case 2: return multiply_few_quantized<BITS, 2, 1>(rows, first, columns, c);
        case 3: return multiply_few_quantized<BITS, 3, 1>(rows, first, columns, c);
        case 4: return multiply_few_quantized<BITS, 4, 1>(rows, first, columns, c);
        case 5: return multiply_few_quantized<BITS, 5, 1>(rows, first, columns, c);
        case 6: return multiply_few_quantized<BITS, 6, 1>(rows, first, columns, c);
    }
    std::memset(c, 0, size_t(count) * COLUMNS * 4);
    UnpackedGroups groups;
    for (int g = 0; g < columns.groups; g = groups.end()) {
        groups.unpack<BITS>(columns, g);
        const char* next = columns.group_at(groups.end());
        const int64_t bytes = next - columns.group_at(g);
        for (int r = 0; r < count; r += ROWS) {
            const int some = std::min(ROWS, count - r);
            prefetch_share(next, bytes, r, r + some, count);
            groups.multiply(rows, first + r, some, c + r * COLUMNS);
        }
    }
    for (int r = 0; r < count; r++)
        for (int v = 0; v < VECTORS; v++) {
            float* to = c + r * COLUMNS + v * LANES;
            store(to, load<Floats>(to) * load<Floats>(columns.begin + v * LANES * 4));
        }
}

inline void multiply_quantized(
    const RoundedRows& rows, int first, int count, const QuantizedColumns& columns, int panels, float* c
) {
    if (columns.bits == 4) return multiply_quantized<4>(rows, first, count, columns, panels, c);
    multiply_quantized<8>(rows, first, count, columns, panels, c);
}

}  // namespace emberkv
