#include "thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <fstream>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "check.h"

#ifdef __linux__
#include <sched.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

// Sanitizers need more addresses than a limit would leave.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED
#endif
#endif

using goslet::ThreadPool;
using Member = ThreadPool::Member;

namespace {

// 0 + 1 + … + n - 1 for each job, summed by all members in pieces.
void check_works(ThreadPool& pool, std::size_t n) {
    std::vector<std::uint64_t> sums(pool.n_threads(), 0);
    pool.run([&](Member& member) {
        std::size_t begin, end;
        for (member.claim(n, 3, begin, end); begin < end; member.claim(n, 3, begin, end)) {
            for (std::size_t i = begin; i < end; ++i) {
                sums[member.index()] += i;
            }
        }
    });
    const auto sum = std::accumulate(sums.begin(), sums.end(), std::uint64_t{0});
    CHECK(sum == std::uint64_t{n} * (n - 1) / 2);
}

std::string message_of(ThreadPool& pool, const ThreadPool::Job& job) {
    try {
        pool.run(job);
    } catch (const std::exception& error) {
        return error.what();
    }
    return "nothing thrown";
}

}  // namespace

TEST(every_member_has_each_job_once) {
    for (const std::size_t n_threads : {1, 2, 3, 5}) {
        ThreadPool pool(n_threads, false);
        CHECK(pool.n_threads() == n_threads);
        // Written by one member each, without atomics: ThreadSanitizer sees whether a job waits for the one before it.
        std::vector<int> jobs(n_threads, 0);
        int by_caller = 0;
        const auto caller = std::this_thread::get_id();
        for (int i = 0; i < 500; ++i) {
            pool.run([&](Member& member) {
                CHECK(member.n_threads() == n_threads);
                CHECK((member.index() == 0) == (std::this_thread::get_id() == caller));
                ++jobs.at(member.index());
            });
            by_caller += jobs[0];
            // Long enough that workers fall asleep, now and then.
            if (i % 100 == 0) {
                std::this_thread::sleep_for(std::chrono::milliseconds(1));
            }
        }
        CHECK(jobs == std::vector<int>(n_threads, 500));
        CHECK(by_caller == 500 * 501 / 2);
    }
}

TEST(sync_shows_what_others_wrote) {
    constexpr std::uint64_t kRounds = 2000;
    for (const std::size_t n_threads : {2, 3, 4}) {
        ThreadPool pool(n_threads, false);
        std::vector<std::uint64_t> written(n_threads, 0);
        std::atomic<int> wrong{0};
        pool.run([&](Member& member) {
            for (std::uint64_t round = 1; round <= kRounds; ++round) {
                written[member.index()] = round;
                member.sync();
                for (const std::uint64_t other : written) {
                    wrong += other != round;
                }
                member.sync();
            }
        });
        CHECK(wrong == 0);
    }
}

TEST(claim_gives_every_unit_once) {
    for (const std::size_t n_threads : {1, 2, 3, 7}) {
        ThreadPool pool(n_threads, false);
        for (const std::size_t n_units : {0, 1, 2, 5, 63, 64, 65, 1000, 4097}) {
            for (const std::size_t min_units : {0, 1, 2, 7, 64, 5000}) {
                // Two loops with a sync between, which sets the count back; the next job starts at zero again.
                std::vector<std::vector<int>> taken(2, std::vector<int>(n_units, 0));
                std::atomic<int> short_pieces{0};
                pool.run([&](Member& member) {
                    for (std::vector<int>& times : taken) {
                        std::size_t begin, end;
                        for (member.claim(n_units, min_units, begin, end); begin != end;
                             member.claim(n_units, min_units, begin, end)) {
                            short_pieces += end - begin < min_units && end != n_units;
                            for (std::size_t i = begin; i < end; ++i) {
                                ++times.at(i);
                            }
                        }
                        member.sync();
                    }
                });
                const std::vector<int> once(n_units, 1);
                CHECK(taken[0] == once);
                CHECK(taken[1] == once);
                CHECK(short_pieces == 0);
            }
        }
    }
}

