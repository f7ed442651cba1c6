/* A network of given delay and rate between TCP clients and a server; it moves bytes by splice(2), without a copy.
 *   link LISTEN TO DELAY_US RATE_BYTES_PER_S ON_THE_WAY_BYTES PORT...
 * It listens on the ports of one address and connects to the same ports of another. DELAY_US is for one direction, the
 * rate (0: none) for each direction over all connections. With ON_THE_WAY_BYTES on their way in one direction of one
 * connection, its sender is not read from. Writes "ready" once it listens; ends with its standard input.
 *
 * A direction is a queue of segments, each with the time at which it is due, whose bytes wait in pipes. Each end of a
 * stream waits in the queue as well, as a segment of no bytes.
 */
#include "common.h"

#include <signal.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/timerfd.h>

#define PORTS_MAX 16
#define PAIRS_MAX 256
#define EVENTS_MAX 64
#define SEGMENTS_MAX 8192u     /* in one direction of one connection; a power of two */
#define PIPE_BYTES (1 << 20)   /* what root may have without asking for more (pipe-max-size) */
#define PIECE_BYTES (256u << 10)
#define PIECE_MIN 4096u        /* with a rate: what passes within PIECE_US, but no less */
#define PIECE_US 500u
#define TURN_BYTES (1u << 20)  /* of one direction; then the others have a turn */

struct pipe_pair {
        int read_end, write_end;
        size_t bytes;
        struct pipe_pair *next;
};

struct segment {
        struct pipe_pair *pipe;
        uint64_t due;
        uint32_t bytes;
};

struct end {
        int fd, readable, writable, hung_up;
};

struct way { /* one direction of a connection */
        struct end *from, *to;
        uint64_t *busy_until; /* of the link in this direction */
        struct segment *segments;
        unsigned head, count;
        size_t bytes;
        struct pipe_pair *filling;
        int ended, finished;
};

struct pair {
        struct end client, server;
        struct way up, down;
        int connecting, broken;
};

static struct pair *pairs[PAIRS_MAX];
static struct pipe_pair *idle_pipes;
static uint64_t delay_ns, rate, busy_up, busy_down;
static size_t on_the_way_max, piece_max = PIECE_BYTES;
static int epoll;

static int new_pipe(struct way *way)
{
        struct pipe_pair *pipe = idle_pipes;
        int ends[2];

        if (pipe) {
                idle_pipes = pipe->next;
        } else {
                if (pipe2(ends, O_NONBLOCK | O_CLOEXEC))
                        return -1;
                pipe = calloc(1, sizeof *pipe);
                pipe->read_end = ends[0];
                pipe->write_end = ends[1];
                fcntl(ends[1], F_SETPIPE_SZ, PIPE_BYTES); /* refused: smaller pipes, more of them */
        }
        way->filling = pipe;
        return 0;
}

static void drop_pipe(struct pipe_pair *pipe)
{
        pipe->next = idle_pipes;
        idle_pipes = pipe;
}

static void push(struct way *way, uint32_t bytes, uint64_t now)
{
        uint64_t begin = *way->busy_until > now ? *way->busy_until : now;

        if (rate)
                begin += (uint64_t)bytes * 1000000000ul / rate;
        *way->busy_until = begin;
        way->segments[(way->head + way->count++) % SEGMENTS_MAX] =
            (struct segment){.pipe = bytes ? way->filling : NULL, .due = begin + delay_ns, .bytes = bytes};
        way->bytes += bytes;
        if (bytes)
                way->filling->bytes += bytes;
}

static int has_more(const struct end *end)
{
        int waiting = 0;

        return end->hung_up || (!ioctl(end->fd, FIONREAD, &waiting) && waiting > 0);
}

