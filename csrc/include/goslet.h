/* goslet's C interface: run an engine file (model.goslet) inside an application, without Python.
 *
 *     goslet_engine* engine = goslet_open("model.goslet", NULL);
 *     goslet_session* session = goslet_session_new(engine);
 *     if (session == NULL || goslet_feed(session, tokens, n_tokens, logits) != GOSLET_OK) {
 *         fprintf(stderr, "%s\n", goslet_last_error());
 *     }
 *     goslet_session_free(session);
 *     goslet_close(engine);
 *
 * An engine is a model whose weights are mapped from its file: they are shared between all processes that open it and
 * read when they are needed. A session is one conversation: a state of fixed size that every fed token moves on. The
 * file csrc/example/generate.c is a complete program.
 *
 * Errors. Functions that return goslet_status return GOSLET_OK or why they failed; those that return a pointer return
 * NULL. Then goslet_last_status() and goslet_last_error() tell this thread what was wrong. Whenever a call fails,
 * sessions and files are as they were before it, and what it writes to is not to be read, save where it is said here.
 * NULL where a handle or a result is needed is GOSLET_INVALID_ARGUMENT, never a crash. Handles that were freed, and
 * arrays shorter than their sizes say, cannot be noticed.
 *
 * Threads. Every function may be called from any thread. An engine may be used by several threads at once, and so may
 * different sessions of one engine: with one compute thread they run in parallel, with more they take turns at the
 * engine's team. A session is for one thread at a time: a call on a session that is within another call fails with
 * GOSLET_BUSY and changes nothing. Functions that free a handle must be the last ones that use it.
 *
 * Processes. An engine belongs to the process that opened it. In a child of fork(), feeding fails with
 * GOSLET_WRONG_PROCESS: open the file again there, which costs no further memory for the weights.
 *
 * Files. Lengths, layouts and checksums of an engine file are checked when it is opened, except for the checksum of its
 * weights, which `goslet inspect --check` verifies. Nothing in a file is ever run as code. Do not shorten a file in
 * place while it is open: reading a mapped file past its end kills a process. goslet itself replaces files by renaming,
 * which is safe.
 *
 * Compatibility. Until version 1.0 an interface may change with the second number of the version. Structures begin with
 * their size, so that they can grow.
 */
#ifndef GOSLET_H
#define GOSLET_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define GOSLET_API __attribute__((visibility("default")))
#else
#define GOSLET_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The version of this header; goslet_version() is that of the library. */
#define GOSLET_VERSION "0.1.0"

typedef enum goslet_status {
    GOSLET_OK = 0,
    GOSLET_INVALID_ARGUMENT = 1, /* NULL, a token outside the vocabulary, no tokens, a session given twice, … */
    GOSLET_BUSY = 2,             /* the session is within another call */
    GOSLET_CANNOT_READ = 3,      /* the file is missing, is no ordinary file or may not be read */
    GOSLET_CANNOT_WRITE = 4,     /* the folder is missing or read-only, the disk is full, … */
    GOSLET_BAD_FILE = 5,         /* the file is damaged, or is not such a file */
    GOSLET_UNSUPPORTED = 6,      /* the file is of another goslet, or asks for what the native engine cannot do */
    GOSLET_MISMATCH = 7,         /* the state belongs to another model */
    GOSLET_NOT_FINITE = 8,       /* the state holds NaN or infinity */
    GOSLET_BUFFER_TOO_SMALL = 9, /* the result needs more room; how much was stored */
    GOSLET_OUT_OF_MEMORY = 10,
    GOSLET_WRONG_PROCESS = 11, /* the engine was opened before a fork() */
    GOSLET_FAILED = 12         /* anything else, such as threads that cannot be started */
} goslet_status;

/* An id of the vocabulary. */
typedef int64_t goslet_token;

typedef struct goslet_engine goslet_engine;
typedef struct goslet_session goslet_session;

/* How an engine is opened. Begin with GOSLET_OPTIONS_INIT, which is the defaults:
 *     goslet_options options = GOSLET_OPTIONS_INIT;
 *     options.threads = 4;
 */
typedef struct goslet_options {
    size_t size;      /* sizeof(goslet_options) */
    uint32_t threads; /* compute threads, the calling one included, up to 1024; 0 takes one for each core */
    int32_t pin;      /* not 0: bind each of the other compute threads to a CPU of its own (Linux) */
} goslet_options;

#define GOSLET_OPTIONS_INIT {sizeof(goslet_options), 0, 0}

/* ---------------------------------------------------------------------------------------------------------- errors */

/* The library's version, such as "0.1.0". */
GOSLET_API const char* goslet_version(void);

/* Why the last call that failed on this thread failed; GOSLET_OK before there was one. Calls that succeed leave it. */
GOSLET_API goslet_status goslet_last_status(void);

/* The same in words: one line of UTF-8 that names the file and the place in it. Never NULL, empty before there was a
 * failure, and good until the next call that fails on this thread. */
GOSLET_API const char* goslet_last_error(void);

/* --------------------------------------------------------------------------------------------------------- engines */

