// The threads of a call, and how they share its work.
//
// A call is a sequence of stages. In each, the calling thread, the leader, has some units of work done that do not
// depend on one another, in chunks. Each thread begins with chunks of its own, the same ones in every call because its
// core's cache may still hold their weights, and goes on with those of the others. The stage ends when the chunks are
// done, and not when the threads have arrived: a thread that the system does not schedule for a while delays nothing,
// unless it stopped within a chunk. Which thread computes a chunk changes no bit of it.
//
// How a stage is published. `Stage` and `pending_` are written first, then each share's `left`, and then `turn_`.
//   - A chunk is taken by counting `left` down from above zero. A thread takes a chunk before it reads the stage, and a
//     stage cannot end before that chunk is counted in `pending_`. So a thread reads the stage that its chunk belongs
//     to, however late the thread is, and the leader does not overwrite the stage meanwhile.
//   - A late thread may count an empty share down below zero. The next stage overwrites that.
//   - The leader returns when `pending_` is zero; from then on no thread reads anything of the call.
//
// Waiting threads look again and again for some microseconds and then sleep, so that threads which have nothing to do
// do not keep other programs, or a thread of their own team, from running.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "calls.hpp"

namespace emberkv {

// Memory of a thread, kept from call to call: it only grows. Aligned for vectors.
struct Memory {
    std::unique_ptr<char[]> bytes;
    int64_t size = 0;

    char* take(int64_t needed) {
        if (needed > size) {
            bytes.reset(new char[size_t(needed) + 64]);
            size = needed;
        }
        return begin();
    }

    char* begin() const { return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(bytes.get()) + 63) / 64 * 64); }
};

// A number that threads can wait on.
class WaitableCount {
public:
    int32_t load() const { return value_.load(); }
    void store(int32_t value) { value_.store(value); }
    int32_t fetch_add(int32_t more) { return value_.fetch_add(more); }

    // Returns once the value is another one.
    void wait_while(int32_t value);

    // To be called behind a change. As all of this is sequentially consistent, either this sees the thread that is about
    // to sleep, or that thread sees the change.
    void wake(int32_t most);

private:
    std::atomic<int32_t> value_{0}, sleepers_{0};
};

// One leader's own threads, which live as long as it does.
class Team {
public:
    // The calling thread's own team of so many threads, itself among them. In the child of a fork it is a new one.
    static Team& of_this_thread(int threads);

    explicit Team(int threads);
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int threads() const { return threads_; }

    // Calls body(begin, end) for chunks that together are [0, units), and returns when all of them are done. grain:
    // units of a chunk; it should take some microseconds.
    template <class Body>
    void share(int64_t units, int64_t grain, const Body& body) {
        const auto call = [](const void* given, int64_t begin, int64_t end) {
            (*static_cast<const Body*>(given))(begin, end);
        };
        run({units, grain, call, &body});
    }

private:
    struct Stage {
        int64_t units, grain;
        void (*call)(const void* body, int64_t begin, int64_t end);
        const void* body;

        int64_t chunks() const { return (units + grain - 1) / grain; }
    };

    struct alignas(64) Share {
        std::atomic<int32_t> left{0};  // chunks
    };

    void run(const Stage& stage);
    void work(int member);
    void take_chunks(int member);
    int32_t end_of(int share) const { return int32_t(stage_.chunks() * (share + 1) / threads_); }

    const int threads_;
    Stage stage_{};
    WaitableCount turn_, pending_;  // the number of the stage; its chunks that are not done
    std::atomic<bool> stopping_{false};
    std::unique_ptr<Share[]> shares_;
    std::vector<std::thread> workers_;
};

// Units of a chunk, where each is elementwise work on so many values.
inline int64_t grain_of(int64_t values) { return std::max<int64_t>(1, 8192 / std::max<int64_t>(1, values)); }

// The kernels as stages of one call, so that a decode step wakes its threads once. `threads` of these calls is not
// looked at.

// Several layers, of which none needs another's output.
void linear_by_team(Team& team, const LinearCall* calls, int count);

void rms_norm_by_team(Team& team, const NormCall& call);

// One row, by the thread that calls it. Inputs and output may be the same.
void rms_norm_row(const NormCall& call, int row);

void attend_by_team(Team& team, const AttentionCall& call);

}  // namespace emberkv
