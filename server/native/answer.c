/* Answers a request for one page that has data: reads it from its file, and makes the frame that is sent. */
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "../../proto/native/lone_page.h"

#define EXPORT __attribute__((visibility("default")))

/* A region; `farfault_server.lanes.lone_answers` has the same. */
struct region {
    int64_t descriptor; /* below 0: not a file */
    uint64_t page_count;
    uint64_t page_bytes;
};

struct answered {
    uint64_t begin; /* of the frame, within the buffer */
    uint64_t frame_bytes;
    uint64_t priority;
    uint64_t read_us;
};

static uint64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

static int is_zero(const uint8_t *page, size_t page_bytes)
{
    return !page[0] && !memcmp(page, page + 1, page_bytes - 1);
}

/* The buffer holds LONE_BYTES_MAX and ANSWER_SLACK_MAX before and behind it. Returns 0 where it is no such request. */
EXPORT int farfault_answer(const struct region *regions, uint64_t region_count, uint64_t generation,
                           const uint8_t *message, uint64_t length, uint8_t *buffer, struct answered *answered)
{
    struct lone_request request;
    uint64_t started_us = now_us();
    if (!lone_request_read(message, length, &request) || request.region >= region_count)
        return 0;
    const struct region *region = &regions[request.region];
    if (region->descriptor < 0 || request.page >= region->page_count || region->page_bytes > LONE_BYTES_MAX)
        return 0;
    uint8_t *page = buffer + ANSWER_SLACK_MAX;
    off_t offset = (off_t)(request.page * region->page_bytes);
    if (pread((int)region->descriptor, page, region->page_bytes, offset) != (ssize_t)region->page_bytes)
        return 0;
    if (is_zero(page, region->page_bytes))
        return 0;
    answered->priority = request.priority;
    answered->read_us = now_us() - started_us;
    size_t frame_bytes;
    answered->begin =
        lone_answer_write(buffer, region->page_bytes, &request, generation, answered->read_us, &frame_bytes);
    answered->frame_bytes = frame_bytes;
    return 1;
}
