// Vectors, values in fp32 and bf16, and products of small matrices, for the kernels of this folder.
//
// Whatever is computed for a row is computed in the same order however many rows there are, so that its bits do not
// depend on its neighbours.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define EMBERKV_EXPORT extern "C" __attribute__((visibility("default")))

namespace emberkv {

#if defined(__AVX512F__)
constexpr int LANES = 16, VECTORS = 4;
#elif defined(__AVX2__)
constexpr int LANES = 8, VECTORS = 2;
#else
constexpr int LANES = 4, VECTORS = 4;
#endif
constexpr int COLUMNS = LANES * VECTORS;  // of a product, held in registers at once
constexpr int ROWS = 6;                   // of a product, held in registers at once
constexpr float LOG2_E = 1.44269504088896340736f;

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t Narrow __attribute__((vector_size(LANES * 2)));

template <class Vector, class Value>
inline Vector load(const Value* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

template <class Vector, class Value>
inline void store(Value* to, Vector vector) {
    std::memcpy(to, &vector, sizeof vector);
}

// Not as Floats{} + value: that is an addition, which a compiler has to keep for the sake of a negative zero.
inline Floats splat(float value) {
#if defined(__AVX512F__)
    return (Floats)_mm512_set1_ps(value);
#elif defined(__AVX2__)
    return (Floats)_mm256_set1_ps(value);
#else
    return Floats{value, value, value, value};
#endif
}

// a * b + c, rounded once where the processor can. A compiler that may join two operations does so in one place and not
// in another, so it may not (-ffp-contract=off).
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}

inline float largest(Floats vector) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)vector);
#elif defined(__AVX2__)
    const __m256 all = (__m256)vector;
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
#else
    float most = vector[0];
    for (int lane = 1; lane < LANES; lane++) most = std::max(most, vector[lane]);
    return most;
#endif
}

inline float total(Floats vector) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)vector);
#elif defined(__AVX2__)
    const __m256 all = (__m256)vector;
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += vector[lane];
    return sum;
#endif
}

// Whether one of ``count`` values, a multiple of LANES, is NaN; it may say so of infinite ones, too.
inline bool has_nan(const float* values, int count) {
    Floats sums = {};
    for (int i = 0; i < count; i += LANES) sums += load<Floats>(values + i);
    const float sum = total(sums);
    return sum != sum;
}

// Makes zeros of all values of units but the ``first`` to before the ``last`` of each: of 1 value in fp32, of 2 in bf16.
inline void keep_values(float* units, int count, int first, int last) {
    if (first >= last) std::fill_n(units, count, 0.0f);
}

inline void keep_values(uint32_t* units, int count, int first, int last) {
    const uint32_t kept = (first <= 0 && last > 0 ? 0xffff : 0) | (first <= 1 && last > 1 ? 0xffff0000 : 0);
    for (int i = 0; i < count; i++) units[i] &= kept;
}

// Copies without a call, as the lengths here are short.
inline void copy(void* to, const void* from, size_t bytes) {
    char* target = static_cast<char*>(to);
    const char* source = static_cast<const char*>(from);
    for (; bytes >= sizeof(Floats); bytes -= sizeof(Floats), target += sizeof(Floats), source += sizeof(Floats))
        store(target, load<Floats>(source));
    if (bytes) std::memcpy(target, source, bytes);
}

// Has the cache load a share of so many bytes, from ``begin`` to ``end`` of ``whole``, while others are computed with.
inline void prefetch_share(const void* from, int64_t bytes, int begin, int end, int whole) {
    const char* first = static_cast<const char*>(from);
    for (int64_t at = bytes * begin / whole / 64 * 64; at < bytes * end / whole; at += 64)
        __builtin_prefetch(first + at, 0, 2);
}

constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

enum Type : int32_t { FP32, BF16 };

