// The Python module goslet._native. Only checks and conversions live here; no other file includes Python's headers.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstdint>
#include <exception>
#include <limits>
#include <list>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/kernels.h"
#include "native_engine.h"
#include "nibbles.h"
#include "state_buffer.h"
#include "vocabulary_trie.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

using goslet::StateBuffer;
using goslet::VocabularyTrie;

// Calls `act`, in which Python may end this thread. Where the interpreter ends, Python up to 3.13 ends every other
// thread as it asks for the lock, by unwinding its stack, which no destructor lets pass: the process would abort. Here
// a daemon thread stays until the process is gone instead, which is what Python does from 3.14 on.
template <typename Act>
void or_stay(Act act) noexcept {
    try {
        act();
    } catch (...) {
        // Nothing of Python's throws but that unwinding, which may be held up and must not be ended.
        for (;;) {
            std::this_thread::sleep_for(std::chrono::hours(1));
        }
    }
}

// Lets other Python threads run while it lives, as py::gil_scoped_release does.
class WithoutGil {
  public:
    WithoutGil() : thread_(PyEval_SaveThread()) {}
    WithoutGil(const WithoutGil&) = delete;
    WithoutGil& operator=(const WithoutGil&) = delete;
    ~WithoutGil() {
        or_stay([this] { PyEval_RestoreThread(thread_); });
    }

  private:
    PyThreadState* thread_;
};

// The bytes of a Python object, which stay where they are while this lives.
class BorrowedBytes {
  public:
    explicit BorrowedBytes(const py::buffer& owner) {
        if (PyObject_GetBuffer(owner.ptr(), &view_, PyBUF_C_CONTIGUOUS) != 0) {
            PyErr_Clear();
            throw py::value_error("a buffer is not contiguous");
        }
    }
    BorrowedBytes(const BorrowedBytes&) = delete;
    BorrowedBytes& operator=(const BorrowedBytes&) = delete;
    // The last view into a file unmaps it, for which Python lets go of the lock.
    ~BorrowedBytes() {
        or_stay([this] { PyBuffer_Release(&view_); });
    }

    const std::uint8_t* data() const { return static_cast<const std::uint8_t*>(view_.buf); }
    std::size_t size_bytes() const { return static_cast<std::size_t>(view_.len); }

  private:
    Py_buffer view_{};
};

// A float32 view of one tensor whose base is the buffer object, which therefore outlives it.
py::array tensor_view(const py::object& owner, std::size_t index) {
    auto& buffer = owner.cast<StateBuffer&>();
    if (index >= buffer.layout().size()) {
        throw py::index_error("the state has " + std::to_string(buffer.layout().size()) + " tensors, not a number " +
                              std::to_string(index));
    }
    const std::vector<std::size_t>& shape = buffer.layout()[index].shape;
    return py::array_t<float>(std::vector<py::ssize_t>(shape.begin(), shape.end()), buffer.tensor(index), owner);
}

void register_state_buffer(py::module_& module) {
    py::class_<StateBuffer>(module, "StateBuffer", py::buffer_protocol(),
                            "One state: float32 tensors in a single 64-byte-aligned allocation that never moves.")
        .def(py::init([](const std::vector<std::vector<std::size_t>>& shapes, const std::vector<float>& inits) {
                 if (shapes.size() != inits.size()) {
                     throw std::invalid_argument("there are " + std::to_string(shapes.size()) + " shapes and " +
                                                 std::to_string(inits.size()) + " initial values");
                 }
                 std::vector<goslet::StateTensorLayout> layout;
                 layout.reserve(shapes.size());
                 for (std::size_t index = 0; index < shapes.size(); ++index) {
                     layout.push_back({shapes[index], inits[index]});
                 }
                 const WithoutGil release;
                 return std::make_unique<StateBuffer>(std::move(layout));
             }),
             "shapes"_a, "inits"_a)
        .def_buffer([](StateBuffer& buffer) {
            return py::buffer_info(buffer.data(), static_cast<py::ssize_t>(buffer.size_bytes() / sizeof(float)));
        })
        .def_property_readonly("size_bytes", &StateBuffer::size_bytes)
        .def_property_readonly("n_tensors", [](const StateBuffer& buffer) { return buffer.layout().size(); })
        .def("tensor", &tensor_view, "index"_a)
        .def("reset", &StateBuffer::reset, py::call_guard<WithoutGil>())
        .def("copy_from", &StateBuffer::copy_from, "other"_a, py::call_guard<WithoutGil>())
        .def("clone", &StateBuffer::clone, py::call_guard<WithoutGil>());
}

