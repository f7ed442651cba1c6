/* Threads that miss pages: a shared library, so that a Python process can hand its memory to a pager first. */
#include "common.h"
#include <pthread.h>

#define THREADS_MAX 64
#define GOLDEN 0x9E3779B97F4A7C15ul

struct share {
        char *base;
        const uint32_t *pages;
        size_t count;
        uint64_t *took_ns;
        size_t wrong;
};

static void *touch_share(void *argument)
{
        struct share *share = argument;

        for (size_t i = 0; i < share->count; i++) {
                volatile uint64_t *word = (volatile uint64_t *)(share->base + share->pages[i] * PAGE);
                uint64_t began = now_ns(), seen = *word;
                share->took_ns[i] = now_ns() - began;
                share->wrong += seen != (share->pages[i] + 1) * GOLDEN;
        }
        return NULL;
}

/* Visits pages, `each` by every thread, and stores how long each first access took. Page n must begin with
 * (n + 1) * GOLDEN. Returns the number of pages that did not, or -1. */
long touch(char *base, const uint32_t *pages, size_t each, int threads, uint64_t *took_ns)
{
        struct share shares[THREADS_MAX];
        pthread_t ids[THREADS_MAX];
        long wrong = 0;

        if (threads < 1 || threads > THREADS_MAX)
                return -1;
        for (int i = 0; i < threads; i++) {
                shares[i] = (struct share){base, pages + (size_t)i * each, each, took_ns + (size_t)i * each, 0};
                if (pthread_create(&ids[i], NULL, touch_share, &shares[i]))
                        return -1;
        }
        for (int i = 0; i < threads; i++) {
                pthread_join(ids[i], NULL);
                wrong += (long)shares[i].wrong;
        }
        return wrong;
}
