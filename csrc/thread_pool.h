// Threads that work on one job together and wait for each other between its parts.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>

namespace goslet {

// A fixed team: the calling thread and n_threads - 1 workers. They spin for a while before they sleep.
//
// Several threads may call `run` at the same time; they take turns. A pool belongs to the process that made it: in a
// child of fork() its workers do not exist, so `run` throws there, and the destructor joins nothing.
class ThreadPool {
  public:
    // One thread's view of the job that is running.
    class Member {
      public:
        virtual std::size_t index() const noexcept = 0;  // 0 is the calling thread
        virtual std::size_t n_threads() const noexcept = 0;
        // Returns when every member of the team has called it; what they wrote before is visible after.
        virtual void sync() noexcept = 0;
        // The next piece of `n_units` of work that nobody has taken, as [begin, end); begin == end when none is left.
        // Pieces have at least `min_units` (the last one may be shorter). All members share one count of units, which
        // every `sync` sets back to zero: so one such loop between two syncs.
        virtual void claim(std::size_t n_units, std::size_t min_units, std::size_t& begin,
                           std::size_t& end) noexcept = 0;

      protected:
        ~Member() = default;
    };
    using Job = std::function<void(Member&)>;

    // n_threads from 1 to 1024. With `pin`, each worker is bound to a CPU of its own among those that this process may
    // use, where there are enough of them; the calling thread is never bound. Throws std::system_error when a thread
    // cannot be started; those already started are then stopped.
    ThreadPool(std::size_t n_threads, bool pin);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    std::size_t n_threads() const noexcept;

    // Runs `job` on every member and returns when all are done. `job` must not throw past its first sync() or claim();
    // an exception that a member throws is given to the caller once all members have returned. It must not call `run`
    // of the same pool, which would wait for itself. Throws std::runtime_error in a child of fork().
    void run(const Job& job);

  private:
    struct Team;
    std::unique_ptr<Team> team_;
};

}  // namespace goslet