void register_vocabulary_trie(py::module_& module) {
    py::class_<VocabularyTrie>(module, "VocabularyTrie", "Greedy longest match over a vocabulary of byte strings.")
        .def(py::init([](std::uint32_t vocab_size, const std::vector<std::pair<std::uint32_t, py::bytes>>& entries) {
                 std::vector<VocabularyTrie::Entry> copied;
                 copied.reserve(entries.size());
                 for (const auto& [id, bytes] : entries) {
                     copied.emplace_back(id, std::string(bytes));
                 }
                 const WithoutGil release;
                 return VocabularyTrie(vocab_size, copied);
             }),
             "vocab_size"_a, "entries"_a)
        .def_static(
            "from_blob",
            [](const py::buffer& blob) {
                const BorrowedBytes bytes(blob);
                const WithoutGil release;
                return VocabularyTrie::from_blob({reinterpret_cast<const char*>(bytes.data()), bytes.size_bytes()});
            },
            "blob"_a)
        .def("to_blob", [](const VocabularyTrie& trie) { return py::bytes(trie.to_blob()); })
        .def_property_readonly("vocab_size", &VocabularyTrie::vocab_size)
        .def_property_readonly("n_entries", &VocabularyTrie::n_entries)
        .def(
            "encode",
            [](const VocabularyTrie& trie, const py::bytes& text) {
                const std::string_view bytes = text;
                VocabularyTrie::Encoding encoding;
                {
                    const WithoutGil release;
                    encoding = trie.encode(bytes);
                }
                return std::make_pair(std::move(encoding.ids), encoding.matched_bytes);
            },
            "text"_a)
        .def(
            "decode",
            [](const VocabularyTrie& trie, const std::vector<std::uint32_t>& ids) {
                return py::bytes(trie.decode(ids));
            },
            "ids"_a)
        .def(
            "token_bytes", [](const VocabularyTrie& trie, std::uint32_t id) { return py::bytes(trie.token_bytes(id)); },
            "id"_a);
}

py::array_t<std::uint8_t> transpose_int4(const py::array_t<std::uint8_t, py::array::c_style>& rows, std::size_t k) {
    if (rows.ndim() != 2) {
        throw std::invalid_argument("rows must have 2 dimensions, not " + std::to_string(rows.ndim()));
    }
    const auto n = static_cast<std::size_t>(rows.shape(0));
    const auto row_bytes = static_cast<std::size_t>(rows.shape(1));
    if (row_bytes != goslet::nibble_bytes(k)) {
        throw std::invalid_argument("rows of " + std::to_string(k) + " nibbles take " +
                                    std::to_string(goslet::nibble_bytes(k)) + " bytes, not " +
                                    std::to_string(row_bytes));
    }
    // No overflow: rows already holds n * nibble_bytes(k) bytes, at least half of this many nibbles.
    const std::size_t out_bytes = goslet::nibble_bytes(n * k);
    py::array_t<std::uint8_t> out(static_cast<py::ssize_t>(out_bytes));
    const std::uint8_t* const from = rows.data();
    std::uint8_t* const to = out.mutable_data();
    {
        const WithoutGil release;
        goslet::transpose_int4(from, n, k, to);
    }
    return out;
}

void register_nibbles(py::module_& module) {
    module.def("transpose_int4", &transpose_int4, py::arg("rows").noconvert(), "k"_a,
               "Packed [n, ceil(k / 2)] rows of nibbles to the packed [k, n] matrix; low nibble first.");
}

template <typename T>
T known(std::optional<T> value, const std::string& name) {
    if (!value.has_value()) {
        throw py::value_error("no such format or layout: " + name);
    }
    return *value;
}

// An engine and what it reads in place.
struct BoundEngine {
    std::list<BorrowedBytes> buffers;
    std::unique_ptr<goslet::NativeEngine> engine;
};

using TensorTuple = std::tuple<std::string, std::string, std::string, std::size_t, std::vector<std::size_t>, py::buffer,
                               std::optional<py::buffer>>;
using StateTuple = std::tuple<std::string, std::vector<std::size_t>, float>;
// Plain arrays: pybind11 would convert another dtype into a copy, and the logits would go there.
using SequenceTuple = std::tuple<StateBuffer*, py::array, std::optional<py::array>>;

std::pair<const std::uint8_t*, std::size_t> keep_bytes(BoundEngine& bound, const py::buffer& buffer) {
    const BorrowedBytes& bytes = bound.buffers.emplace_back(buffer);
    return {bytes.data(), bytes.size_bytes()};
}

