#include "thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64) || defined(__i386__)
#include <immintrin.h>
#endif
#ifdef __linux__
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace goslet {
namespace {

constexpr std::size_t kMaxThreads = 1024;
// Two lines of 64 bytes: processors fetch them in pairs, and some have lines of 128.
constexpr std::size_t kCacheLine = 128;
// How long a member spins before it sleeps. In quiet times, for what it takes to start a core that idled, in a virtual
// machine too: less would sleep through many waits.
constexpr std::chrono::nanoseconds kLongestSpin{1'000'000};
// Where another program takes a member's core away now and then, about what falling asleep and being woken costs: more
// would burn time that the awaited member or that program could use.
constexpr std::chrono::nanoseconds kShortestSpin{50'000};
// What a wait that ends while spinning adds, after one that did not: such a core gives thousands of them in a row only
// when it is quiet again.
constexpr std::chrono::nanoseconds kSpinGrowth{250};
// Reading the clock costs as much as a few pauses.
constexpr int kPausesPerClock = 16;

inline void spin_pause() noexcept {
#if defined(__x86_64__) || defined(_M_X64) || defined(__i386__)
    _mm_pause();
#elif defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
    __asm__ __volatile__("yield");
#endif
}

// Tells a process from its children. There is no fork() elsewhere.
long process_id() noexcept {
#if defined(__unix__) || defined(__APPLE__)
    return static_cast<long>(getpid());
#else
    return 0;
#endif
}

// The CPUs that this process may use; empty where the system does not say.
std::vector<int> usable_cpus() {
    std::vector<int> cpus;
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
            if (CPU_ISSET(cpu, &set)) {
                cpus.push_back(cpu);
            }
        }
    }
#endif
    return cpus;
}

// The CPU for each worker, or none where there are too few. The caller's own is left to the caller, who would otherwise
// be moved in the middle of its first job.
std::vector<int> worker_cpus(std::vector<int> cpus, std::size_t n_threads) {
    if (cpus.size() < n_threads) {
        return {};
    }
#ifdef __linux__
    const auto own = std::find(cpus.begin(), cpus.end(), sched_getcpu());
    if (own != cpus.end()) {
        std::rotate(cpus.begin(), own, cpus.end());
    }
#endif
    return {cpus.begin() + 1, cpus.begin() + static_cast<std::ptrdiff_t>(n_threads)};
}

// Linux only; elsewhere threads stay where the system puts them. A refusal costs speed alone, so nobody is told.
void bind_this_thread([[maybe_unused]] int cpu) noexcept {
#ifdef __linux__
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    (void)sched_setaffinity(0, sizeof set, &set);
#endif
}

// The CPU that this thread is on; negative where the system does not say.
int this_cpu() noexcept {
#ifdef __linux__
    return sched_getcpu();
#else
    return -1;
#endif
}

// A number that goes up, and threads that wait for it to.
class alignas(kCacheLine) Gate {
  public:
    std::uint32_t value() const noexcept { return value_.load(std::memory_order_acquire); }

    // What the caller wrote before is visible to those who waited.
    void advance() noexcept {
        // A waiter announces itself and then looks at the value; here it is the other way round. In one total order of
        // the four (hence seq_cst), either the waiter sees the new value or this thread sees the waiter.
        value_.fetch_add(1, std::memory_order_seq_cst);
        if (sleepers_.load(std::memory_order_seq_cst) != 0) {
            // A waiter that saw the old value holds the mutex until it sleeps.
            {
                std::lock_guard<std::mutex> lock(mutex_);
            }
            woken_.notify_all();
        }
    }

    // Returns when the value is no longer `old`; whether the thread slept until then.
    bool wait(std::uint32_t old, std::chrono::nanoseconds spin) noexcept {
        if (value() != old) {
            return false;
        }
        if (spin.count() != 0) {
            const auto give_up = std::chrono::steady_clock::now() + spin;
            do {
                for (int i = 0; i < kPausesPerClock; ++i) {
                    spin_pause();
                    if (value() != old) {
                        return false;
                    }
                }
            } while (std::chrono::steady_clock::now() < give_up);
        }
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        woken_.wait(lock, [&] { return value_.load(std::memory_order_seq_cst) != old; });
        sleepers_.fetch_sub(1, std::memory_order_relaxed);
        return true;
    }

  private:
    std::atomic<std::uint32_t> value_{0};
    std::atomic<std::uint32_t> sleepers_{0};
    // Away from the value, which spinning threads read all the time.
    alignas(kCacheLine) std::mutex mutex_;
    std::condition_variable woken_;
};

// A team of one needs none of the machinery, and works in a job of its own for every thread that calls.
class LoneMember final : public ThreadPool::Member {
  public:
    std::size_t index() const noexcept override { return 0; }
    std::size_t n_threads() const noexcept override { return 1; }
    void sync() noexcept override { claimed_ = 0; }
    void claim(std::size_t n_units, std::size_t, std::size_t& begin, std::size_t& end) noexcept override {
        begin = std::min(claimed_, n_units);
        end = n_units;
        claimed_ = n_units;
    }

  private:
    std::size_t claimed_ = 0;
};

}  // namespace

