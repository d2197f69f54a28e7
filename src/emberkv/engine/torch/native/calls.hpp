// What the kernels are called with, shared with kernels.py field by field.
//
// The paged KV pool: one contiguous run of bytes a block, and in it, layer by layer, all keys and then all values.
//
//              layer 0           layer 1
//   block 0  | keys  | values  | keys  | values  | ...
//   block 1  | keys  | values  | keys  | values  | ...
//              ^ block_bytes from the keys of one block to those of the next one, value_bytes from keys to values;
//                within them as in layout.hpp or layout_int8.hpp. Layers may differ in heads, and so in value_bytes.
//
// Block tables of all sequences of a pass, end to end; a row's position p is in block block_ids[start + p / block_size],
// at p % block_size, where start is block_tables[row].
//
//   block_ids     | 7 2 9 | 4 | 7 2 5 |      three sequences, two of which begin with the same blocks
//   block_tables    0 0 0   3   4            of five rows: three of the first sequence, and one of each other

#pragma once

#include <cstdint>

extern "C" {

struct Task {           // rows of one sequence, or of several whose blocks are the same here
    int32_t first_row;  // in row_ids
    int32_t rows;
    int32_t block_table; // where it begins in block_ids
    int32_t first_span;
    int32_t last_span;   // not included
    int32_t stop;        // keys from here on belong to no row of it
    int32_t whole;       // its rows see nothing outside these spans, and it writes their output
};

struct AttentionCall {
    const void *queries, *keys, *values;  // strides are in elements, and 1 within a head
    void* out;                            // [rows, heads, dim]
    int64_t query_row, query_head, key_row, key_head, value_row, value_head;
    char* pool;  // this layer's keys in block 0
    int64_t block_bytes, value_bytes;
    int32_t rows, heads, kv_heads, dim, block_size, type;
    int32_t quantised;     // whether the pool holds integers of 8 bits, as in layout_int8.hpp
    const float* sinks;    // per head: a score without a value that the softmax counts too; null: none
    const float* slopes;   // per head, of ALiBi: what a score loses for each token between query and key; null: none
    float scale, softcap;  // softcap 0: none
    int32_t window;        // a row sees so many of the latest keys; 0: no such limit
    int32_t chunk;         // a row sees the keys of its own chunk of so many positions; 0: no such limit
    int32_t threads;
    const int64_t* block_ids;
    const int32_t* block_tables;  // per row: where its block table begins in block_ids
    const int32_t* positions;     // per row
    const Task* tasks;
    int64_t num_tasks;
    const int32_t* row_ids;
    const int64_t* partial_of;  // per row: the index of its first span's partial result, or -1
    float* partials;            // [partials, heads, round_up(dim, LANES) + LANES]
};

// Packed weights: COLUMNS outputs side by side, and one unit of the inputs after the other. A unit is what 4 bytes hold.
//
//   group 0: outputs 0 .. COLUMNS-1        group 1: the next COLUMNS outputs
//   | unit 0 of the inputs: COLUMNS units | unit 1: COLUMNS units | ...
//
// Where a gate multiplies, each group has the gate's weights and, behind them, those of the layer that it gates.
struct LinearCall {
    const void* inputs;   // [rows, in], rows input_row elements apart
    const void* weight;   // [groups, units of in, COLUMNS]; gated: [groups, 2, units of in, COLUMNS], the gate's first
    const float* bias;    // [groups * COLUMNS], or null; gated: [groups, 2, COLUMNS], the gate's first
    void* out;            // [rows, out]
    int64_t input_row;
    int32_t rows, in, out_features, type, activation, threads;  // activation: as in linear.cpp
    int32_t bits, group, offsets;  // of quantised weights, packed as in quantized.hpp; bits is 0 for plain ones
    float slope, limit;  // of the activation CLAMPED_SWIGLU
};

// A mixture of experts: each row goes through its own few of them, whose outputs are added up by its weights.
struct ExpertsCall {
    const void* inputs;          // [rows, size], rows input_row elements apart
    const int64_t* chosen;       // [rows, top_k]: experts; one that is not there adds nothing
    const float* weights;        // [rows, top_k]
    void* out;                   // [rows, size]
    LinearCall *first, *second;  // [experts]: to the inner size, gated, and back; rows and addresses are filled in
    int64_t input_row;
    int32_t rows, top_k, experts, size, inner, type, threads;
};

struct NormCall {
    const void* inputs;  // [rows, size], rows input_row elements apart
    const float* scale;  // [size]
    void* out;           // [rows, size]
    int64_t input_row;
    int32_t rows, size, type, threads;
    float epsilon;
};

// A layer of a decoder: attention, then a gated pair with a product behind it. Of the calls within, weights, biases,
// sizes and activations are set here, and a norm without a scale is left out. The rest is set for each pass.
struct DecoderLayer {
    NormCall input_norm, query_norm, key_norm, after_attention, feedforward_norm, after_feedforward;
    LinearCall query, key, value, out, gate_up, down;
    const void *cos, *sin;  // [positions, rotary_dim], in the type of the activations
    char* pool;             // this layer's keys in block 0
    float scale, softcap;
    int32_t rotary_dim;     // leading values of a head that its position rotates
    int32_t fused;          // the query's product gives queries, keys and values
    int32_t plan;           // which of the pass's plans its attention follows
};

// A pass of some rows through all layers. ``plans`` are attention calls without a layer's own fields.
struct DecoderCall {
    const DecoderLayer* layers;
    const AttentionCall* plans;
    NormCall norm;
    LinearCall output;
    void* hidden;         // [rows, hidden_size]: embedded tokens; overwritten
    void* scratch;        // see decoder.py
    void* logits;         // [num_kept, outputs]
    const int32_t* kept;  // rows whose logits are wanted, ascending
    int32_t num_layers, rows, num_kept, hidden_size, intermediate_size, heads, kv_heads, dim, type, threads;
};

struct StateRun {         // new tokens of one sequence
    int32_t first_row, count;
    int32_t start;        // the position of the first one
    int32_t block_table;  // where the sequence's begins in block_ids
};

// A layer with a linear recurrence, for all runs of a pass. A block holds its state behind the latest of its tokens.
struct RecurrenceCall {
    const void *mixed, *gate, *steps, *betas;  // [rows, channels], [rows, heads * width] and twice [rows, heads]
    int64_t mixed_row, gate_row, steps_row, betas_row;
    void* out;                                 // [rows, heads * width]
    const float *taps, *bias;                  // [columns + 1, channels]; [channels], or null
    const float *log_decay, *step_bias, *skip; // [heads]; no skip: null
    const float* scale;                        // of the norm, [heads * width]; null where norm_size is 0
    float *convolved, *decays, *results;       // scratch: [rows, channels], [rows, 2, heads], [rows, heads * width]
    char *convolved_states, *states;           // this layer's in block 0: [columns, channels]; fp32 [heads, depth, width]
    int64_t block_bytes;
    const int64_t* block_ids;
    const StateRun* runs;
    int32_t num_runs, block_size;
    int32_t rows, columns, channels, heads, key_heads, depth, width;
    int32_t queries_at, keys_at, values_at;    // where these begin among the channels
    int32_t delta;                             // whether it is a gated delta net's
    int32_t norm_size, gated_first;            // values that are normalised together, 0: none; after the gate or before
    int32_t type, threads;
    float least_step, most_step, beta_factor, epsilon;
};

// Groups of weights to be rounded to 4 bits.
struct FitCall {
    const float* values;      // [groups, size]
    uint8_t* codes;           // [groups, size / 2]: two codes of -8 to 7 in a byte, each as code + 8
    float *scales, *offsets;  // [groups]
    int64_t groups;
    int32_t size, threads;    // size: even, 128 at most
};

struct LikeliestCall {
    const void* logits;  // [rows, columns]
    int64_t* places;     // [rows]
    float* values;       // [rows]
    int32_t rows, columns, type, threads;
};

}  // extern "C"
