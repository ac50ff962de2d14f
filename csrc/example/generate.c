/* Writes text after a prompt with goslet's C interface.
 *
 *     usage: generate ENGINE PROMPT [TOKENS [TEMPERATURE [SEED]]]
 *
 * A temperature of 0 takes the likeliest token each time. The same arguments give the same text on the same machine.
 */
#include <errno.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "goslet.h"

/* No vocabulary's token is longer. */
#define MAX_TOKEN_BYTES 65536

/* A number from 0 to `high` that is the whole of `text`. */
static int parse_number(const char* text, double high, double* number) {
    char* end = NULL;
    errno = 0;
    *number = strtod(text, &end);
    return end != text && *end == '\0' && errno == 0 && *number >= 0 && *number <= high;
}

/* A number from 0 up to 1: the generator splitmix64 of Steele, Lea and Flood (2014). */
static double next_random(uint64_t* seed) {
    uint64_t bits = *seed += UINT64_C(0x9E3779B97F4A7C15);
    bits = (bits ^ (bits >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    bits = (bits ^ (bits >> 27)) * UINT64_C(0x94D049BB133111EB);
    bits ^= bits >> 31;
    return (double)(bits >> 11) * 0x1p-53;
}

static goslet_token likeliest(const float* logits, size_t n_logits) {
    size_t best = 0;
    for (size_t token = 1; token < n_logits; ++token) {
        if (logits[token] > logits[best]) {
            best = token;
        }
    }
    return (goslet_token)best;
}

static goslet_token sample(const float* logits, size_t n_logits, double temperature, uint64_t* seed) {
    const size_t best = (size_t)likeliest(logits, n_logits);
    if (temperature == 0) {
        return (goslet_token)best;
    }
    /* Relative to the likeliest token, so that nothing overflows. */
    double total = 0;
    for (size_t token = 0; token < n_logits; ++token) {
        total += exp((logits[token] - logits[best]) / temperature);
    }
    double left = next_random(seed) * total;
    for (size_t token = 0; token < n_logits; ++token) {
        left -= exp((logits[token] - logits[best]) / temperature);
        if (left < 0) {
            return (goslet_token)token;
        }
    }
    /* Rounding may leave a little. */
    return (goslet_token)best;
}

static int print_token(const goslet_engine* engine, goslet_token token) {
    static char bytes[MAX_TOKEN_BYTES];
    size_t n_bytes = 0;
    if (goslet_decode(engine, &token, 1, bytes, sizeof bytes, &n_bytes) != GOSLET_OK) {
        fprintf(stderr, "generate: %s\n", goslet_last_error());
        return 0;
    }
    if (fwrite(bytes, 1, n_bytes, stdout) != n_bytes || fflush(stdout) != 0) {
        perror("generate: standard output");
        return 0;
    }
    return 1;
}

/* Feeds the prompt and up to n_tokens sampled tokens, printing them as they come. */
static int generate(const goslet_engine* engine, goslet_session* session, const char* prompt, size_t n_tokens,
                    double temperature, uint64_t seed) {
    const size_t vocab_size = goslet_vocab_size(engine);
    const size_t capacity = strlen(prompt); /* a text never has more tokens than bytes */
    size_t n_prompt = 0;
    int ok = 0;
    goslet_token* const tokens = malloc(capacity * sizeof *tokens);
    float* const logits = malloc(vocab_size * sizeof *logits);
    if (tokens == NULL || logits == NULL) {
        fputs("generate: memory is short\n", stderr);
        goto done;
    }
    if (goslet_encode(engine, prompt, capacity, tokens, capacity, &n_prompt) != GOSLET_OK ||
        goslet_feed(session, tokens, n_prompt, logits) != GOSLET_OK) {
        fprintf(stderr, "generate: %s\n", goslet_last_error());
        goto done;
    }
    for (size_t i = 0; i < n_tokens; ++i) {
        const goslet_token token = sample(logits, vocab_size, temperature, &seed);
        if (token == goslet_end_token(engine)) {
            break;
        }
        if (!print_token(engine, token)) {
            goto done;
        }
        if (goslet_feed(session, &token, 1, logits) != GOSLET_OK) {
            fprintf(stderr, "generate: %s\n", goslet_last_error());
            goto done;
        }
    }
    ok = 1;
done:
    free(logits);
    free(tokens);
    return ok;
}

int main(int argc, char** argv) {
    double n_tokens = 64;
    double temperature = 0;
    double seed = 0;
    if (argc < 3 || argc > 6 || argv[2][0] == '\0' || (argc > 3 && !parse_number(argv[3], 1e9, &n_tokens)) ||
        (argc > 4 && !parse_number(argv[4], 100, &temperature)) || (argc > 5 && !parse_number(argv[5], 1e15, &seed))) {
        fputs("usage: generate ENGINE PROMPT [TOKENS [TEMPERATURE [SEED]]]\n", stderr);
        return 2;
    }
    goslet_engine* const engine = goslet_open(argv[1], NULL);
    if (engine == NULL) {
        fprintf(stderr, "generate: %s\n", goslet_last_error());
        return 1;
    }
    goslet_session* const session = goslet_session_new(engine);
    int ok = session != NULL;
    if (ok) {
        ok = generate(engine, session, argv[2], (size_t)n_tokens, temperature, (uint64_t)seed);
    } else {
        fprintf(stderr, "generate: %s\n", goslet_last_error());
    }
    goslet_session_free(session);
    goslet_close(engine);
    return ok ? 0 : 1;
}
