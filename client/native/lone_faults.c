/*
 * First hand at a fault: what must happen before the thread that misses a page goes on, and nothing else.
 *
 * A fault costs its thread two turns of the receiver: one sends a request, the other puts the page that came into
 * memory. For the commonest case (one thread, one page that nobody has asked for) what the fault engine will decide is
 * known beforehand, so both are done here, and the engine is told at once, in the same turn of the event loop. All
 * else is left to it. Nothing is decided here that another thread could contradict: the receiver has only one that
 * changes pages.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "../../proto/native/lone_page.h"

#define EXPORT __attribute__((visibility("default")))

enum {
    EVENTS_MAX = 1024,   /* read in one go */
    TAKEN_MAX = 64,      /* faults of one go that are requested here */
    EXPECTED_MAX = 1024, /* requests whose answers are known again; the oldest give way */
    THREADS_MAX = 4096,  /* that are known as vCPUs */
};

/* farfault_client.receive.lone_faults has these structures too. */
struct region {
    uint64_t base_hva;    /* where threads miss its pages */
    uint64_t install_hva; /* where they are put */
    uint64_t first_page;  /* flat */
    uint64_t page_count;
    uint64_t page_bytes;
};

struct config {
    uint8_t *states; /* a byte a page, then one that says that the lock is wanted; NULL: nobody keeps any */
    uint64_t page_count;
    int64_t uffd;         /* whose events are read; below 0: none */
    int64_t install_uffd; /* below 0: pages are not put anywhere */
    int64_t lock;         /* descriptor of a POSIX record lock; below 0: none */
    uint64_t absent;      /* state of a page that nobody has asked for */
    uint64_t in_flight;   /* state of one that is awaited, above `state_shift` bits of priority */
    uint64_t state_shift;
    uint64_t priority_vcpu;
    uint64_t priority_vmm;
};

struct fault {
    uint64_t page;
    uint64_t thread;
};

struct taken {
    uint64_t count;       /* faults that are requested in `frames` */
    uint64_t frame_bytes;
    uint64_t rest_at;     /* events that are left, within `events` */
    uint64_t event_bytes; /* in all */
    struct fault faults[TAKEN_MAX];
    uint8_t frames[TAKEN_MAX * REQUEST_FRAME_MAX];
    struct uffd_msg events[EVENTS_MAX];
};

struct came {
    uint64_t request_id;
    uint64_t page; /* flat */
    uint64_t end;  /* of the frame */
    uint64_t data_at;
    uint64_t queue_us;
    uint64_t read_us;
};

struct expected {
    struct lone_request request; /* id 0: none */
    const struct region *region;
    uint64_t generation;
};

struct lone_faults {
    struct config config;
    struct expected expected[EXPECTED_MAX];
    uint32_t threads[THREADS_MAX]; /* of vCPUs */
    size_t thread_count;
    size_t region_count;
    struct region regions[];
};

EXPORT void farfault_lone_free(struct lone_faults *lone)
{
    free(lone);
}

EXPORT struct lone_faults *farfault_lone_new(const struct config *config, const struct region *regions,
                                             uint64_t region_count)
{
    struct lone_faults *lone = calloc(1, sizeof(*lone) + region_count * sizeof(*regions));
    if (!lone)
        return NULL;
    lone->config = *config;
    lone->region_count = region_count;
    memcpy(lone->regions, regions, region_count * sizeof(*regions));
    return lone;
}

/* Names the threads that are vCPUs; those over THREADS_MAX are not known as such. */
EXPORT void farfault_lone_threads(struct lone_faults *lone, const uint32_t *threads, uint64_t count)
{
    lone->thread_count = count < THREADS_MAX ? count : THREADS_MAX;
    memcpy(lone->threads, threads, lone->thread_count * sizeof(*threads));
}

/* No answer is expected any more: the connection that would have brought them has ended. */
EXPORT void farfault_lone_forget(struct lone_faults *lone)
{
    memset(lone->expected, 0, sizeof(lone->expected));
}

static int is_vcpu(const struct lone_faults *lone, uint32_t thread)
{
    for (size_t index = 0; index < lone->thread_count; index++)
        if (lone->threads[index] == thread)
            return 1;
    return 0;
}

static const struct region *region_of_page(const struct lone_faults *lone, uint64_t page)
{
    for (size_t index = 0; index < lone->region_count; index++)
        if (page - lone->regions[index].first_page < lone->regions[index].page_count)
            return &lone->regions[index];
    return NULL;
}

static const struct region *region_of_address(const struct lone_faults *lone, uint64_t address)
{
    for (size_t index = 0; index < lone->region_count; index++) {
        const struct region *region = &lone->regions[index];
        if (address - region->base_hva < region->page_count * region->page_bytes)
            return region;
    }
    return NULL;
}

/* Writes a request and remembers it. Returns its length. */
static size_t request(struct lone_faults *lone, const struct region *region, uint64_t page, uint64_t id,
                      uint64_t priority, uint64_t generation, uint8_t *frame)
{
    struct expected *expected = &lone->expected[id % EXPECTED_MAX];
    uint64_t number = (uint64_t)(region - lone->regions);
    expected->request = (struct lone_request){id, priority, number, page - region->first_page};
    expected->region = region;
    expected->generation = generation;
    return lone_request_write(frame, &expected->request);
}

/*
 * The frame of a request for a page that nobody has asked for (REQUEST_FRAME_MAX at most). Returns its length; 0: it is
 * no such page, or a large one.
 */
