// The C interface, include/goslet.h: checks, translates exceptions, and keeps sessions apart.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <fstream>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sched.h>
#endif

#include "container.h"
#include "engine_file.h"
#include "goslet.h"
#include "native_engine.h"
#include "state_file.h"
#include "vocabulary_trie.h"

namespace {

using goslet::ContainerError;
using goslet::EngineError;
using goslet::EngineFile;
using goslet::NativeEngine;
using goslet::NativeOptions;
using goslet::Sequence;
using goslet::StateBuffer;
using goslet::VocabularyTrie;

static_assert(sizeof(goslet_token) == sizeof(std::int64_t), "tokens are handed on in place");

constexpr std::size_t kMaxMessageBytes = 2048;
constexpr std::size_t kMaxThreads = 1024;
constexpr std::size_t kBytesVocabulary = 256;
constexpr std::uint32_t kWorldVocabulary = 65536;
constexpr std::uint32_t kWorldLastId = 65529;

// Fixed, so that reporting a failure cannot fail.
thread_local goslet_status last_status = GOSLET_OK;
thread_local char last_message[kMaxMessageBytes] = "";

goslet_status fail(goslet_status status, const char* subject, const char* message) noexcept {
    last_status = status;
    std::snprintf(last_message, sizeof last_message, "%s%s%s", subject, *subject == '\0' ? "" : ": ", message);
    return status;
}

// What a function of this file throws to fail with a status of its own.
class Failure : public std::runtime_error {
  public:
    Failure(goslet_status status, const std::string& message) : std::runtime_error(message), status(status) {}
    goslet_status status;
};

[[noreturn]] void refuse(const std::string& message) {
    throw Failure(GOSLET_INVALID_ARGUMENT, message);
}

goslet_status status_of(ContainerError::Kind kind) {
    switch (kind) {
        case ContainerError::Kind::kUnreadable:
            return GOSLET_CANNOT_READ;
        case ContainerError::Kind::kDamaged:
            return GOSLET_BAD_FILE;
        case ContainerError::Kind::kUnsupported:
            return GOSLET_UNSUPPORTED;
        case ContainerError::Kind::kMismatch:
            return GOSLET_MISMATCH;
        case ContainerError::Kind::kUnwritable:
            return GOSLET_CANNOT_WRITE;
        case ContainerError::Kind::kNotFinite:
            return GOSLET_NOT_FINITE;
    }
    return GOSLET_FAILED;
}

// Runs `body`, a call of `function`, and makes a status of whatever it throws. Where a file is the cause, messages
// begin with its name and not the function's.
template <typename Body>
goslet_status guarded(const char* function, const char* path, const Body& body) noexcept {
    const char* const file = path == nullptr ? function : path;
    try {
        body();
        return GOSLET_OK;
    } catch (const Failure& error) {
        return fail(error.status, error.status == GOSLET_BAD_FILE ? file : function, error.what());
    } catch (const ContainerError& error) {
        return fail(status_of(error.kind), file, error.what());
    } catch (const EngineError& error) {
        try {
            return fail(GOSLET_BAD_FILE, file,
                        goslet::error_message(error.what(), error.place, error.expected, error.found).c_str());
        } catch (const std::bad_alloc&) {
            return fail(GOSLET_BAD_FILE, file, error.what());
        }
    } catch (const goslet::VocabularyError& error) {
        return fail(GOSLET_BAD_FILE, file, error.what());
    } catch (const std::invalid_argument& error) {
        return fail(GOSLET_INVALID_ARGUMENT, function, error.what());
    } catch (const std::bad_alloc&) {
        return fail(GOSLET_OUT_OF_MEMORY, function, "memory is short");
    } catch (const std::length_error& error) {
        return fail(GOSLET_OUT_OF_MEMORY, function, error.what());
    } catch (const std::exception& error) {
        return fail(GOSLET_FAILED, function, error.what());
    } catch (...) {
        return fail(GOSLET_FAILED, function, "an unknown exception");
    }
}

template <typename Body>
goslet_status guarded(const char* function, const Body& body) noexcept {
    return guarded(function, nullptr, body);
}

// CPU cores that this process may use; two threads of one core count once. As runtime/machine.py.
std::size_t available_cores() {
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        std::set<std::string> cores;
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
            if (CPU_ISSET(cpu, &set)) {
                const std::string number = std::to_string(cpu);
                std::ifstream file("/sys/devices/system/cpu/cpu" + number + "/topology/thread_siblings_list");
                std::string siblings;
                cores.insert(std::getline(file, siblings) ? siblings : "cpu" + number);
            }
        }
        return std::max<std::size_t>(1, cores.size());
    }
