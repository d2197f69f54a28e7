// A mixture of experts on CPU: the rows that chose an expert go through it together.
//
// A row's outputs are added up in the order of its own choices, so that its bits do not depend on what others choose.

#include <memory>

#include "team.hpp"
#include "vectors.hpp"

namespace emberkv {

// Where the rows of a call lie, grouped by expert: choice ``c`` of row ``r`` is at places[r * top_k + c].
class Dispatch {
public:
    explicit Dispatch(const ExpertsCall& call)
        : call_(call),
          element_(call.type == FP32 ? 4 : 2),
          pairs_(int64_t(call.rows) * call.top_k),
          places_(new int64_t[size_t(pairs_)]),
          active_(new LinearCall[size_t(call.experts) * 2]),
          memory_(new char[size_t(pairs_) * size_t(2 * call.size + call.inner) * size_t(element_)]) {
        std::unique_ptr<int64_t[]> next(new int64_t[size_t(call.experts) + 1]());
        for (int64_t pair = 0; pair < pairs_; pair++)
            if (is_there(call.chosen[pair])) next[call.chosen[pair] + 1]++;
        for (int expert = 0; expert < call.experts; expert++) {
            const int count = int(next[expert + 1]);
            if (count) add(expert, next[expert], count);
            next[expert + 1] += next[expert];
        }
        for (int64_t pair = 0; pair < pairs_; pair++)
            places_[pair] = is_there(call.chosen[pair]) ? next[call.chosen[pair]]++ : -1;
    }

    void run(Team& team) const {
        team.share(pairs_, grain_of(call_.size), [&](int64_t begin, int64_t end) {
            for (int64_t pair = begin; pair < end; pair++) gather(pair);
        });
        linear_by_team(team, active_.get(), count_);
        linear_by_team(team, active_.get() + call_.experts, count_);
        team.share(call_.rows, grain_of(int64_t(call_.size) * call_.top_k), [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; row++) add_up(int(row));
        });
    }

private:
    bool is_there(int64_t expert) const { return expert >= 0 && expert < call_.experts; }
    int64_t row_bytes() const { return int64_t(call_.size) * element_; }
    char* gathered() const { return memory_.get(); }
    char* results() const { return memory_.get() + pairs_ * row_bytes(); }
    char* between() const { return results() + pairs_ * row_bytes(); }

    void add(int expert, int64_t place, int rows) {
        LinearCall &first = active_[count_] = call_.first[expert];
        LinearCall &second = active_[call_.experts + count_] = call_.second[expert];
        count_++;
        char* inner = between() + place * call_.inner * element_;
        first.inputs = gathered() + place * row_bytes();
        first.out = inner;
        first.input_row = call_.size;
        second.inputs = inner;
        second.out = results() + place * row_bytes();
        second.input_row = call_.inner;
        first.rows = second.rows = rows;
        first.type = second.type = call_.type;
    }

    void gather(int64_t pair) const {
        if (places_[pair] < 0) return;
        const char* from = static_cast<const char*>(call_.inputs) + pair / call_.top_k * call_.input_row * element_;
        std::memcpy(gathered() + places_[pair] * row_bytes(), from, size_t(row_bytes()));
    }

    void add_up(int row) const {
        char* out = static_cast<char*>(call_.out) + row * row_bytes();
        for (int i = 0; i < call_.size; i += LANES) {
            const int count = std::min(LANES, call_.size - i);
            float sums[LANES] = {};
            for (int choice = 0; choice < call_.top_k; choice++) {
                const int64_t pair = int64_t(row) * call_.top_k + choice;
                if (places_[pair] < 0) continue;
                const char* from = results() + places_[pair] * row_bytes() + i * element_;
                for (int k = 0; k < count; k++) sums[k] += call_.weights[pair] * value_at(from, k);
            }
            narrow(sums, Type(call_.type), count, out + i * element_);
        }
    }

    float value_at(const char* from, int k) const {
        if (call_.type == BF16) return widened(reinterpret_cast<const uint16_t*>(from)[k]);
        return reinterpret_cast<const float*>(from)[k];
    }

    const ExpertsCall& call_;
    const int element_;
    const int64_t pairs_;
    int count_ = 0;  // experts that a row has chosen
    std::unique_ptr<int64_t[]> places_;
    std::unique_ptr<LinearCall[]> active_;  // of these, the layers to the inner size; from [experts] on those back
    std::unique_ptr<char[]> memory_;
};

}  // namespace emberkv

EMBERKV_EXPORT void emberkv_experts(const ExpertsCall* call) {
    emberkv::Dispatch(*call).run(emberkv::Team::of_this_thread(call->threads));
}