inline float widened(uint16_t bf16) {
    uint32_t bits = uint32_t(bf16) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// LANES values in fp32.
inline Floats values_at(const void* from, Type type, int64_t index) {
    if (type == FP32) return load<Floats>(static_cast<const float*>(from) + index);
    const Narrow bf16 = load<Narrow>(static_cast<const uint16_t*>(from) + index);
    return (Floats)(__builtin_convertvector(bf16, Ints) << 16);
}

// LANES values rounded to bf16, in the lower halves.
inline Ints rounded_to_bf16(Floats values) {
    typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
    const Bits bits = (Bits)values, nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (Ints)(bits & 0x7fffffff) > 0x7f800000 ? Ints{} + 0x7fc0 : (Ints)nearest;
}

// Stores values in fp32 as ``type``.
inline void narrow(const float* from, Type type, int count, void* to) {
    if (type == FP32) {
        std::memcpy(to, from, size_t(count) * 4);
    } else {
        int i = 0;
#if defined(__AVX512BF16__)
        for (; i + LANES <= count; i += LANES)
            store(static_cast<uint16_t*>(to) + i, _mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
#else
        for (; i + LANES <= count; i += LANES)
            store(static_cast<uint16_t*>(to) + i, __builtin_convertvector(rounded_to_bf16(load<Floats>(from + i)), Narrow));
#endif
        for (; i < count; i++) static_cast<uint16_t*>(to)[i] = to_bf16(from[i]);
    }
}

// How values are multiplied. A unit is what one multiplication takes of a row: one value in fp32, two neighbours in bf16.
struct SinglePrecision {
    using Unit = float;
    static constexpr int VALUES = 1;
    static Floats add_product(Floats sum, Unit a, const Unit* b) {
        return multiply_add(splat(a), load<Floats>(b), sum);
    }
    static constexpr int EXP2_DEGREE = 5;
    static void put(Unit* to, Floats values) { store(to, values); }
};

#if defined(__AVX512BF16__)
struct Bf16Pairs {
    using Unit = uint32_t;
    static constexpr int VALUES = 2;
    static Floats add_product(Floats sum, Unit a, const Unit* b) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(a)), load<__m512bh>(b));
    }
    static constexpr int EXP2_DEGREE = 3;  // for values that are then rounded to a unit's
    static void put(Unit* to, Floats values) { store(to, _mm512_cvtneps_pbh((__m512)values)); }
};
#else
// For processors without an instruction that multiplies bf16: values are widened to fp32, which is exact, and both of a
// unit are added one after the other. The first factor's are widened before.
struct Bf16Pairs {
    struct Unit {
        float first, second;
    };
    static constexpr int VALUES = 2;
    static Floats add_product(Floats sum, const Unit& a, const uint32_t* b) {
        const Ints units = load<Ints>(b);
        sum = multiply_add(splat(a.first), first_of(units), sum);
        return multiply_add(splat(a.second), second_of(units), sum);
    }

    static Floats first_of(Ints units) { return (Floats)(units << 16); }
    static Floats second_of(Ints units) { return (Floats)(units & int32_t(0xffff0000)); }
};
#endif

// The second factor of a product: where a unit's LANES columns of vector v lie. ``from(column)`` are the columns from
// there on, a multiple of COLUMNS.

// Panels of COLUMNS columns after one another, ``depth`` units each.
template <class Unit>
struct Packed {
    const Unit* first;
    int depth;
    const Unit* at(int u, int v) const { return first + (v / VECTORS * depth + u) * COLUMNS + v % VECTORS * LANES; }
    Packed from(int column) const { return {first + column * depth, depth}; }
};

// Each vector's columns where they are, one unit ``stride`` units below another.
template <class Unit>
struct ByVector {
    const Unit* const* vectors;
    int stride;
    const Unit* at(int u, int v) const { return vectors[v] + u * stride; }
    ByVector from(int column) const { return {vectors + column / LANES, stride}; }
};

// Each unit's columns where they are.
template <class Unit>
struct ByUnit {
    const Unit* const* units;
    int column;
    const Unit* at(int u, int v) const { return units[u] + column + v * LANES; }
    ByUnit from(int more) const { return {units, column + more}; }
};

// c[r][v] = sum over u of a[r][u] * b[u][v], for R rows and V vectors of columns. CONTINUED: is added to what c holds, unit
// after unit, as if those before had been of the same sum.
template <class Arithmetic, int R, int V, bool CONTINUED = false, class Factor, class Unit = typename Arithmetic::Unit>
void multiply_few(const Unit* a, int a_stride, Factor b, int depth, float* c, int c_stride) {
    Floats sums[R][V] = {};
    if (CONTINUED) {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) sums[r][v] = load<Floats>(c + r * c_stride + v * LANES);
    }
    for (int u = 0; u < depth; u++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 16
            for (int v = 0; v < V; v++)
                sums[r][v] = Arithmetic::add_product(sums[r][v], a[r * a_stride + u], b.at(u, v));
    // Written out, these keep the sums in registers; as loops they had the compiler put all of them into memory first.
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) store(c + r * c_stride + v * LANES, sums[r][v]);
}