/* Opens an engine file. `options` may be NULL for the defaults. NULL where it fails.
 *
 * The kernels are the best that this CPU runs, or those that the environment variable GOSLET_ISA names. */
GOSLET_API goslet_engine* goslet_open(const char* path, const goslet_options* options);

/* Frees the handle; NULL is allowed. What sessions need of the engine lives until the last of them is freed. */
GOSLET_API void goslet_close(goslet_engine* engine);

/* The number of ids and of logits; 0 for NULL. */
GOSLET_API size_t goslet_vocab_size(const goslet_engine* engine);

/* The memory that the state of one session takes, whatever was fed to it; 0 for NULL. */
GOSLET_API size_t goslet_state_size_bytes(const goslet_engine* engine);

/* The instruction set of the kernels, such as "avx2". Good while the process lives; NULL for NULL. */
GOSLET_API const char* goslet_isa(const goslet_engine* engine);

/* 64 hex digits that are the same for every quantization of a model; states are exchanged between engines that have
 * the same. Good until goslet_close; NULL for NULL. */
GOSLET_API const char* goslet_model_id(const goslet_engine* engine);

/* -------------------------------------------------------------------------------------------------------- sessions */

/* A session with a fresh state; NULL where it fails. */
GOSLET_API goslet_session* goslet_session_new(goslet_engine* engine);

/* A session of its own that goes on from the same state; NULL where it fails. */
GOSLET_API goslet_session* goslet_session_fork(goslet_session* session);

/* Frees a session that is within no call; NULL is allowed. */
GOSLET_API void goslet_session_free(goslet_session* session);

/* Goes back to the fresh state. */
GOSLET_API goslet_status goslet_session_reset(goslet_session* session);

/* The tokens fed since the state was fresh; -1 where it fails. */
GOSLET_API int64_t goslet_session_tokens_seen(goslet_session* session);

/* Feeds tokens (n_tokens), at least one, and stores the logits after the last one: (vocab_size), or NULL for none.
 * Feeding a text whole is much faster than token by token and gives the same state to the kernels' rounding. */
GOSLET_API goslet_status goslet_feed(goslet_session* session, const goslet_token* tokens, size_t n_tokens,
                                     float* logits);

/* Feeds tokens (n_tokens), at least one, and stores the logits after each: (n_tokens, vocab_size). */
GOSLET_API goslet_status goslet_feed_all(goslet_session* session, const goslet_token* tokens, size_t n_tokens,
                                         float* logits);

/* Feeds each of n_sessions different sessions of one engine one token, which costs much less than feeding them one
 * after another. tokens (n_sessions); logits (n_sessions, vocab_size), or NULL for none. If one session is busy, none
 * is fed. */
GOSLET_API goslet_status goslet_step_batch(goslet_session* const* sessions, const goslet_token* tokens,
                                           size_t n_sessions, float* logits);

/* Writes the state to a file, which goslet's Python package reads too. An existing file is replaced once the new one is
 * whole and on the disk. A state that holds NaN or infinity is not written. */
GOSLET_API goslet_status goslet_session_save(goslet_session* session, const char* path);

/* Takes the state from a file that an engine of the same model wrote, whatever its quantization. */
GOSLET_API goslet_status goslet_session_load(goslet_session* session, const char* path);

/* ------------------------------------------------------------------------------------------------------------ text */

/* Engines with a vocabulary in the World format or raw bytes can encode and decode; for engines with another tokenizer,
 * or none, both functions fail with GOSLET_UNSUPPORTED, and the application brings token ids of its own. */

/* The tokens of a text, which need not end with NUL. `tokens` has room for `capacity` ids and may be NULL where that is
 * 0; *n_tokens becomes the number of ids. If that exceeds `capacity`, none is stored and the call fails with
 * GOSLET_BUFFER_TOO_SMALL. A text never has more ids than bytes. The World vocabulary has ids for any bytes; where a
 * smaller one has none for some, the call fails with GOSLET_INVALID_ARGUMENT, and the message names the byte. */
GOSLET_API goslet_status goslet_encode(const goslet_engine* engine, const char* text, size_t text_bytes,
                                       goslet_token* tokens, size_t capacity, size_t* n_tokens);

/* The bytes of tokens (n_tokens), without a NUL behind them. `text` has room for `capacity` bytes and may be NULL where
 * that is 0; *n_bytes becomes their number. If that exceeds `capacity`, none is stored and the call fails with
 * GOSLET_BUFFER_TOO_SMALL. A token may end within a UTF-8 character, which the next ones then complete. Ids of the
 * model that stand for nothing have no bytes. */
GOSLET_API goslet_status goslet_decode(const goslet_engine* engine, const goslet_token* tokens, size_t n_tokens,
                                       char* text, size_t capacity, size_t* n_bytes);

/* The token that ends a document, 0 in RWKV's vocabularies; -1 where there is none or it is not known. */
GOSLET_API goslet_token goslet_end_token(const goslet_engine* engine);

#ifdef __cplusplus
}
#endif

#endif /* GOSLET_H */
