// A test harness for one program: tests register themselves, and `main` is here.
//
//     TEST(sums_of_rows) { CHECK(n == 3); CHECK_CLOSE(sum, 1.5, 1e-6); }
//
// A failed check is printed and its test goes on; an exception ends its test. The program runs all tests, or those
// whose name contains its argument, and exits with 1 if one failed or none was found.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <sstream>
#include <string>
#include <vector>

namespace check {

struct Test {
    const char* name;
    void (*body)();
};

inline std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}

// Checks may stand in threads of a test.
inline std::atomic<int> failures{0};

inline bool add(const char* name, void (*body)()) {
    tests().push_back({name, body});
    return true;
}

inline void fail(const char* file, int line, const std::string& what) {
    ++failures;
    std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
}

inline void close(const char* file, int line, const char* what, double found, double expected, double tolerance) {
    // Written so that NaN fails.
    if (!(std::fabs(found - expected) <= tolerance)) {
        std::ostringstream text;
        text.precision(9);
        text << what << " is " << found << ", not " << expected << " within " << tolerance;
        fail(file, line, text.str());
    }
}

}  // namespace check

#define TEST(name)                                             \
    static void name();                                        \
    static const bool name##_added = check::add(#name, &name); \
    static void name()
#define CHECK(condition) ((condition) ? void() : check::fail(__FILE__, __LINE__, "not true: " #condition))
#define CHECK_CLOSE(found, expected, tolerance) \
    check::close(__FILE__, __LINE__, #found, double(found), double(expected), double(tolerance))

int main(int argc, char** argv) {
    int passed = 0;
    int failed = 0;
    for (const check::Test& test : check::tests()) {
        if (argc > 1 && std::strstr(test.name, argv[1]) == nullptr) {
            continue;
        }
        const int before = check::failures;
        try {
            test.body();
        } catch (const std::exception& error) {
            check::fail(test.name, 0, std::string("threw: ") + error.what());
        }
        const bool ok = check::failures == before;
        std::fprintf(stderr, "%s %s\n", ok ? "ok    " : "FAILED", test.name);
        ++(ok ? passed : failed);
    }
    std::printf("%d tests passed\n", passed);
    return failed != 0 || passed == 0 ? 1 : 0;
}
