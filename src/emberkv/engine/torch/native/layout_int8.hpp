// How a block holds one layer's keys and values in 8 bits; attention/int8_kv.py reads and writes the same bytes.
//
// A value is an integer of -127 .. 127 times the scale of its token and KV head. Of each head, keys are [dim / 2,
// block_size, 2] and values [block_size / 2, dim, 2]: the pairs in which layout.hpp holds bf16, for either arithmetic.
// Behind all heads' integers are their scales, in bf16: [kv_heads, block_size].
//
// Integers of 8 bits are exact in bf16 and in fp32, so products take them as they are. A key's scale multiplies its
// scores, and a value's scale the weight that it gets.

#pragma once

#include <cmath>

#include "layout.hpp"

namespace emberkv {

// LANES neighbouring pairs of integers, in fp32: the first and the second ones.
struct FloatPairs {
    Floats first, second;

    // count: how many pairs there are; the others are zeros.
    FloatPairs(const char* from, int count) {
        typedef int16_t Shorts __attribute__((vector_size(LANES * 2)));
        Shorts both{};
        if (count >= LANES) both = load<Shorts>(from);
        else std::memcpy(&both, from, size_t(count) * 2);
        const Shorts low = (both << 8) >> 8, high = both >> 8;
        first = __builtin_convertvector(__builtin_convertvector(low, Ints), Floats);
        second = __builtin_convertvector(__builtin_convertvector(high, Ints), Floats);
    }

    Ints as_bf16() const {
        typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
        return (Ints)((Bits)first >> 16) | (Ints)second;
    }
};

template <class Vector, class Unit>
inline void store_some(Unit* to, Vector vector, int count) {
    if (count >= LANES) store(to, vector);
    else std::memcpy(to, &vector, size_t(count) * 4);
}

// ``count`` pairs as bf16.
inline void copy_pairs(const char* from, int count, uint32_t* to) {
    for (int i = 0; i < count; i += LANES)
        store_some(to + i, FloatPairs(from + i * 2, count - i).as_bf16(), count - i);
}

// ``count`` pairs as fp32, the first ones of all pairs apart from the second ones.
inline void copy_pairs(const char* from, int count, float* first, float* second) {
    for (int i = 0; i < count; i += LANES) {
        const FloatPairs pairs(from + i * 2, count - i);
        store_some(first + i, pairs.first, count - i);
        store_some(second + i, pairs.second, count - i);
    }
}

struct Int8Layout {
    static constexpr bool SCALED = true;
    static constexpr int pair = 0;  // products take none of it from where it lies

    struct Piece {
        const char *keys, *values, *key_scales, *value_scales;
    };

    int dim, block_size;
    Type type;                // of what is stored, before it is rounded
    int64_t head_bytes;       // from one head's keys, or values, to the next one's
    int64_t value_bytes;      // from keys to values
    int64_t scales;           // from the first head's keys to its scales, and likewise of values
    int piece;                // keys that lie together, and are of one vector

    explicit Int8Layout(const AttentionCall& call)
        : dim(call.dim),
          block_size(call.block_size),
          type(Type(call.type)),
          head_bytes(int64_t(dim) * block_size),
          value_bytes(call.value_bytes),
          scales(call.kv_heads * head_bytes),
          piece(std::gcd(LANES, block_size)) {}

    Piece piece_at(const char* block, int head, int offset) const {
        const char* keys = block + head * head_bytes;
        const char* scale = block + scales + (head * block_size + offset) * 2;
        return {keys + offset * 2, keys + value_bytes + offset / 2 * dim * 2, scale, scale + value_bytes};
    }

    void store(char* block, int head, int offset, const char* key, const char* value) const {
        char* keys = block + head * head_bytes + offset * 2;
        char* values = block + value_bytes + head * head_bytes + offset / 2 * dim * 2 + offset % 2;
        char* scale = block + scales + (head * block_size + offset) * 2;
        const uint16_t key_scale = scale_of(key), value_scale = scale_of(value);
        for (int d = 0; d < dim; d++) {
            keys[d / 2 * block_size * 2 + d % 2] = rounded(at(key, d), widened(key_scale));
            values[d * 2] = rounded(at(value, d), widened(value_scale));
        }
        std::memcpy(scale, &key_scale, 2);
        std::memcpy(scale + value_bytes, &value_scale, 2);
    }

    void prefetch(const Piece& from) const {
        const int rows_a_line = std::max(1, 32 / block_size);
        for (int u = 0; u < dim / 2; u += rows_a_line) __builtin_prefetch(from.keys + u * block_size * 2, 0, 2);
        for (int byte = 0; byte < piece * dim; byte += 64) __builtin_prefetch(from.values + byte, 0, 2);
        __builtin_prefetch(from.key_scales, 0, 2);
        __builtin_prefetch(from.value_scales, 0, 2);
    }

    // As BlockLayout's. Behind an odd number of keys, the other half of a value's unit is some integer.
    void copy_piece(const Piece& from, int count, uint32_t* keys, int stride, uint32_t* values, int dims) const {
        for (int u = 0; u < dim / 2; u++) copy_pairs(from.keys + u * block_size * 2, count, keys + u * stride);
        for (int t = 0; t < count; t += 2) copy_pairs(from.values + t * dim, dim, values + t / 2 * dims);
    }

    void copy_piece(const Piece& from, int count, float* keys, int stride, float* values, int dims) const {
        for (int u = 0; u < dim / 2; u++) {
            float* to = keys + 2 * u * stride;
            copy_pairs(from.keys + u * block_size * 2, count, to, to + stride);
        }
        for (int t = 0; t < count; t += 2) copy_pairs(from.values + t * dim, dim, values + t * dims, values + (t + 1) * dims);
    }

    void copy_scales(const Piece& from, int count, float* of_keys, float* of_values) const {
        auto keys = reinterpret_cast<const uint16_t*>(from.key_scales);
        auto values = reinterpret_cast<const uint16_t*>(from.value_scales);
        for (int t = 0; t < count; t++) {
            of_keys[t] = widened(keys[t]);
            of_values[t] = widened(values[t]);
        }
    }

private:
    float at(const char* values, int d) const {
        return type == FP32 ? reinterpret_cast<const float*>(values)[d]
                            : widened(reinterpret_cast<const uint16_t*>(values)[d]);
    }

    // A 127th of the largest value, rounded up to bf16; NaN where a value is not finite. Compared as integers, a NaN is
    // larger than any number.
    uint16_t scale_of(const char* values) const {
        uint32_t largest = 0;
        for (int d = 0; d < dim; d++) {
            const float value = at(values, d);
            uint32_t bits;
            std::memcpy(&bits, &value, 4);
            largest = std::max(largest, bits & 0x7fffffff);
        }
        if (largest >= 0x7f800000) return 0x7fc0;
        const float scale = as_float(largest) / 127.0f;
        std::memcpy(&largest, &scale, 4);
        return uint16_t((largest + 0xffff) >> 16);
    }

    static char rounded(float value, float scale) { return scale > 0 ? char(std::lrintf(value / scale)) : 0; }
};

}  // namespace emberkv