template <class Arithmetic, int V, bool CONTINUED = false, class Factor, class Unit = typename Arithmetic::Unit>
void multiply_rows(const Unit* a, int rows, int a_stride, Factor b, int depth, float* c, int c_stride) {
    for (; rows >= ROWS; rows -= ROWS, a += ROWS * a_stride, c += ROWS * c_stride)
        multiply_few<Arithmetic, ROWS, V, CONTINUED>(a, a_stride, b, depth, c, c_stride);
    switch (rows) {
        case 5: return multiply_few<Arithmetic, 5, V, CONTINUED>(a, a_stride, b, depth, c, c_stride);
        case 4: return multiply_few<Arithmetic, 4, V, CONTINUED>(a, a_stride, b, depth, c, c_stride);
        case 3: return multiply_few<Arithmetic, 3, V, CONTINUED>(a, a_stride, b, depth, c, c_stride);
        case 2: return multiply_few<Arithmetic, 2, V, CONTINUED>(a, a_stride, b, depth, c, c_stride);
        case 1: return multiply_few<Arithmetic, 1, V, CONTINUED>(a, a_stride, b, depth, c, c_stride);
    }
}

// The same for MOST rows at most and P panels of columns, whose sums are side by side.
template <class Arithmetic, int P, int MOST, class Factor, class Unit = typename Arithmetic::Unit>
void multiply_panels(const Unit* a, int rows, int a_stride, Factor b, int depth, float* c) {
    if constexpr (MOST > 1)
        if (rows < MOST) return multiply_panels<Arithmetic, P, MOST - 1>(a, rows, a_stride, b, depth, c);
    multiply_few<Arithmetic, MOST, P * VECTORS>(a, a_stride, b, depth, c, P * COLUMNS);
}

// The same for any number of columns, a multiple of LANES.
template <class Arithmetic, class Factor, class Unit = typename Arithmetic::Unit>
void multiply(const Unit* a, int rows, int a_stride, Factor b, int columns, int depth, float* c, int c_stride) {
    for (int column = 0; column < columns; column += COLUMNS, c += COLUMNS) {
        const Factor these = b.from(column);
        switch (std::min(columns - column, COLUMNS) / LANES) {
            case 4: multiply_rows<Arithmetic, 4>(a, rows, a_stride, these, depth, c, c_stride); break;
            case 3: multiply_rows<Arithmetic, 3>(a, rows, a_stride, these, depth, c, c_stride); break;
            case 2: multiply_rows<Arithmetic, 2>(a, rows, a_stride, these, depth, c, c_stride); break;
            case 1: multiply_rows<Arithmetic, 1>(a, rows, a_stride, these, depth, c, c_stride); break;
        }
    }
}

// 2^x for x <= 0, any finite one, by the polynomials of degree 3 and 5 that are best on [-1/2, 1/2] among those that are
// 1 at 0: off by 1e-4, which is little beside bf16's rounding, and by 1e-7.
template <int DEGREE = 5>
inline Floats exp2_of(Floats x) {
#if defined(__AVX512F__)
    const Floats whole = (Floats)_mm512_roundscale_ps((__m512)x, 0);
#else
    const Floats round = splat(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded to whole numbers
    const Floats shifted = x + round, whole = shifted - round;
#endif
    const Floats r = x - whole;
    static_assert(DEGREE == 3 || DEGREE == 5);
    constexpr float THREE[] = {5.5008827541281141e-2f, 2.4221099191424464e-1f, 6.9328294760477915e-1f, 1.0f};
    constexpr float FIVE[] = {1.3264694716781378e-3f, 9.6715148538351059e-3f, 5.5507339537143707e-2f,
                              2.4022242426872253e-1f, 6.9314700365066528e-1f, 1.0f};
    const float* coefficients = DEGREE == 3 ? THREE : FIVE;
    Floats p = splat(coefficients[0]);
    for (int i = 1; i <= DEGREE; i++) p = multiply_add(p, r, splat(coefficients[i]));
#if defined(__AVX512F__)
    return (Floats)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
    const Ints exponent = ((Ints)shifted - (Ints)round) << 23;
    return x > splat(-126.0f) ? (Floats)((Ints)p + exponent) : Floats{};
#endif
}

inline float exp2_of(float x) { return exp2_of(splat(x))[0]; }

// x / (1 + e^-t)
inline Floats times_sigmoid(Floats x, Floats t) {
    const Floats e = exp2_of((t > Floats{} ? -t : t) * LOG2_E);  // e^-|t|
    return x * (t > Floats{} ? splat(1.0f) : e) / (1.0f + e);
}

}  // namespace emberkv
