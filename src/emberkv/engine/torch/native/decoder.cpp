// A whole pass through a decoder of Llama's shape, in one call: every layer, the last norm, the output layer.
//
// Each operation rounds where PyTorch rounds in the model's own code, so that both give the same bits, and no row's
// result depends on another row.

#include "calls.hpp"
#include "layout.hpp"
#include "team.hpp"

namespace emberkv {

struct SinglePrecisionValue {
    using Stored = float;
    static float read(float value) { return value; }
    static float write(float value) { return value; }
};

struct Bf16Value {
    using Stored = uint16_t;
    static float read(uint16_t value) { return widened(value); }
    static uint16_t write(float value) { return to_bf16(value); }
};

// The stages of a pass, which its leader publishes to the team one after the other.
template <class Value>
class Pass {
    using Stored = typename Value::Stored;

public:
    Pass(Team& team, const DecoderCall& call)
        : team_(team),
          call_(call),
          rows_(call.rows),
          query_size_(call.heads * call.dim),
          key_size_(call.kv_heads * call.dim),
          hidden_(static_cast<Stored*>(call.hidden)) {
        Stored* next = static_cast<Stored*>(call.scratch);
        auto take = [&](int width) {
            Stored* begin = next;
            next += (int64_t(call.rows) * width + 31) / 32 * 32;
            return begin;
        };
        normed_ = take(call.hidden_size);
        update_ = take(call.hidden_size);
        projected_ = take(query_size_ + 2 * key_size_);
        attended_ = take(query_size_);
        gated_ = take(call.intermediate_size);
    }

    void run() {
        rms_norm_by_team(team_, norm_of(call_.layers[0].input_norm, hidden_, normed_, rows_));
        for (int i = 0; i < call_.num_layers; i++) {
            const DecoderLayer& layer = call_.layers[i];
            const bool last = i + 1 == call_.num_layers;
            attention(layer);
            if (last && call_.num_kept < rows_) keep_wanted();
            if (rows_ == 0) return;
            multiply(layer.out, attended_, update_);
            add_update(layer.after_attention, layer.feedforward_norm);
            multiply(layer.gate_up, normed_, gated_);
            multiply(layer.down, gated_, update_);
            add_update(layer.after_feedforward, last ? call_.norm : call_.layers[i + 1].input_norm);
        }
        multiply(call_.output, normed_, static_cast<Stored*>(call_.logits));
    }

private:
    LinearCall linear_of(LinearCall call, const Stored* inputs, Stored* out) const {
        call.inputs = inputs;
        call.out = out;
        call.input_row = call.in;
        call.rows = rows_;
        call.type = call_.type;
        return call;
    }

    void multiply(const LinearCall& layer, const Stored* inputs, Stored* out) const {
        const LinearCall call = linear_of(layer, inputs, out);
        linear_by_team(team_, &call, 1);
    }

    NormCall norm_of(NormCall call, const Stored* inputs, Stored* out, int rows) const {
        call.inputs = inputs;
        call.out = out;
        call.input_row = call.size;
        call.rows = rows;
        call.type = call_.type;
        return call;
    }