#endif
    return std::max(1U, std::thread::hardware_concurrency());
}

NativeOptions native_options(const goslet_options* given) {
    goslet_options options = GOSLET_OPTIONS_INIT;
    if (given != nullptr) {
        // A newer application may know of more options than this library, which can only be left at their defaults.
        if (given->size < sizeof options) {
            refuse("options.size is " + std::to_string(given->size) + ", not " + std::to_string(sizeof options) +
                   "; begin with GOSLET_OPTIONS_INIT");
        }
        const auto* const bytes = reinterpret_cast<const unsigned char*>(given);
        for (std::size_t i = sizeof options; i < given->size; ++i) {
            if (bytes[i] != 0) {
                throw Failure(GOSLET_UNSUPPORTED, "an option is set that this version of goslet does not know");
            }
        }
        options = *given;
    }
    if (options.threads > kMaxThreads) {
        refuse("options.threads is " + std::to_string(options.threads) + ", not 0 to " + std::to_string(kMaxThreads));
    }
    NativeOptions native;
    native.n_threads = options.threads == 0 ? std::min(available_cores(), kMaxThreads) : options.threads;
    native.pin = options.pin != 0;
    return native;
}

// As the tokenizers of runtime/tokenizer.py check themselves.
void check_world(const VocabularyTrie& trie) {
    bool is_world = trie.vocab_size() == kWorldVocabulary && trie.n_entries() == kWorldLastId;
    for (std::uint32_t id = kWorldLastId + 1; is_world && id < kWorldVocabulary; ++id) {
        is_world = trie.token_bytes(id).empty();
    }
    if (!is_world || !trie.token_bytes(0).empty()) {
        throw Failure(GOSLET_BAD_FILE, "tokenizer: is not a World vocabulary");
    }
    for (int byte = 0; byte < 256; ++byte) {
        const char text = static_cast<char>(byte);
        if (trie.encode({&text, 1}).matched_bytes == 0) {
            throw Failure(GOSLET_BAD_FILE, "tokenizer: has no token for the byte " + std::to_string(byte));
        }
    }
}

// The vocabulary of byte strings of an engine, if it has one.
std::optional<VocabularyTrie> read_vocabulary(const EngineFile& file) {
    std::size_t vocab_size = 0;
    std::optional<VocabularyTrie> trie;
    if (file.tokenizer_kind() == "world") {
        trie = VocabularyTrie::from_blob(file.tokenizer());
        check_world(*trie);
        vocab_size = kWorldVocabulary;
    } else if (file.tokenizer_kind() == "trie") {
        trie = VocabularyTrie::from_blob(file.tokenizer());
        vocab_size = trie->vocab_size();
    } else if (file.tokenizer_kind() == "bytes") {
        vocab_size = kBytesVocabulary;
        if (!file.tokenizer().empty()) {
            throw Failure(GOSLET_BAD_FILE, "tokenizer: should be empty");
        }
    } else if (!file.tokenizer_kind().empty() && file.tokenizer_kind() != "hf") {
        throw ContainerError(ContainerError::Kind::kUnsupported, "is of an unknown kind; install a newer goslet",
                             "tokenizer", "bytes, hf, trie or world", goslet::shown(file.tokenizer_kind()));
    }
    if (vocab_size > file.vocab_size()) {
        throw Failure(GOSLET_BAD_FILE, "tokenizer: has " + std::to_string(vocab_size) + " ids, more than the model's " +
                                           std::to_string(file.vocab_size()));
    }
    return trie;
}

