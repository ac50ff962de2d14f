// The engine with threads inside it and around it, on one layer of random weights: what it computes is tested against
// the step graph in tests/runtime/test_native.py, and here that neither kind of thread changes a bit of it. Also built
// with ThreadSanitizer.
#include "native_engine.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "state_buffer.h"

namespace {

using goslet::Format;
using goslet::NativeEngine;
using goslet::Sequence;
using goslet::StateBuffer;
using goslet::TensorLayout;
using goslet::TensorView;

constexpr std::size_t kWidth = 64;
constexpr std::size_t kHeads = 4;
constexpr std::size_t kHeadSize = 16;
constexpr std::size_t kHidden = 160;
constexpr std::size_t kVocab = 100;
constexpr std::size_t kGroup = 32;

// The parts of an engine and the memory behind them.
class Model {
  public:
    Model() {
        add_floats("emb.weight", {kVocab, kWidth});
        for (const char* name : {"ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias", "ln_x.weight", "ln_x.bias",
                                 "ln_out.weight", "ln_out.bias", "mix", "bias", "k_k", "k_a", "r_k"}) {
            add_floats(name, {kWidth});
        }
        for (const char* name : {"r", "w", "k", "v", "a", "g", "output"}) {
            add_matrix(name, Format::kInt8, TensorLayout::kTiles, kWidth, kWidth);
        }
        add_matrix("key", Format::kInt4, TensorLayout::kTiles, kHidden, kWidth);
        add_matrix("value", Format::kInt4, TensorLayout::kColumns, kWidth, kHidden);
        add_matrix("head", Format::kInt8, TensorLayout::kTiles, kVocab, kWidth);
        write_program();
    }

    goslet::EngineParts parts() const {
        return {program_,
                tensors_,
                {{"att_shift", {{kWidth}, 0.0F}},
                 {"wkv", {{kHeads, kHeadSize, kHeadSize}, 0.0F}},
                 {"ffn_shift", {{kWidth}, 0.0F}}},
                kVocab};
    }

  private:
    // Whole cache lines, so that vectors may be read from any tensor's start.
    std::uint8_t* allocate(std::size_t size_bytes) {
        memory_.push_back(std::make_unique<std::uint8_t[]>(size_bytes + 64));
        void* start = memory_.back().get();
        std::size_t space = size_bytes + 64;
        return static_cast<std::uint8_t*>(std::align(64, size_bytes, start, space));
    }

    void add_floats(const std::string& name, std::vector<std::size_t> shape) {
        std::size_t n = 1;
        for (const std::size_t size : shape) {
            n *= size;
        }
        std::uint8_t* data = allocate(n * sizeof(float));
        std::uniform_real_distribution<float> distribution(0.1F, 0.9F);
        for (std::size_t i = 0; i < n; ++i) {
            const float number = distribution(generator_);
            std::memcpy(data + i * sizeof(float), &number, sizeof(float));
        }
        tensors_.push_back({name, Format::kF32, TensorLayout::kRows, 0, shape, data, n * sizeof(float), nullptr, 0});
    }

    void add_matrix(const std::string& name, Format format, TensorLayout layout, std::size_t n_out, std::size_t n_in) {
        const goslet::Layout packed =
            layout == TensorLayout::kTiles ? goslet::Layout::kTiles : goslet::Layout::kColumns;
        const goslet::Matrix matrix{format, packed, kGroup, n_out, n_in, nullptr, nullptr};
        std::uint8_t* data = allocate(matrix.data_bytes());
        for (std::size_t i = 0; i < matrix.data_bytes(); ++i) {
            data[i] = static_cast<std::uint8_t>(generator_());
        }
        std::uint8_t* scales = allocate(matrix.scales_bytes());
        // int8's numbers go to 127 and int4's to 7: weights of up to 1/8.
        const std::uint16_t scale = format == Format::kInt8 ? 0x1400 : 0x2400;  // 2^-10, 2^-6
        for (std::size_t i = 0; i < matrix.scales_bytes(); i += sizeof scale) {
            std::memcpy(scales + i, &scale, sizeof scale);
        }
        tensors_.push_back(
            {name, format, layout, kGroup, {n_out, n_in}, data, matrix.data_bytes(), scales, matrix.scales_bytes()});
    }