/* Reads what the sender has. 1: there may be more. */
static int fill(struct pair *pair, struct way *way)
{
        size_t done = 0;

        while (way->from->readable && !way->ended && way->bytes < on_the_way_max && way->count < SEGMENTS_MAX) {
                ssize_t got;

                if (done >= TURN_BYTES)
                        return 1;
                if (!way->filling && new_pipe(way)) {
                        pair->broken = 1;
                        return 0;
                }
                got = splice(way->from->fd, NULL, way->filling->write_end, NULL, piece_max,
                             SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
                if (got > 0) {
                        done += (size_t)got;
                        push(way, (uint32_t)got, now_ns());
                } else if (!got) {
                        way->ended = 1;
                        push(way, 0, now_ns());
                } else if (errno == EAGAIN) {
                        /* Nothing there, or no slot left in the pipe. */
                        if (way->filling->bytes && has_more(way->from))
                                way->filling = NULL;
                        else
                                way->from->readable = 0;
                } else if (errno != EINTR) {
                        pair->broken = 1;
                        return 0;
                }
        }
        return 0;
}

/* Delivers what is due. 1: there may be more. */
static int deliver(struct pair *pair, struct way *way)
{
        size_t done = 0;

        while (way->count && !pair->connecting && way->to->writable) {
                struct segment *first = &way->segments[way->head];
                struct pipe_pair *pipe = first->pipe;
                ssize_t gone;

                if (first->due > now_ns())
                        return 0;
                if (done >= TURN_BYTES)
                        return 1;
                if (!pipe) {
                        shutdown(way->to->fd, SHUT_WR);
                        way->finished = 1;
                } else {
                        gone = splice(pipe->read_end, NULL, way->to->fd, NULL, first->bytes,
                                      SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
                        if (gone <= 0) {
                                if (gone < 0 && errno == EAGAIN)
                                        way->to->writable = 0;
                                else if (!gone || errno != EINTR)
                                        pair->broken = 1;
                                return 0;
                        }
                        done += (size_t)gone;
                        first->bytes -= (uint32_t)gone;
                        way->bytes -= (size_t)gone;
                        pipe->bytes -= (size_t)gone;
                        if (!pipe->bytes && pipe != way->filling)
                                drop_pipe(pipe);
                        if (first->bytes)
                                continue;
                }
                way->head = (way->head + 1) % SEGMENTS_MAX;
                way->count--;
        }
        return 0;
}

static void watch(struct end *end, struct pair *pair)
{
        /* The lowest bit of the address tells the server's end from the client's. */
        uintptr_t key = (uintptr_t)pair | (end == &pair->server);
        struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.u64 = key};

        no_delay(end->fd);
        if (epoll_ctl(epoll, EPOLL_CTL_ADD, end->fd, &event))
                die("epoll_ctl");
}

static struct way new_way(struct end *from, struct end *to, uint64_t *busy_until)
{
        struct way way = {.from = from, .to = to, .busy_until = busy_until};

        way.segments = malloc(SEGMENTS_MAX * sizeof *way.segments);
        if (!way.segments)
                die("malloc");
        return way;
}

static void take(int listener, struct in_addr to, uint16_t port)
{
        struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr = to};
        int client = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC), server, slot = 0;
        struct pair *pair;

        if (client < 0)
                return;
        while (slot < PAIRS_MAX && pairs[slot])
                slot++;
        server = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (slot == PAIRS_MAX || server < 0 ||
            (connect(server, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS)) {
                close(client);
                if (server >= 0)
                        close(server);
                return;
        }
        pair = calloc(1, sizeof *pair);
        pair->client.fd = client;
        pair->server.fd = server;
        pair->connecting = 1;
        pair->up = new_way(&pair->client, &pair->server, &busy_up);
        pair->down = new_way(&pair->server, &pair->client, &busy_down);
        pairs[slot] = pair;
        watch(&pair->client, pair);
        watch(&pair->server, pair);
}

static void drop_way(struct way *way)
{
        struct pipe_pair *pipe, *last = NULL;

        for (unsigned i = 0; i < way->count; i++) {
                pipe = way->segments[(way->head + i) % SEGMENTS_MAX].pipe;
                if (pipe && pipe != last && pipe != way->filling) {
                        if (last) {
                                close(last->read_end);
                                close(last->write_end);
                                free(last);
                        }
                        last = pipe;
                }
        }
        if (last) {
                close(last->read_end);
                close(last->write_end);
                free(last);
        }
        if (way->filling) {
                close(way->filling->read_end);
                close(way->filling->write_end);
                free(way->filling);
        }
        free(way->segments);
}

static void drop(int slot)
{
        struct pair *pair = pairs[slot];

        close(pair->client.fd);
        close(pair->server.fd);
        drop_way(&pair->up);
        drop_way(&pair->down);
        free(pair);
        pairs[slot] = NULL;
}