    void attention(const DecoderLayer& layer) {
        Stored* key = projected_ + (layer.fused ? query_size_ : int64_t(rows_) * query_size_);
        Stored* value = key + (layer.fused ? key_size_ : int64_t(rows_) * key_size_);
        const int width = query_size_ + 2 * key_size_;
        const int query_row = layer.fused ? width : query_size_, key_row = layer.fused ? width : key_size_;
        const LinearCall products[] = {
            linear_of(layer.query, normed_, projected_),
            linear_of(layer.key, normed_, key),
            linear_of(layer.value, normed_, value),
        };
        linear_by_team(team_, products, layer.fused ? 1 : 3);
        const int heads = call_.heads + call_.kv_heads;
        team_.share(int64_t(rows_) * heads, grain_of(2 * call_.dim), [&](int64_t begin, int64_t end) {
            for (int64_t unit = begin; unit < end; unit++) {
                const int64_t row = unit / heads;
                const int head = int(unit % heads), key_head = head - call_.heads;
                if (key_head < 0) place(layer, layer.query_norm, row, projected_ + row * query_row + head * call_.dim);
                else place(layer, layer.key_norm, row, key + row * key_row + key_head * call_.dim);
            }
        });
        AttentionCall call = call_.plans[layer.plan];
        call.queries = projected_;
        call.keys = key;
        call.values = value;
        call.out = attended_;
        call.query_row = query_row;
        call.key_row = call.value_row = key_row;
        call.query_head = call.key_head = call.value_head = call_.dim;
        call.type = call_.type;
        call.pool = layer.pool;
        call.scale = layer.scale;
        call.softcap = layer.softcap;
        attend_by_team(team_, call);
    }

    // One head of one row, normalized and rotated by its position, in its place.
    void place(const DecoderLayer& layer, const NormCall& norm, int64_t row, Stored* head) const {
        if (norm.scale) rms_norm_row(norm_of(norm, head, head, 1), 0);
        const int half = layer.rotary_dim / 2;
        const int64_t first = call_.plans[layer.plan].positions[row] * int64_t(layer.rotary_dim);
        const Stored *cos = static_cast<const Stored*>(layer.cos) + first;
        const Stored *sin = static_cast<const Stored*>(layer.sin) + first;
        for (int i = 0; i < half; i++) {
            const float a = Value::read(head[i]), b = Value::read(head[half + i]);
            head[i] = rotated(a, cos[i], -b, sin[i]);
            head[half + i] = rotated(b, cos[half + i], a, sin[half + i]);
        }
    }

    // As PyTorch rounds it: both products, and then their sum.
    static Stored rotated(float a, Stored cos, float b, Stored sin) {
        const Stored first = Value::write(a * Value::read(cos)), second = Value::write(b * Value::read(sin));
        return Value::write(Value::read(first) + Value::read(second));
    }

    // The wanted rows, ascending, move to the front; nothing is computed for the others any more.
    void keep_wanted() {
        for (int i = 0; i < call_.num_kept; i++) {
            const int64_t row = call_.kept[i];
            std::memmove(attended_ + int64_t(i) * query_size_, attended_ + row * query_size_, query_size_ * sizeof(Stored));
            std::memmove(
                hidden_ + int64_t(i) * call_.hidden_size, hidden_ + row * call_.hidden_size,
                call_.hidden_size * sizeof(Stored)
            );
        }
        rows_ = call_.num_kept;
    }

    // hidden += update, normalized before where a layer does that; and what the next product takes of it.
    void add_update(const NormCall& before, const NormCall& after) const {
        team_.share(rows_, grain_of(2 * call_.hidden_size), [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; row++) {
                const int64_t first = row * call_.hidden_size;
                Stored *update = update_ + first, *hidden = hidden_ + first;
                if (before.scale) rms_norm_row(norm_of(before, update, update, 1), 0);
                for (int i = 0; i < call_.hidden_size; i++)
                    hidden[i] = Value::write(Value::read(hidden[i]) + Value::read(update[i]));
                rms_norm_row(norm_of(after, hidden, normed_ + first, 1), 0);
            }
        });
    }

    Team& team_;
    const DecoderCall& call_;
    int rows_;  // those that are still computed
    const int query_size_, key_size_;
    Stored *hidden_, *normed_, *update_, *projected_, *attended_, *gated_;
};

}  // namespace emberkv

EMBERKV_EXPORT void emberkv_decoder(const DecoderCall* call) {
    emberkv::Team& team = emberkv::Team::of_this_thread(call->threads);
    if (call->type == emberkv::BF16) emberkv::Pass<emberkv::Bf16Value>(team, *call).run();
    else emberkv::Pass<emberkv::SinglePrecisionValue>(team, *call).run();
}
