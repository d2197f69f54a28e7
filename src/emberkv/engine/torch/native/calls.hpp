// What the kernels are called with, shared with kernels.py field by field.

#pragma once

#include <cstdint>

extern "C" {

struct Task {           // rows of one sequence, or of several whose slots are the same here
    int32_t first_row;  // in row_ids
    int32_t rows;
    int32_t table;       // where the slots begin
    int32_t first_span;
    int32_t last_span;   // not included
    int32_t stop;        // keys beyond are nobody's
    int32_t whole;       // its rows see nothing outside these spans, and it writes their output
};

struct AttentionCall {
    const void *queries, *keys, *values;  // strides are in elements, and 1 within a head
    void* out;                            // [rows, heads, dim]
    int64_t query_row, query_head, key_row, key_head, value_row, value_head;
    char* pool;  // this layer's keys in slot 0, as in layout.hpp
    int64_t slot_bytes, value_bytes;  // to the next slot's keys; to the same slot's values
    int32_t rows, heads, kv_heads, dim, block_size, type;
    float scale, softcap;  // softcap 0: none
    int32_t window;        // 0: none
    int32_t threads;
    const int64_t* slots;
    const int32_t* tables;     // per row: where its slots begin
    const int32_t* positions;  // per row
    const Task* tasks;
    int64_t num_tasks;
    const int32_t* row_ids;
    const int64_t* partial_of;  // per row: the index of its first span's partial result, or -1
    float* partials;            // [partials, heads, round_up(dim, LANES) + LANES]
};

struct LinearCall {
    const void* inputs;   // [rows, in], rows input_row elements apart
    const void* weight;   // [groups, units of in, COLUMNS]; gated: [groups, 2, units of in, COLUMNS], the gate's first
    const float* bias;    // [groups * COLUMNS], or null; never where gated
    void* out;            // [rows, out]
    int64_t input_row;
    int32_t rows, in, out_features, type, activation, threads;  // activation: as in linear.cpp
};

struct NormCall {
    const void* inputs;  // [rows, size], rows input_row elements apart
    const float* scale;  // [size]
    void* out;           // [rows, size]
    int64_t input_row;
    int32_t rows, size, type, threads;
    float epsilon;
};

}  // extern "C"