EXPORT uint64_t farfault_lone_request(struct lone_faults *lone, uint64_t page, uint64_t id, uint64_t priority,
                                      uint64_t generation, uint8_t *frame)
{
    const struct region *region = region_of_page(lone, page);
    if (!region || region->page_bytes > LONE_BYTES_MAX)
        return 0;
    if (lone->config.states && lone->config.states[page] != lone->config.absent)
        return 0;
    return request(lone, region, page, id, priority, generation, frame);
}

static int take_lock(const struct config *config)
{
    if (config->lock < 0)
        return 0;
    volatile uint8_t *wanted = config->states + config->page_count;
    struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    *wanted = 1;
    int failed;
    while ((failed = fcntl((int)config->lock, F_SETLKW, &whole)) && errno == EINTR)
        ;
    *wanted = 0;
    return failed;
}

static void leave_lock(const struct config *config)
{
    struct flock whole = {.l_type = F_UNLCK, .l_whence = SEEK_SET};
    if (config->lock >= 0)
        fcntl((int)config->lock, F_SETLK, &whole);
}

static int is_taken(const struct taken *taken, uint64_t page)
{
    for (uint64_t index = 0; index < taken->count; index++)
        if (taken->faults[index].page == page)
            return 1;
    return 0;
}

/* Requests the page of an event, if that is all that the event asks for. */
static int take_one(struct lone_faults *lone, const struct uffd_msg *event, uint64_t id, uint64_t generation,
                    struct taken *taken)
{
    uint64_t address = event->arg.pagefault.address;
    const struct region *region = region_of_address(lone, address);
    if (!region || region->page_bytes > LONE_BYTES_MAX)
        return 0;
    uint64_t page = region->first_page + (address - region->base_hva) / region->page_bytes;
    if (lone->config.states[page] != lone->config.absent || is_taken(taken, page))
        return 0;
    uint32_t thread = event->arg.pagefault.feat.ptid;
    uint64_t priority = is_vcpu(lone, thread) ? lone->config.priority_vcpu : lone->config.priority_vmm;
    taken->frame_bytes +=
        request(lone, region, page, id, priority, generation, taken->frames + taken->frame_bytes);
    taken->faults[taken->count++] = (struct fault){page, thread};
    return 1;
}

/*
 * Reads the events that wait, under the lock. Faults on pages that nobody has asked for are requested, with ids from
 * `first_id` on, as far as nothing else comes before them; the rest of the events is the caller's. With a removal among
 * them nothing is requested, and the lock stays held, as `kept` tells, until the pages are marked: then
 * farfault_lone_leave. Returns 0 or an errno.
 */
EXPORT int farfault_lone_take(struct lone_faults *lone, uint64_t first_id, uint64_t generation, int may_request,
                              struct taken *taken, int *kept)
{
    taken->count = taken->frame_bytes = taken->rest_at = taken->event_bytes = 0;
    *kept = 0;
    if (take_lock(&lone->config))
        return errno;
    ssize_t got = read((int)lone->config.uffd, taken->events, sizeof(taken->events));
    int error = got < 0 ? errno : 0;
    size_t events = got < 0 ? 0 : (size_t)got / sizeof(taken->events[0]);
    for (size_t index = 0; index < events && !*kept; index++)
        *kept = taken->events[index].event != UFFD_EVENT_PAGEFAULT;
    if (!*kept)
        leave_lock(&lone->config);
    taken->event_bytes = events * sizeof(taken->events[0]);
    if (!may_request || *kept)
        return error == EAGAIN ? 0 : error;
    size_t next = 0;
    while (next < events && taken->count < TAKEN_MAX &&
           take_one(lone, &taken->events[next], first_id + taken->count, generation, taken))
        next++;
    taken->rest_at = next * sizeof(taken->events[0]);
    return error == EAGAIN ? 0 : error;
}

/* Lets go of what `farfault_lone_take` kept. */
EXPORT void farfault_lone_leave(struct lone_faults *lone)
{
    leave_lock(&lone->config);
}

static int install(const struct config *config, const struct expected *expected, const uint8_t *data)
{
    const struct region *region = expected->region;
    if (config->install_uffd < 0)
        return 1;
    struct uffdio_copy copy = {
        .dst = region->install_hva + expected->request.page * region->page_bytes,
        .src = (uint64_t)(uintptr_t)data,
        .len = region->page_bytes,
    };
    return !ioctl((int)config->install_uffd, UFFDIO_COPY, &copy);
}

/*
 * Looks whether a frame that begins at `position` brings a page that was requested here and is still awaited; if so it
 * is checked and put into memory. Returns 0 if not, or if that failed: then it is an answer as any other.
 */
EXPORT int farfault_lone_came(struct lone_faults *lone, const uint8_t *bytes, uint64_t length, uint64_t position,
                              struct came *came)
{
    const struct config *config = &lone->config;
    uint64_t id = lone_answer_id(bytes + position, length - position);
    struct expected *expected = &lone->expected[id % EXPECTED_MAX];
    if (!id || expected->request.id != id)
        return 0;
    struct lone_answer answer;
    const struct lone_request *request = &expected->request;
    if (!lone_answer_read(bytes + position, length - position, request, expected->region->page_bytes,
                          expected->generation, &answer))
        return 0;
    uint64_t page = expected->region->first_page + request->page;
    if (config->states && (uint64_t)config->states[page] >> config->state_shift != config->in_flight)
        return 0;
    if (!install(config, expected, bytes + position + answer.data_at))
        return 0;
    *came = (struct came){id, page, position + answer.frame_bytes, position + answer.data_at, answer.queue_us,
                          answer.read_us};
    expected->request.id = 0;
    return 1;
}