struct ThreadPool::Team {
    struct alignas(kCacheLine) Waiter {
        std::chrono::nanoseconds spin{kLongestSpin};
        std::atomic<int> cpu{-1};  // where it was when it last began a job or woke up
    };
    class TeamMember;

    const std::size_t n_threads;
    const long process = process_id();
    bool spins = false;
    std::vector<Waiter> waiters;  // of each member
    std::vector<std::thread> workers;

    std::mutex turn;  // one job at a time
    const Job* job = nullptr;
    bool stopping = false;
    std::mutex error_mutex;
    std::exception_ptr error;

    Gate started;   // jobs
    Gate passed;    // barriers
    Gate finished;  // jobs

    // The barrier: members that have not left the job (high half) and, of them, those that have not yet arrived (low
    // half). A member that leaves, by an exception too, is not waited for any more.
    alignas(kCacheLine) std::atomic<std::uint32_t> absent{0};
    alignas(kCacheLine) std::atomic<std::size_t> claimed{0};

    Team(std::size_t n, bool pin) : n_threads(n), waiters(n) {
        const std::vector<int> usable = usable_cpus();
        const std::size_t n_cpus = usable.empty() ? std::thread::hardware_concurrency() : usable.size();
        // On a CPU that is shared with a member of this team, spinning only delays the one that is waited for.
        spins = n <= n_cpus;
        const std::vector<int> bound = pin ? worker_cpus(usable, n) : std::vector<int>();
        workers.reserve(n - 1);
        try {
            for (std::size_t i = 1; i < n; ++i) {
                workers.emplace_back([this, i, cpu = bound.empty() ? -1 : bound[i - 1]] { serve(i, cpu); });
            }
        } catch (...) {
            stop();
            throw;
        }
    }

    void stop() noexcept {
        stopping = true;
        started.advance();
        for (std::thread& worker : workers) {
            worker.join();
        }
    }

    // Waits for other members in the middle of a job.
    void wait(Gate& gate, std::uint32_t old, std::size_t index) noexcept {
        Waiter& waiter = waiters[index];
        if (!gate.wait(old, spins ? waiter.spin : std::chrono::nanoseconds{0})) {
            waiter.spin = std::min(kLongestSpin, waiter.spin + kSpinGrowth);
            return;
        }
        const int cpu = this_cpu();
        waiter.cpu.store(cpu, std::memory_order_relaxed);
        // Members that a system woke on one CPU (a virtual machine's does, whose halted CPUs look busy to it) take
        // turns there, and it moves one of them away only after it saw both running, which they are while one spins. If
        // it has nowhere to move it to, they soon spin no more and hand the CPU to each other at once.
        const bool alone =
            cpu < 0 || std::none_of(
                           waiters.begin(), waiters.end(),
                           [&](const Waiter& other) {
                               return &other != &waiter && other.cpu.load(std::memory_order_relaxed) == cpu;
                           });
        waiter.spin = alone ? kShortestSpin : waiter.spin * 7 / 8;
    }

    void serve(std::size_t index, int cpu) noexcept;
    void take_part(std::size_t index) noexcept;

    static constexpr std::uint32_t kOneLeft = 1u << 16;

    // True for the last member to arrive, when it has made all ready for the next barrier.
    bool last_to_arrive(std::uint32_t gone) noexcept {
        const std::uint32_t now = absent.fetch_sub(gone + 1, std::memory_order_acq_rel) - (gone + 1);
        if ((now & (kOneLeft - 1)) != 0) {
            return false;
        }
        claimed.store(0, std::memory_order_relaxed);
        absent.store(now | now >> 16, std::memory_order_relaxed);
        return true;
    }