// What engine handles and sessions share.
struct SharedEngine {
    SharedEngine(const char* path, const NativeOptions& options)
        : file(path),
          vocabulary(read_vocabulary(file)),
          native(file.parts(), options),
          fresh(file.fresh_state()),
          process(getpid()) {}

    EngineFile file;
    std::optional<VocabularyTrie> vocabulary;
    NativeEngine native;
    std::unique_ptr<StateBuffer> fresh;
    pid_t process;
};

}  // namespace

struct goslet_engine {
    std::shared_ptr<SharedEngine> shared;
};

struct goslet_session {
    explicit goslet_session(std::shared_ptr<SharedEngine> engine)
        : engine(std::move(engine)), state(this->engine->native.state_layout()) {
        state.copy_from(*this->engine->fresh);
    }

    std::shared_ptr<SharedEngine> engine;
    StateBuffer state;
    std::atomic<bool> busy{false};
};

namespace {

// A call's hold on a session, which no other call has.
class Hold {
  public:
    explicit Hold(goslet_session& session) : session_(&session) {
        if (session.busy.exchange(true, std::memory_order_acquire)) {
            throw Failure(GOSLET_BUSY, "the session is within another call");
        }
    }
    Hold(Hold&& other) noexcept : session_(std::exchange(other.session_, nullptr)) {}
    Hold& operator=(Hold&&) = delete;
    ~Hold() {
        if (session_ != nullptr) {
            session_->busy.store(false, std::memory_order_release);
        }
    }

  private:
    goslet_session* session_;
};

template <typename T>
void require(const T* pointer, const char* name) {
    if (pointer == nullptr) {
        refuse(std::string(name) + " is NULL");
    }
}

void require_process(const SharedEngine& engine) {
    if (getpid() != engine.process) {
        throw Failure(GOSLET_WRONG_PROCESS, "the engine was opened by another process; open it again after fork()");
    }
}

void feed(goslet_session* session, const goslet_token* tokens, std::size_t n_tokens, float* logits, bool all_logits) {
    require(session, "session");
    require(tokens, "tokens");
    require_process(*session->engine);
    session->engine->file.check_whole();
    const Hold hold(*session);
    session->engine->native.feed({{&session->state, tokens, n_tokens, logits, all_logits}});
}

const VocabularyTrie* text_vocabulary(const EngineFile& file, const std::optional<VocabularyTrie>& vocabulary) {
    if (vocabulary.has_value()) {
        return &*vocabulary;
    }
    const std::string& kind = file.tokenizer_kind();
    if (kind != "bytes") {
        throw Failure(GOSLET_UNSUPPORTED, kind.empty()
                                              ? "the engine has no tokenizer and takes token ids only"
                                              : "the engine's tokenizer of kind " + kind + " is not available in C");
    }
    return nullptr;
}

}  // namespace

