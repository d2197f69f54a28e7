// See team.hpp.

#include "team.hpp"

#include <climits>
#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <system_error>
#include <unistd.h>

namespace emberkv {

constexpr int SPINS = 500;  // some 10 to 20 microseconds, about what it costs to sleep and be woken

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
}

inline void futex(std::atomic<int32_t>& word, int operation, int32_t value) {
    static_assert(sizeof word == sizeof value, "the kernel compares four bytes");
    syscall(SYS_futex, reinterpret_cast<int32_t*>(&word), operation, value, nullptr, nullptr, 0);
}

void WaitableCount::wait_while(int32_t value) {
    for (int i = 0; i < SPINS; i++, pause())
        if (value_.load() != value) return;
    sleepers_.fetch_add(1);
    while (value_.load() == value) futex(value_, FUTEX_WAIT_PRIVATE, value);
    sleepers_.fetch_sub(1);
}

void WaitableCount::wake(int32_t most) {
    if (sleepers_.load() > 0) futex(value_, FUTEX_WAKE_PRIVATE, most);
}

// A thread's team ends with it. In the child of a fork the workers are not there and cannot be joined: what is left of
// the parent's team stays in memory.
struct OwnTeam {
    Team* team = nullptr;
    int threads = 0;
    pid_t process = 0;

    ~OwnTeam() { drop(); }

    void drop() {
        if (process == getpid()) delete team;
        team = nullptr;
    }
};

Team& Team::of_this_thread(int threads) {
    thread_local Team alone(1);
    thread_local OwnTeam own;
    if (threads <= 1) return alone;
    if (!own.team || own.threads != threads || own.process != getpid()) {
        own.drop();
        own.team = new Team(threads);
        own.threads = threads;
        own.process = getpid();
    }
    return *own.team;
}

Team::Team(int threads) : threads_(threads), shares_(new Share[size_t(threads)]) {
    workers_.reserve(size_t(threads));
    try {
        for (int member = 1; member < threads; member++) workers_.emplace_back([this, member] { work(member); });
    } catch (const std::system_error&) {
        // The system gives no more threads. Those that are there take the others' chunks, too.
    }
}

Team::~Team() {
    stopping_ = true;
    turn_.fetch_add(1);
    turn_.wake(INT_MAX);
    for (std::thread& worker : workers_) worker.join();
}

void Team::run(const Stage& stage) {
    const int64_t chunks = stage.chunks();
    if (chunks <= 1 || threads_ == 1) {
        if (stage.units > 0) stage.call(stage.body, 0, stage.units);
        return;
    }
    stage_ = stage;
    pending_.store(int32_t(chunks));
    for (int share = 0; share < threads_; share++)
        shares_[share].left.store(end_of(share) - (share ? end_of(share - 1) : 0));
    turn_.fetch_add(1);
    turn_.wake(int32_t(chunks - 1));
    take_chunks(0);
    while (const int32_t pending = pending_.load()) pending_.wait_while(pending);
}

void Team::work(int member) {
    pthread_setname_np(pthread_self(), "emberkv-kernels");
    for (int32_t turn = 0;;) {
        turn_.wait_while(turn);
        turn = turn_.load();
        if (stopping_) return;
        take_chunks(member);
    }
}

void Team::take_chunks(int member) {
    for (int i = 0; i < threads_; i++) {
        const int share = (member + i) % threads_;
        std::atomic<int32_t>& left = shares_[share].left;
        int32_t done = 0;
        for (int32_t before; left.load() > 0 && (before = left.fetch_sub(1)) > 0; done++) {
            const int64_t begin = (end_of(share) - before) * stage_.grain;
            stage_.call(stage_.body, begin, std::min(begin + stage_.grain, stage_.units));
        }
        if (done > 0 && pending_.fetch_add(-done) == done) pending_.wake(1);
    }
}

}  // namespace emberkv