    static std::string product(const std::string& weight, const std::string& x, const std::string& out,
                               const std::string& activation, const std::string& combine = "set") {
        return R"({"weight":")" + weight + R"(","x":")" + x + R"(","out":")" + out +
               R"(","residual":null,"bias":null,"activation":")" + activation + R"(","combine":")" + combine +
               R"(","operands":[]})";
    }

    void write_program() {
        program_ = R"({"version":3,"registers":{"x":64,"mixed":64,"r":64,"w":64,"k":64,"v":64,"a":64,"g":64,"y":64,)"
                   R"("first_value":64,"hidden":160},"input":["x"],"steps":[)"
                   R"({"op":"norm_shift","x":"x","norm":"ln1","eps":1e-5,"shift":"att_shift",)"
                   R"("mixes":[{"mix":"mix","out":"mixed"}],"normed":null,"previous":null},)"
                   R"({"op":"linear","products":[)" +
                   product("r", "mixed", "r", "none") + "," + product("w", "mixed", "w", "decay") + "," +
                   product("k", "mixed", "k", "none") + "," + product("v", "mixed", "v", "none") + "," +
                   product("a", "mixed", "a", "sigmoid") + "," + product("g", "mixed", "g", "none") +
                   R"(]},{"op":"wkv7","r":"r","w":"w","k":"k","v":"v","a":"a","g":"g","first_value":"first_value",)"
                   R"("value_mix":null,"k_k":"k_k","k_a":"k_a","r_k":"r_k","norm":"ln_x","eps":1e-3,"state":"wkv",)"
                   R"("head_size":16,"out":"y"},{"op":"linear","products":[)" +
                   product("output", "y", "x", "none", "add") +
                   R"(]},{"op":"norm_shift","x":"x","norm":"ln2","eps":1e-5,"shift":"ffn_shift",)"
                   R"("mixes":[{"mix":"mix","out":"mixed"}],"normed":null,"previous":null},)"
                   R"({"op":"linear","products":[)" +
                   product("key", "mixed", "hidden", "relu_squared") + R"(]},{"op":"linear","products":[)" +
                   product("value", "hidden", "x", "none", "add") +
                   R"(]},{"op":"logits","x":"x","norm":"ln_out","eps":1e-5,"weight":"head"}]})";
    }

    std::mt19937 generator_{11};
    std::vector<std::unique_ptr<std::uint8_t[]>> memory_;
    std::vector<TensorView> tensors_;
    std::string program_;
};

std::vector<std::int64_t> prompt(std::size_t n_tokens, unsigned seed) {
    std::mt19937 generator(seed);
    std::vector<std::int64_t> tokens(n_tokens);
    for (std::int64_t& token : tokens) {
        token = static_cast<std::int64_t>(generator() % kVocab);
    }
    return tokens;
}

// The logits after every token of one session, fed in pieces of 1, 2, … tokens, and its last state.
std::vector<float> session(NativeEngine& engine, const std::vector<std::int64_t>& tokens) {
    StateBuffer state(engine.state_layout());
    std::vector<float> found(tokens.size() * kVocab);
    std::size_t piece = 1;
    for (std::size_t done = 0; done < tokens.size(); done += piece++) {
        piece = std::min(piece, tokens.size() - done);
        engine.feed({{&state, tokens.data() + done, piece, found.data() + done * kVocab, true}});
    }
    found.insert(found.end(), state.data(), state.data() + state.size_bytes() / sizeof(float));
    return found;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

constexpr std::size_t kSessions = 4;
constexpr std::size_t kTokens = 90;  // in the last piece, more than a product takes at once are left

}  // namespace

TEST(threads_inside_change_nothing) {
    const Model model;
    NativeEngine alone(model.parts(), {1, false, true});
    const std::vector<std::int64_t> tokens = prompt(kTokens, 1);
    const std::vector<float> expected = session(alone, tokens);
    for (const float number : expected) {
        CHECK(number == number);
    }
    for (const std::size_t n_threads : {2U, 3U, 8U}) {
        NativeEngine engine(model.parts(), {n_threads, false, true});
        CHECK(same(session(engine, tokens), expected));
    }
}

TEST(sessions_step_in_threads_around_the_engine) {
    const Model model;
    std::vector<std::vector<float>> expected;
    NativeEngine alone(model.parts(), {1, false, true});
    for (std::size_t index = 0; index < kSessions; ++index) {
        expected.push_back(session(alone, prompt(kTokens, static_cast<unsigned>(index))));
    }
    for (const std::size_t n_threads : {1U, 2U}) {
        NativeEngine engine(model.parts(), {n_threads, false, true});
        std::vector<std::vector<float>> found(kSessions);
        std::vector<std::thread> threads;
        threads.reserve(kSessions);
        for (std::size_t index = 0; index < kSessions; ++index) {
            threads.emplace_back([&engine, &found, index] {
                found[index] = session(engine, prompt(kTokens, static_cast<unsigned>(index)));
            });
        }
        // A monitor reads while they run.
        for (int look = 0; look < 100; ++look) {
            const NativeEngine::Density density = engine.density();
            CHECK(density.active <= density.seen);
        }
        for (std::thread& thread : threads) {
            thread.join();
        }
        for (std::size_t index = 0; index < kSessions; ++index) {
            CHECK(same(found[index], expected[index]));
        }
        CHECK(engine.density().seen > 0);
    }
}

TEST(a_refused_call_leaves_the_engine_and_the_state_as_they_were) {
    const Model model;
    NativeEngine engine(model.parts(), {2, false, true});
    const std::vector<std::int64_t> tokens = prompt(kTokens, 1);
    StateBuffer state(engine.state_layout());
    std::vector<float> logits(kVocab);
    engine.feed({{&state, tokens.data(), 5, logits.data(), false}});
    const std::unique_ptr<StateBuffer> before = state.clone();
    const std::int64_t bad[] = {1, 2, static_cast<std::int64_t>(kVocab)};
    const std::vector<std::vector<Sequence>> refused = {
        {{&state, bad, 3, logits.data(), false}},
        {{&state, tokens.data(), 0, logits.data(), false}},
        {{&state, tokens.data(), 1, logits.data(), false}, {&state, tokens.data(), 1, logits.data(), false}},
    };
    for (const std::vector<Sequence>& sequences : refused) {
        bool thrown = false;
        try {
            engine.feed(sequences);
        } catch (const std::invalid_argument&) {
            thrown = true;
        }
        CHECK(thrown);
        CHECK(std::memcmp(state.data(), before->data(), state.size_bytes()) == 0);
    }
    CHECK(same(session(engine, tokens), session(engine, tokens)));
}
