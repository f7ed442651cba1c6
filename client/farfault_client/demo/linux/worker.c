/*
 * The guest's memory worker: it verifies and rewrites its memory, for ever, and prints a hash of all that it read.
 *
 *     worker MIB FIRST LAST PAUSE_MS
 *
 * What it reads depends on MIB and the tick alone. So the same program, run on the host to the same tick, must print
 * the same line: a byte that a move changed, lost or took from another page changes every hash after it.
 *
 * MIB: memory in MiB. FIRST: the first tick that is printed. LAST: the last tick, 0 for ever. PAUSE_MS: sleep after
 * each tick. One line a tick: "T <tick> <hash, 16 hex digits> bad=<words found wrong so far>".
 */
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define GOLDEN UINT64_C(0x9E3779B97F4A7C15)

enum {
    WORDS_PER_PAGE = 512,
    PAGE_BYTES = WORDS_PER_PAGE * 8,
    RANDOM_PAGES_PER_TICK = 32, /* verified and rewritten */
    SWEPT_PAGES_PER_TICK = 32,  /* verified, one after the other through the memory */
    LINE_BYTES_MAX = 96,
    EXIT_USAGE = 2,
};

struct worker {
    uint64_t *words;
    uint32_t *versions; /* of each page: the tick that wrote it, 0 at first */
    uint64_t pages;
    uint64_t swept; /* next page of the sweep */
    uint64_t random;
    uint64_t hash;
    uint64_t bad;
};

static uint64_t mix(uint64_t value) /* splitmix64's finalizer: https://prng.di.unimi.it/splitmix64.c */
{
    value = (value ^ (value >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    value = (value ^ (value >> 27)) * UINT64_C(0x94D049BB133111EB);
    return value ^ (value >> 31);
}

static uint64_t next_random_page(struct worker *worker)
{
    worker->random += GOLDEN;
    return mix(worker->random) % worker->pages;
}

static uint64_t first_word(uint64_t page, uint32_t version)
{
    return mix((page << 32 | version) + GOLDEN);
}

static void write_page(struct worker *worker, uint64_t page, uint32_t version)
{
    uint64_t *word = worker->words + page * WORDS_PER_PAGE;
    uint64_t value = first_word(page, version);
    for (int i = 0; i < WORDS_PER_PAGE; i++, value += GOLDEN)
        word[i] = value;
    worker->versions[page] = version;
}

static void verify_page(struct worker *worker, uint64_t page)
{
    /* volatile: every word comes from memory, whatever the compiler knows about it. */
    const volatile uint64_t *word = worker->words + page * WORDS_PER_PAGE;
    uint64_t expected = first_word(page, worker->versions[page]);
    uint64_t hash = worker->hash;
    for (int i = 0; i < WORDS_PER_PAGE; i++, expected += GOLDEN) {
        uint64_t seen = word[i];
        worker->bad += seen != expected;
        hash = (hash << 5 | hash >> 59) * GOLDEN ^ seen;
    }
    worker->hash = hash;
}

static void run_tick(struct worker *worker, uint32_t tick)
{
    for (int i = 0; i < RANDOM_PAGES_PER_TICK; i++) {
        uint64_t page = next_random_page(worker);
        verify_page(worker, page);
        write_page(worker, page, tick);
    }
    for (int i = 0; i < SWEPT_PAGES_PER_TICK; i++) {
        verify_page(worker, worker->swept);
        worker->swept = (worker->swept + 1) % worker->pages;
    }
}

static int print_tick(const struct worker *worker, uint32_t tick)
{
    char line[LINE_BYTES_MAX];
    int length =
        snprintf(line, sizeof line, "T %" PRIu32 " %016" PRIx64 " bad=%" PRIu64 "\n", tick, worker->hash, worker->bad);
    /* One write a line: a terminal never mixes two of them. */
    return write(STDOUT_FILENO, line, (size_t)length) == length ? 0 : -1;
}

static void pause_ms(long ms)
{
    struct timespec rest = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
    nanosleep(&rest, NULL);
}

int main(int argc, char **argv)
{
    if (argc != 5) {
        fprintf(stderr, "usage: worker MIB FIRST LAST PAUSE_MS\n");
        return EXIT_USAGE;
    }
    struct worker worker = {.pages = strtoul(argv[1], NULL, 10) * (1 << 20) / PAGE_BYTES};
    uint32_t first = (uint32_t)strtoul(argv[2], NULL, 10);
    uint32_t last = (uint32_t)strtoul(argv[3], NULL, 10);
    long rest_ms = strtol(argv[4], NULL, 10);
    if (worker.pages == 0) {
        fprintf(stderr, "worker: MIB is at least 1\n");
        return EXIT_USAGE;
    }
    worker.words = aligned_alloc(PAGE_BYTES, worker.pages * PAGE_BYTES);
    worker.versions = calloc(worker.pages, sizeof *worker.versions);
    if (!worker.words || !worker.versions) {
        perror("worker: memory");
        return EXIT_FAILURE;
    }
    for (uint64_t page = 0; page < worker.pages; page++)
        write_page(&worker, page, 0);
    for (uint32_t tick = 1; last == 0 || tick <= last; tick++) {
        run_tick(&worker, tick);
        if (tick >= first && print_tick(&worker, tick))
            return EXIT_FAILURE;
        if (rest_ms > 0)
            pause_ms(rest_ms);
    }
    return EXIT_SUCCESS;
}