extern "C" {

const char* goslet_version(void) {
    return GOSLET_VERSION;
}

goslet_status goslet_last_status(void) {
    return last_status;
}

const char* goslet_last_error(void) {
    return last_message;
}

goslet_engine* goslet_open(const char* path, const goslet_options* options) {
    goslet_engine* engine = nullptr;
    guarded("goslet_open", path, [&] {
        require(path, "path");
        engine = new goslet_engine{std::make_shared<SharedEngine>(path, native_options(options))};
    });
    return engine;
}

void goslet_close(goslet_engine* engine) {
    delete engine;
}

size_t goslet_vocab_size(const goslet_engine* engine) {
    std::size_t size = 0;
    guarded("goslet_vocab_size", [&] {
        require(engine, "engine");
        size = engine->shared->file.vocab_size();
    });
    return size;
}

size_t goslet_state_size_bytes(const goslet_engine* engine) {
    std::size_t size_bytes = 0;
    guarded("goslet_state_size_bytes", [&] {
        require(engine, "engine");
        size_bytes = engine->shared->file.state_spec().size_bytes();
    });
    return size_bytes;
}

const char* goslet_isa(const goslet_engine* engine) {
    const char* isa = nullptr;
    guarded("goslet_isa", [&] {
        require(engine, "engine");
        isa = engine->shared->native.isa();
    });
    return isa;
}

const char* goslet_model_id(const goslet_engine* engine) {
    const char* id = nullptr;
    guarded("goslet_model_id", [&] {
        require(engine, "engine");
        id = engine->shared->file.model_id().c_str();
    });
    return id;
}

goslet_session* goslet_session_new(goslet_engine* engine) {
    goslet_session* session = nullptr;
    guarded("goslet_session_new", [&] {
        require(engine, "engine");
        session = new goslet_session(engine->shared);
    });
    return session;
}

goslet_session* goslet_session_fork(goslet_session* session) {
    goslet_session* twin = nullptr;
    guarded("goslet_session_fork", [&] {
        require(session, "session");
        const Hold hold(*session);
        auto made = std::make_unique<goslet_session>(session->engine);
        made->state.copy_from(session->state);
        twin = made.release();
    });
    return twin;
}

void goslet_session_free(goslet_session* session) {
    delete session;
}

goslet_status goslet_session_reset(goslet_session* session) {
    return guarded("goslet_session_reset", [&] {
        require(session, "session");
        const Hold hold(*session);
        session->state.copy_from(*session->engine->fresh);
    });
}

int64_t goslet_session_tokens_seen(goslet_session* session) {
    std::int64_t count = -1;
    guarded("goslet_session_tokens_seen", [&] {
        require(session, "session");
        const Hold hold(*session);
        count = goslet::tokens_seen(session->state);
    });
    return count;
}

goslet_status goslet_feed(goslet_session* session, const goslet_token* tokens, size_t n_tokens, float* logits) {
    return guarded("goslet_feed", [&] { feed(session, tokens, n_tokens, logits, false); });
}

goslet_status goslet_feed_all(goslet_session* session, const goslet_token* tokens, size_t n_tokens, float* logits) {
    return guarded("goslet_feed_all", [&] {
        require(logits, "logits");
        feed(session, tokens, n_tokens, logits, true);
    });
}

goslet_status goslet_step_batch(goslet_session* const* sessions, const goslet_token* tokens, size_t n_sessions,
                                float* logits) {
    return guarded("goslet_step_batch", [&] {
        require(sessions, "sessions");
        require(tokens, "tokens");
        if (n_sessions == 0) {
            refuse("there are no sessions");
        }
        for (std::size_t i = 0; i < n_sessions; ++i) {
            require(sessions[i], "a session");
        }
        // A session that is given twice would otherwise look busy.
        std::vector<goslet_session*> sorted(sessions, sessions + n_sessions);
        std::sort(sorted.begin(), sorted.end(), std::less<>());
        if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) {
            refuse("a session is given twice");
        }
        const std::shared_ptr<SharedEngine>& engine = sessions[0]->engine;
        require_process(*engine);
        engine->file.check_whole();
        std::vector<Sequence> batch;
        for (std::size_t i = 0; i < n_sessions; ++i) {
            if (sessions[i]->engine != engine) {
                refuse("the sessions are of different engines");
            }
            batch.push_back({&sessions[i]->state, tokens + i, 1,
                             logits == nullptr ? nullptr : logits + i * engine->file.vocab_size(), false});
        }
        std::vector<Hold> holds;
        holds.reserve(n_sessions);
        for (std::size_t i = 0; i < n_sessions; ++i) {
            holds.emplace_back(*sessions[i]);
        }
        engine->native.feed(batch);
    });
}

goslet_status goslet_session_save(goslet_session* session, const char* path) {
    return guarded("goslet_session_save", path, [&] {
        require(session, "session");
        require(path, "path");
        const Hold hold(*session);
        const EngineFile& file = session->engine->file;
        goslet::save_state(path, file.model_id(), file.state_spec(), session->state);
    });
}

