// Loops that move memory and compute nothing: what a kernel is measured against. See bandwidth.py and roof.py.

#include <stdatomic.h>
#include <stddef.h>
#include <string.h>
#include <time.h>

#ifdef __SSE2__
#include <emmintrin.h>
int has_streaming_stores(void) { return 1; }
#else
int has_streaming_stores(void) { return 0; }
#endif

// Sizes and offsets are multiples of a line, and arrays are aligned to one.
enum { line = 64, ahead = 2048 };
typedef long long Line __attribute__((vector_size(line), may_alias));

// Non-temporal where `streams` says so.
static inline void put(char* p, Line value, int streams) {
#ifdef __SSE2__
    if (streams) {
        __m128i quarters[4];
        memcpy(quarters, &value, line);
        for (int i = 0; i < 4; ++i) _mm_stream_si128((__m128i*)p + i, quarters[i]);
        return;
    }
#endif
    *(Line*)p = value;
}

static inline void finish(void) {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

void copy(char* to, const char* from, size_t size) {
    for (size_t i = 0; i < size; i += line) put(to + i, *(const Line*)(from + i), 1);
    finish();
}

// -- the least traffic of a kernel -----------------------------------------------------------------------------

// Past the end of an array, too: a prefetch of any address will do.
static inline Line loaded(const char* p) {
    __builtin_prefetch(p + ahead, 0, 2);
    return *(const Line*)p;
}

static void read_only(char* const* arrays, int number, size_t from, size_t to) {
    static volatile long long kept;
    Line all = {0};
    for (int k = 0; k < number; ++k)
        for (size_t i = from; i < to; i += line) all ^= loaded(arrays[k] + i);
    kept = all[0] ^ all[1] ^ all[2] ^ all[3] ^ all[4] ^ all[5] ^ all[6] ^ all[7];
    (void)kept;
}

static inline __attribute__((always_inline)) void read_and_write(char* const* arrays, int reads, int writes,
                                                                 int streams, size_t from, size_t to) {
    for (size_t i = from; i < to; i += line) {
        Line value = loaded(arrays[0] + i);
        if (reads > 1) value ^= loaded(arrays[1] + i);
        put(arrays[reads] + i, value, streams);
        if (writes > 1) put(arrays[reads + 1] + i, value, streams);
    }
}

typedef void (*Pass)(char* const* arrays, size_t from, size_t to);
#define PASS(name, reads, writes, streams)                          \
    static void name(char* const* arrays, size_t from, size_t to) { \
        read_and_write(arrays, reads, writes, streams, from, to);   \
    }
PASS(one_to_one, 1, 1, 0)
PASS(one_to_one_streamed, 1, 1, 1)
PASS(two_to_one, 2, 1, 0)
PASS(two_to_one_streamed, 2, 1, 1)
PASS(two_to_two, 2, 2, 0)
PASS(two_to_two_streamed, 2, 2, 1)
static const Pass passes[2][2][2] = {{{one_to_one, one_to_one_streamed}, {NULL, NULL}},
                                     {{two_to_one, two_to_one_streamed}, {two_to_two, two_to_two_streamed}}};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

// All `threads` of them arrive before one leaves; they wait by spinning, which takes no time to end.
static void meet(atomic_int* arrived, int threads, int* met) {
    *met += threads;
    atomic_fetch_add(arrived, 1);
    while (atomic_load(arrived) < *met);
}

// Thread `number` of `threads`, each of which must call this, with an `arrived` of 0: its part of each of `repeats`
// times that the first `again` bytes of the first `looked` arrays are read, then all `size` bytes of each of the
// `reads` arrays, with writing as much to each of the `writes` arrays behind them. The first thread notes the seconds.
void traffic(char* const* arrays, int reads, int writes, int streams, int looked, size_t again, size_t size, int number,
             int threads, int repeats, double* seconds, atomic_int* arrived) {
    const size_t from = size / line * number / threads * line, to = size / line * (number + 1) / threads * line;
    const size_t share = again / line / threads * line;
    const Pass pass = passes[reads - 1][writes - 1][streams];
    int met = 0;
    for (int i = 0; i < repeats; ++i) {
        meet(arrived, threads, &met);
        const double start = now();
        read_only(arrays, looked, from, from + share < to ? from + share : to);
        pass(arrays, from, to);
        finish();
        meet(arrived, threads, &met);
        if (number == 0) seconds[i] = now() - start;
    }
}