std::unique_ptr<BoundEngine> make_engine(const py::buffer& program, const std::vector<TensorTuple>& tensors,
                                         const std::vector<StateTuple>& state, std::size_t vocab_size,
                                         std::size_t threads, bool pin, bool skip_zeros) {
    auto bound = std::make_unique<BoundEngine>();
    goslet::EngineParts parts;
    const auto [text, text_bytes] = keep_bytes(*bound, program);
    parts.program = {reinterpret_cast<const char*>(text), text_bytes};
    for (const auto& [name, format, layout, group, shape, data, scales] : tensors) {
        goslet::TensorView view{name,
                                known(goslet::format_named(format), format),
                                known(goslet::layout_named(layout), layout),
                                group,
                                shape,
                                nullptr,
                                0,
                                nullptr,
                                0};
        std::tie(view.data, view.data_bytes) = keep_bytes(*bound, data);
        if (scales.has_value()) {
            std::tie(view.scales, view.scales_bytes) = keep_bytes(*bound, *scales);
        }
        parts.tensors.push_back(std::move(view));
    }
    for (const auto& [name, shape, init] : state) {
        parts.state.push_back({name, {shape, init}});
    }
    parts.vocab_size = vocab_size;
    const WithoutGil release;
    bound->engine = std::make_unique<goslet::NativeEngine>(parts, goslet::NativeOptions{threads, pin, skip_zeros});
    return bound;
}

void feed_engine(BoundEngine& bound, const std::vector<SequenceTuple>& batch) {
    std::vector<goslet::Sequence> sequences;
    sequences.reserve(batch.size());
    const auto vocab_size = static_cast<py::ssize_t>(bound.engine->vocab_size());
    for (const auto& [state, tokens, logits] : batch) {
        if (state == nullptr || !py::isinstance<py::array_t<std::int64_t>>(tokens) || tokens.ndim() != 1 ||
            (tokens.flags() & py::array::c_style) == 0) {
            throw py::value_error("tokens must be one contiguous row of int64 beside a state");
        }
        goslet::Sequence sequence{state, static_cast<const std::int64_t*>(tokens.data()),
                                  static_cast<std::size_t>(tokens.size()), nullptr, false};
        if (logits.has_value()) {
            const bool every = logits->ndim() == 2 && logits->shape(0) == tokens.size();
            const bool last = logits->ndim() == 2 && logits->shape(0) == 1;
            if (!py::isinstance<py::array_t<float>>(*logits) || (!every && !last) || logits->shape(1) != vocab_size ||
                (logits->flags() & py::array::c_style) == 0) {
                throw py::value_error("logits must be contiguous float32, one row or one for each token");
            }
            // The array is the caller's own: pybind11 has no call that both checks for writability and is const.
            sequence.logits = static_cast<float*>(const_cast<py::array&>(*logits).mutable_data());
            sequence.all_logits = every;
        }
        sequences.push_back(sequence);
    }
    const WithoutGil release;
    bound.engine->feed(sequences);
}

void register_native_engine(py::module_& module) {
    static py::exception<goslet::EngineError> engine_error(module, "EngineError");
    py::register_exception_translator([](std::exception_ptr pending) {
        try {
            if (pending) {
                std::rethrow_exception(pending);
            }
        } catch (const goslet::EngineError& error) {
            const py::object args = py::make_tuple(error.what(), error.place, error.expected, error.found);
            PyErr_SetObject(engine_error.ptr(), args.ptr());
        }
    });
    py::class_<BoundEngine>(module, "NativeEngine", "An engine's program on its weights, and the threads that run it.")
        .def(py::init(&make_engine), "program"_a, "tensors"_a, "state"_a, "vocab_size"_a, "threads"_a, "pin"_a,
             "skip_zeros"_a)
        .def("feed", &feed_engine, "sequences"_a)
        .def_property_readonly("isa", [](const BoundEngine& bound) { return bound.engine->isa(); })
        .def_property_readonly("threads", [](const BoundEngine& bound) { return bound.engine->n_threads(); })
        .def_property_readonly("density", [](const BoundEngine& bound) {
            const goslet::NativeEngine::Density density = bound.engine->density();
            return std::make_pair(density.seen, density.active);
        });
    module.def("available_isas", [] {
        std::vector<std::string> names;
        for (const goslet::Isa isa : goslet::available_isas()) {
            names.emplace_back(goslet::isa_name(isa));
        }
        return names;
    });
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "The C++ parts of goslet; use them through goslet's own classes.";
    register_state_buffer(module);
    register_vocabulary_trie(module);
    register_nibbles(module);
    register_native_engine(module);
}