    void leave() noexcept {
        if (!last_to_arrive(kOneLeft)) {
            return;
        }
        if (absent.load(std::memory_order_relaxed) == 0) {
            finished.advance();
        } else {
            passed.advance();
        }
    }
};

class ThreadPool::Team::TeamMember final : public ThreadPool::Member {
  public:
    TeamMember(Team& team, std::size_t index) : team_(team), index_(index) {}
    std::size_t index() const noexcept override { return index_; }
    std::size_t n_threads() const noexcept override { return team_.n_threads; }

    void sync() noexcept override {
        // Before arriving: afterwards it may have changed.
        const std::uint32_t barrier = team_.passed.value();
        if (team_.last_to_arrive(0)) {
            team_.passed.advance();
        } else {
            team_.wait(team_.passed, barrier, index_);
        }
    }

    void claim(std::size_t n_units, std::size_t min_units, std::size_t& begin, std::size_t& end) noexcept override {
        // Long pieces first, because memory is slow at the start of each and the counter is shared; short ones at the
        // end, so that all members finish together. A member at a third of the others' speed does not hold them up.
        const std::size_t n = team_.n_threads;
        const std::size_t shortest = std::max({min_units, n_units / (16 * n), std::size_t{1}});
        std::size_t taken = team_.claimed.load(std::memory_order_relaxed);
        std::size_t next;
        do {
            if (taken >= n_units) {
                begin = end = n_units;
                return;
            }
            const std::size_t left = n_units - taken;
            next = taken + std::min(left, std::max(shortest, left / (2 * n)));
        } while (!team_.claimed.compare_exchange_weak(taken, next, std::memory_order_relaxed));
        begin = taken;
        end = next;
    }

  private:
    Team& team_;
    const std::size_t index_;
};

void ThreadPool::Team::serve(std::size_t index, int cpu) noexcept {
    if (cpu >= 0) {
        bind_this_thread(cpu);
    }
    // A job ends when every member has left it, so none can be missed.
    for (std::uint32_t jobs = 0;; ++jobs) {
        started.wait(jobs, spins ? kLongestSpin : std::chrono::nanoseconds{0});
        waiters[index].cpu.store(this_cpu(), std::memory_order_relaxed);
        if (stopping) {
            return;
        }
        take_part(index);
    }
}

void ThreadPool::Team::take_part(std::size_t index) noexcept {
    TeamMember member(*this, index);
    try {
        (*job)(member);
    } catch (...) {
        std::lock_guard<std::mutex> lock(error_mutex);
        if (!error) {
            error = std::current_exception();
        }
    }
    leave();
}

ThreadPool::ThreadPool(std::size_t n_threads, bool pin) {
    if (n_threads < 1 || n_threads > kMaxThreads) {
        throw std::invalid_argument("a thread pool has 1 to " + std::to_string(kMaxThreads) + " threads, not " +
                                    std::to_string(n_threads));
    }
    team_ = std::make_unique<Team>(n_threads, pin);
}

ThreadPool::~ThreadPool() {
    if (team_->process != process_id()) {
        // The workers are not here to be joined, and whatever mutex they held stays locked.
        (void)team_.release();
        return;
    }
    team_->stop();
}

std::size_t ThreadPool::n_threads() const noexcept {
    return team_->n_threads;
}

void ThreadPool::run(const Job& job) {
    Team& team = *team_;
    if (team.process != process_id()) {
        throw std::runtime_error("this process was forked from the one that opened the engine; open it here again");
    }
    if (team.n_threads == 1) {
        LoneMember member;
        job(member);
        return;
    }
    std::lock_guard<std::mutex> lock(team.turn);
    const auto n = static_cast<std::uint32_t>(team.n_threads);
    team.job = &job;
    team.absent.store(n << 16 | n, std::memory_order_relaxed);
    team.waiters[0].cpu.store(this_cpu(), std::memory_order_relaxed);
    const std::uint32_t jobs = team.finished.value();
    team.started.advance();
    team.take_part(0);
    team.wait(team.finished, jobs, 0);
    if (std::exception_ptr error = std::exchange(team.error, nullptr)) {
        std::rethrow_exception(error);
    }
}

}  // namespace goslet