TEST(claim_counts_to_the_largest_size) {
    constexpr std::size_t kMost = std::numeric_limits<std::size_t>::max();
    for (const std::size_t min_units : {std::size_t{1}, kMost / 2 + 2, kMost}) {
        ThreadPool pool(3, false);
        std::atomic<std::size_t> taken{0};
        pool.run([&](Member& member) {
            std::size_t begin, end;
            for (member.claim(kMost, min_units, begin, end); begin < end; member.claim(kMost, min_units, begin, end)) {
                taken += end - begin;
            }
        });
        CHECK(taken == kMost);
    }
}

TEST(callers_take_turns) {
    for (const std::size_t n_threads : {1, 3}) {
        ThreadPool pool(n_threads, false);
        std::atomic<int> inside{0};
        std::atomic<int> most_inside{0};
        std::atomic<int> done{0};
        std::vector<std::thread> callers;
        for (int caller = 0; caller < 4; ++caller) {
            callers.emplace_back([&] {
                for (int i = 0; i < 100; ++i) {
                    std::atomic<int> own{0};
                    pool.run([&](Member& member) {
                        if (member.index() == 0) {
                            most_inside = std::max(most_inside.load(), ++inside);
                        }
                        member.sync();
                        ++own;
                        member.sync();
                        if (member.index() == 0) {
                            --inside;
                        }
                    });
                    CHECK(own == static_cast<int>(n_threads));
                    ++done;
                }
            });
        }
        for (std::thread& caller : callers) {
            caller.join();
        }
        CHECK(done == 400);
        // One thread needs no turns: its jobs share nothing.
        if (n_threads > 1) {
            CHECK(most_inside == 1);
        }
    }
}

TEST(exceptions_reach_the_caller) {
    for (const std::size_t n_threads : {1, 2, 4}) {
        ThreadPool pool(n_threads, false);
        for (std::size_t thrower = 0; thrower < n_threads; ++thrower) {
            // The others go on through their barriers, and nobody waits for the one that is gone.
            std::atomic<int> passed{0};
            const std::string message = message_of(pool, [&](Member& member) {
                if (member.index() == thrower) {
                    throw std::runtime_error("from member " + std::to_string(thrower));
                }
                for (int i = 0; i < 50; ++i) {
                    member.sync();
                }
                ++passed;
            });
            CHECK(message == "from member " + std::to_string(thrower));
            CHECK(passed == static_cast<int>(n_threads) - 1);
            check_works(pool, 1000);
        }
        CHECK(message_of(pool, [](Member&) { throw std::length_error("from all"); }) == "from all");
        // An old error is not given again.
        check_works(pool, 1000);
    }
}

TEST(more_threads_than_cpus) {
    ThreadPool pool(16, true);
    std::atomic<int> syncs{0};
    pool.run([&](Member& member) {
        for (int i = 0; i < 2000; ++i) {
            member.sync();
        }
        syncs += 2000;
    });
    CHECK(syncs == 16 * 2000);
    check_works(pool, 100000);
}

TEST(stops_in_whatever_state) {
    for (int i = 0; i < 20; ++i) {
        {
            ThreadPool unused(4, false);
        }
        {
            ThreadPool just_finished(4, false);
            check_works(just_finished, 100);
        }
        {
            ThreadPool sleeping(4, false);
            check_works(sleeping, 100);
            std::this_thread::sleep_for(std::chrono::milliseconds(2));
        }
    }
}

TEST(one_thread_works_alone) {
    ThreadPool pool(1, true);
    const auto caller = std::this_thread::get_id();
    pool.run([&](Member& member) {
        CHECK(std::this_thread::get_id() == caller);
        CHECK(member.index() == 0);
        std::size_t begin, end;
        member.claim(1000, 1, begin, end);
        CHECK(begin == 0 && end == 1000);
        member.claim(1000, 1, begin, end);
        CHECK(begin == end);
        member.sync();
        member.claim(10, 1, begin, end);
        CHECK(begin == 0 && end == 10);
    });
}