goslet_status goslet_session_load(goslet_session* session, const char* path) {
    return guarded("goslet_session_load", path, [&] {
        require(session, "session");
        require(path, "path");
        const Hold hold(*session);
        const EngineFile& file = session->engine->file;
        goslet::load_state(path, file.model_id(), file.state_spec(), session->state);
    });
}

goslet_status goslet_encode(const goslet_engine* engine, const char* text, size_t text_bytes, goslet_token* tokens,
                            size_t capacity, size_t* n_tokens) {
    return guarded("goslet_encode", [&] {
        require(engine, "engine");
        require(n_tokens, "n_tokens");
        if ((text == nullptr && text_bytes != 0) || (tokens == nullptr && capacity != 0)) {
            refuse("text or tokens is NULL");
        }
        *n_tokens = 0;
        const std::string_view bytes(text_bytes == 0 ? "" : text, text_bytes);
        const VocabularyTrie* const trie = text_vocabulary(engine->shared->file, engine->shared->vocabulary);
        std::vector<std::uint32_t> ids;
        if (trie != nullptr) {
            VocabularyTrie::Encoding encoding = trie->encode(bytes);
            if (encoding.matched_bytes < bytes.size()) {
                const auto byte = static_cast<unsigned char>(bytes[encoding.matched_bytes]);
                refuse("text, byte " + std::to_string(encoding.matched_bytes) + ", is " + std::to_string(byte) +
                       ", with which no token of the vocabulary begins");
            }
            ids = std::move(encoding.ids);
        } else {
            for (const char c : bytes) {
                ids.push_back(static_cast<unsigned char>(c));
            }
        }
        *n_tokens = ids.size();
        if (ids.size() > capacity) {
            throw Failure(GOSLET_BUFFER_TOO_SMALL, "the text has " + std::to_string(ids.size()) + " tokens, and " +
                                                       std::to_string(capacity) + " fit");
        }
        std::copy(ids.begin(), ids.end(), tokens);
    });
}

goslet_status goslet_decode(const goslet_engine* engine, const goslet_token* tokens, size_t n_tokens, char* text,
                            size_t capacity, size_t* n_bytes) {
    return guarded("goslet_decode", [&] {
        require(engine, "engine");
        require(n_bytes, "n_bytes");
        if ((tokens == nullptr && n_tokens != 0) || (text == nullptr && capacity != 0)) {
            refuse("tokens or text is NULL");
        }
        *n_bytes = 0;
        const VocabularyTrie* const trie = text_vocabulary(engine->shared->file, engine->shared->vocabulary);
        const std::size_t known = trie == nullptr ? kBytesVocabulary : trie->vocab_size();
        const std::size_t vocab_size = engine->shared->file.vocab_size();
        std::string bytes;
        for (std::size_t i = 0; i < n_tokens; ++i) {
            if (tokens[i] < 0 || static_cast<std::uint64_t>(tokens[i]) >= vocab_size) {
                refuse("token " + std::to_string(i) + " is " + std::to_string(tokens[i]) +
                       ", outside the model's vocabulary of " + std::to_string(vocab_size));
            }
            if (static_cast<std::uint64_t>(tokens[i]) >= known) {
                continue;  // a row of the model that the tokenizer has no text for
            }
            if (trie == nullptr) {
                bytes += static_cast<char>(tokens[i]);
            } else {
                bytes += trie->token_bytes(static_cast<std::uint32_t>(tokens[i]));
            }
        }
        *n_bytes = bytes.size();
        if (bytes.size() > capacity) {
            throw Failure(GOSLET_BUFFER_TOO_SMALL, "the tokens have " + std::to_string(bytes.size()) + " bytes, and " +
                                                       std::to_string(capacity) + " fit");
        }
        std::copy(bytes.begin(), bytes.end(), text);
    });
}

goslet_token goslet_end_token(const goslet_engine* engine) {
    goslet_token token = -1;
    guarded("goslet_end_token", [&] {
        require(engine, "engine");
        const std::optional<VocabularyTrie>& trie = engine->shared->vocabulary;
        token = trie.has_value() && trie->token_bytes(0).empty() ? 0 : -1;
    });
    return token;
}

}  // extern "C"
