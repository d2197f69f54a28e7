// Keys and values as products take them: keys transposed, values of two keys side by side where bf16 is multiplied.

#pragma once

#include "vectors.hpp"

namespace emberkv {

// LANES rows of units to columns COLUMNS apart. units: a multiple of LANES.
template <class Unit>
void transpose(const char* const* rows, int units, Unit* to) {
    static_assert(sizeof(Unit) == 4);
#if defined(__AVX512F__)
    for (int first = 0; first < units; first += LANES) {
        __m512i a[16], b[16];
        for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(rows[i] + first * 4);
        for (int i = 0; i < 16; i += 2) {
            b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
            b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
        }
        for (int i = 0; i < 16; i += 4)
            for (int j = 0; j < 2; j++) {
                a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
                a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
            }
        for (int i = 0; i < 8; i += 4)
            for (int j = 0; j < 4; j++) {
                b[2 * i + j] = _mm512_shuffle_i32x4(a[2 * i + j], a[2 * i + j + 4], 0x88);
                b[2 * i + j + 4] = _mm512_shuffle_i32x4(a[2 * i + j], a[2 * i + j + 4], 0xdd);
            }
        for (int j = 0; j < 8; j++) {
            const int u = first + j;
            _mm512_storeu_si512(to + u * COLUMNS, _mm512_shuffle_i32x4(b[j], b[j + 8], 0x88));
            _mm512_storeu_si512(to + (u + 8) * COLUMNS, _mm512_shuffle_i32x4(b[j], b[j + 8], 0xdd));
        }
    }
#else
    for (int u = 0; u < units; u++)
        for (int lane = 0; lane < LANES; lane++) std::memcpy(to + u * COLUMNS + lane, rows[lane] + u * 4, 4);
#endif
}

// Values as they are stored, put into units; one half of a pair beyond the end is zero.
inline void widen(const void* from, Type type, int count, float* to) {
    if (type == FP32) {
        copy(to, from, size_t(count) * 4);
    } else {
        for (int i = 0; i < count; i++) to[i] = widened(static_cast<const uint16_t*>(from)[i]);
    }
}

inline void widen(const void* from, Type, int count, uint32_t* to) { copy(to, from, size_t(count) * 2); }

// Two keys' values side by side, as products over keys take them.
inline void interleave(const void* even, const void* odd, int count, uint32_t* to) {
    auto a = static_cast<const uint16_t*>(even), b = static_cast<const uint16_t*>(odd);
    int i = 0;
#if defined(__AVX512BW__)
    const __m512i side_by_side = _mm512_set_epi64(
        0x002f000f002e000e, 0x002d000d002c000c, 0x002b000b002a000a, 0x0029000900280008,
        0x0027000700260006, 0x0025000500240004, 0x0023000300220002, 0x0021000100200000
    );
    const __m512i half = _mm512_set1_epi16(16);
    for (; b && i + 32 <= count; i += 32) {
        const __m512i first = _mm512_loadu_si512(a + i), second = _mm512_loadu_si512(b + i);
        _mm512_storeu_si512(to + i, _mm512_permutex2var_epi16(first, side_by_side, second));
        _mm512_storeu_si512(
            to + i + 16, _mm512_permutex2var_epi16(first, _mm512_add_epi16(side_by_side, half), second)
        );
    }
#endif
    for (; i < count; i++) to[i] = uint32_t(a[i]) | (b ? uint32_t(b[i]) << 16 : 0);
}

}  // namespace emberkv