TEST(refuses_impossible_sizes) {
    for (const std::size_t n_threads : {std::size_t{0}, std::size_t{1025}, std::numeric_limits<std::size_t>::max()}) {
        bool refused = false;
        try {
            ThreadPool pool(n_threads, false);
        } catch (const std::invalid_argument&) {
            refused = true;
        }
        CHECK(refused);
    }
}

#ifdef __linux__

namespace {

constexpr int kRefused = 0;
constexpr int kRan = 3;

// What a forked child exits with after it used and destroyed the pool; -1 when it crashed or hung.
int forked(ThreadPool* pool) {
    const pid_t child = fork();
    if (child == 0) {
        alarm(20);
        int status = kRan;
        try {
            pool->run([](Member&) {});
        } catch (const std::runtime_error&) {
            status = kRefused;
        }
        delete pool;
        _exit(status);
    }
    int status = -1;
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

}  // namespace

TEST(forked_child_is_refused) {
    for (const std::size_t n_threads : {1, 4}) {
        auto* pool = new ThreadPool(n_threads, false);
        CHECK(forked(pool) == kRefused);
        check_works(*pool, 1000);
        CHECK(forked(pool) == kRefused);
        // And in the middle of a job, whose locks stay locked in the child for ever.
        std::atomic<bool> stop{false};
        std::atomic<bool> running{false};
        std::thread other([&] {
            pool->run([&](Member&) {
                running = true;
                while (!stop) {
                    std::this_thread::sleep_for(std::chrono::microseconds(100));
                }
            });
        });
        while (!running) {
            std::this_thread::yield();
        }
        CHECK(forked(pool) == kRefused);
        stop = true;
        other.join();
        check_works(*pool, 1000);
        delete pool;
    }
}

TEST(pinned_workers_have_a_cpu_each) {
    cpu_set_t usable;
    CHECK(sched_getaffinity(0, sizeof usable, &usable) == 0);
    const auto n_cpus = static_cast<std::size_t>(CPU_COUNT(&usable));
    for (const bool pin : {true, false}) {
        for (const std::size_t n_threads : {n_cpus, n_cpus + 1}) {
            ThreadPool pool(n_threads, pin);
            std::vector<cpu_set_t> sets(n_threads);
            pool.run([&](Member& member) { sched_getaffinity(0, sizeof(cpu_set_t), &sets[member.index()]); });
            CHECK(CPU_EQUAL(&sets[0], &usable));
            cpu_set_t together;
            CPU_ZERO(&together);
            for (std::size_t i = 1; i < n_threads; ++i) {
                if (pin && n_threads <= n_cpus) {
                    CHECK(CPU_COUNT(&sets[i]) == 1);
                    CPU_OR(&together, &together, &sets[i]);
                } else {
                    CHECK(CPU_EQUAL(&sets[i], &usable));
                }
            }
            if (pin && n_threads <= n_cpus) {
                CHECK(static_cast<std::size_t>(CPU_COUNT(&together)) == n_threads - 1);
            }
        }
    }
}

#ifndef SANITIZED
TEST(threads_that_cannot_start) {
    rlimit before;
    CHECK(getrlimit(RLIMIT_AS, &before) == 0);
    std::size_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    rlimit limit = before;
    // Some threads start, and a thousand do not: each has a stack of megabytes.
    limit.rlim_cur = pages * static_cast<std::size_t>(sysconf(_SC_PAGESIZE)) + (std::size_t{100} << 20);
    CHECK(setrlimit(RLIMIT_AS, &limit) == 0);
    rlimit now;
    CHECK(getrlimit(RLIMIT_AS, &now) == 0);
    bool refused = false;
    // Emulators leave this limit as it was.
    const bool limited = now.rlim_cur == limit.rlim_cur;
    if (limited) {
        try {
            ThreadPool pool(1024, false);
        } catch (const std::system_error&) {
            refused = true;
        }
    }
    CHECK(setrlimit(RLIMIT_AS, &before) == 0);
    CHECK(refused == limited);
    ThreadPool pool(4, false);
    check_works(pool, 1000);
}
#endif

#endif  // __linux__
