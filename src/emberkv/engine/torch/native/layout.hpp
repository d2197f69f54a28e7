// How a block holds one layer's keys and values: as products take them, so that most are multiplied where they lie.
//
// Of each KV head, a block of keys is [dim / PAIR, block_size, PAIR] and one of values [block_size / PAIR, dim, PAIR].
// A PAIR is what 4 bytes hold, 2 values in bf16 and 1 in fp32: a unit where these are multiplied as such.
//
// In bf16, with k[t][d] the d-th value of token t's key, and v likewise:
//
//   keys:    k[0][0..1] k[1][0..1] .. k[block_size-1][0..1] | k[0][2..3] k[1][2..3] .. | ..    token by token a row
//   values:  v[0..1][0] v[0..1][1] .. v[0..1][dim-1]        | v[2..3][0] v[2..3][1] .. | ..    dim by dim a row

#pragma once

#include <numeric>

#include "calls.hpp"
#include "vectors.hpp"

namespace emberkv {

// Values as they are computed, put into units.
inline void widen(const void* from, Type type, int count, float* to) {
    if (type == FP32) {
        copy(to, from, size_t(count) * 4);
    } else {
        for (int i = 0; i < count; i++) to[i] = widened(static_cast<const uint16_t*>(from)[i]);
    }
}

inline void widen(const void* from, Type, int count, uint32_t* to) { copy(to, from, size_t(count) * 2); }

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

struct BlockLayout {
    static constexpr bool SCALED = false;  // whether integers and scales are held instead of values

    // Neighbouring keys of one head and their values, where they lie in a block.
    struct Piece {
        const char *keys, *values;
    };

    int dim, block_size, pair;  // pair: 2 in bf16, for which dim and block_size are even; or 1
    int64_t head_bytes;         // from one head's keys, or values, to the next one's
    int64_t value_bytes;        // from keys to values
    int piece;                  // keys that lie together, and are of one vector

    explicit BlockLayout(const AttentionCall& call)
        : dim(call.dim),
          block_size(call.block_size),
          pair(call.type == FP32 ? 1 : 2),
          head_bytes(int64_t(dim) * block_size * (call.type == FP32 ? 4 : 2)),
          value_bytes(call.value_bytes),
          piece(std::gcd(LANES, block_size)) {}

    int units() const { return dim / pair; }

    // block: of keys, at its first head's. offset: of a token; for a piece, of its first one.
    Piece piece_at(const char* block, int head, int offset) const {
        const char* keys = block + head * head_bytes;
        return {keys + offset * 4, keys + value_bytes + offset / pair * dim * 4};
    }

    void store(char* block, int head, int offset, const char* key, const char* value) const {
        char* keys = block + head * head_bytes + offset * 4;
        for (int u = 0; u < units(); u++) std::memcpy(keys + u * block_size * 4, key + u * 4, 4);
        char* values = block + value_bytes + head * head_bytes + offset / pair * dim * 4;
        if (pair == 1) return copy(values, value, size_t(dim) * 4);
        uint16_t* pairs = reinterpret_cast<uint16_t*>(values) + offset % 2;
        for (int d = 0; d < dim; d++) std::memcpy(pairs + 2 * d, value + 2 * d, 2);
    }

    // Has the cache load a piece while others are computed: blocks lie apart, and no processor foresees where.
    void prefetch(const Piece& from) const {
        for (int u = 0; u < units(); u++) __builtin_prefetch(from.keys + u * block_size * 4, 0, 2);
        for (int byte = 0; byte < piece / pair * dim * 4; byte += 64) __builtin_prefetch(from.values + byte, 0, 2);
    }

    // The first ``count`` keys of a piece and their values in units, one of keys below another stride apart, one of
    // values dims apart. What lies beyond is left alone, but for the other half of a value's unit, which is zero.
    void copy_piece(const Piece& from, int count, uint32_t* keys, int stride, uint32_t* values, int dims) const {
        for (int u = 0; u < units(); u++) copy(keys + u * stride, from.keys + u * block_size * 4, size_t(count) * 4);
        for (int t = 0; t < count; t += 2, values += dims) {
            copy(values, from.values + t * dim * 2, size_t(dim) * 4);
            if (t + 1 < count) continue;
            for (int d = 0; d < dim; d++) values[d] &= 0xffff;
        }
    }

    void copy_piece(const Piece& from, int count, float* keys, int stride, float* values, int dims) const {
        for (int u = 0; u < units(); u++) {
            auto units = reinterpret_cast<const uint32_t*>(from.keys + u * block_size * 4);
            float* to = keys + u * pair * stride;
            if (pair == 1) {
                copy(to, units, size_t(count) * 4);
            } else {
                for (int t = 0; t < count; t++) {
                    to[t] = as_float(units[t] << 16);
                    to[stride + t] = as_float(units[t] & 0xffff0000);
                }
            }
        }
        for (int t = 0; t < count; t++, values += dims) {
            auto units = reinterpret_cast<const uint32_t*>(from.values) + t / pair * dim;
            if (pair == 1) copy(values, units, size_t(dim) * 4);
            else for (int d = 0; d < dim; d++) values[d] = as_float(t % 2 ? units[d] & 0xffff0000 : units[d] << 16);
        }
    }
};

}  // namespace emberkv