static void note(struct epoll_event *event)
{
        struct pair *pair = (struct pair *)(uintptr_t)(event->data.u64 & ~1ul);
        struct end *end = event->data.u64 & 1 ? &pair->server : &pair->client;

        if (event->events & EPOLLERR)
                pair->broken = 1;
        if (event->events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP))
                end->readable = 1;
        if (event->events & (EPOLLRDHUP | EPOLLHUP))
                end->hung_up = 1;
        if (event->events & EPOLLOUT) {
                end->writable = 1;
                if (end == &pair->server)
                        pair->connecting = 0;
        }
}

/* Moves everything that can move now. When something is due next, in ns; 0: at once; UINT64_MAX: never. */
static uint64_t turn(void)
{
        uint64_t next = UINT64_MAX;

        for (int slot = 0; slot < PAIRS_MAX; slot++) {
                struct pair *pair = pairs[slot];

                if (!pair)
                        continue;
                for (int down = 0; down < 2; down++) {
                        struct way *way = down ? &pair->down : &pair->up;

                        if (fill(pair, way))
                                next = 0;
                        if (deliver(pair, way))
                                next = 0;
                        if (way->from->readable && !way->ended && way->bytes < on_the_way_max &&
                            way->count < SEGMENTS_MAX)
                                next = 0; /* there is room again */
                        if (way->count && way->to->writable && !pair->connecting &&
                            way->segments[way->head].due < next)
                                next = way->segments[way->head].due;
                }
                if (pair->broken || (pair->up.finished && pair->down.finished))
                        drop(slot);
        }
        return next;
}

static int listen_on(struct in_addr own, uint16_t port)
{
        struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr = own};
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), on = 1;

        if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) ||
            bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 64))
                die("listen");
        return fd;
}

static void watch_number(int fd, unsigned number)
{
        struct epoll_event event = {.events = EPOLLIN, .data.u64 = number};

        if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
                die("epoll_ctl");
}

int main(int argc, char **argv)
{
        struct in_addr own, to;
        struct rlimit files;
        struct epoll_event events[EVENTS_MAX];
        int listeners[PORTS_MAX], ports = argc - 6, timer;
        uint64_t next = UINT64_MAX, expirations;
        char line[64];

        if (ports < 1 || ports > PORTS_MAX || !inet_aton(argv[1], &own) || !inet_aton(argv[2], &to))
                return 2;
        delay_ns = strtoul(argv[3], NULL, 10) * 1000;
        rate = strtoul(argv[4], NULL, 10);
        on_the_way_max = strtoul(argv[5], NULL, 10);
        if (rate && rate / (1000000 / PIECE_US) < piece_max)
                piece_max = rate / (1000000 / PIECE_US) > PIECE_MIN ? rate / (1000000 / PIECE_US) : PIECE_MIN;
        getrlimit(RLIMIT_NOFILE, &files);
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
        signal(SIGPIPE, SIG_IGN);
        epoll = epoll_create1(EPOLL_CLOEXEC);
        timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
        /* Small numbers are no addresses: 0 standard input, 1 the timer, then the listeners. */
        watch_number(0, 0);
        watch_number(timer, 1);
        for (int i = 0; i < ports; i++) {
                listeners[i] = listen_on(own, (uint16_t)atoi(argv[6 + i]));
                watch_number(listeners[i], 2 + (unsigned)i);
        }
        write_all(1, "ready\n", 6);
        for (;;) {
                int count = epoll_wait(epoll, events, EVENTS_MAX, next ? -1 : 0);

                for (int i = 0; i < count; i++) {
                        uint64_t number = events[i].data.u64;

                        if (!number) {
                                if (read(0, line, sizeof line) <= 0)
                                        return 0;
                        } else if (number == 1) {
                                if (read(timer, &expirations, sizeof expirations) < 0 && errno != EAGAIN)
                                        die("timer");
                        } else if (number < 2 + PORTS_MAX) {
                                take(listeners[number - 2], to, (uint16_t)atoi(argv[6 + number - 2]));
                        } else {
                                note(&events[i]);
                        }
                }
                next = turn();
                if (next && next != UINT64_MAX) {
                        struct itimerspec at = {.it_value = {.tv_sec = (time_t)(next / 1000000000),
                                                             .tv_nsec = (long)(next % 1000000000)}};
                        if (timerfd_settime(timer, TFD_TIMER_ABSTIME, &at, NULL))
                                die("timerfd_settime");
                }
        }
}
