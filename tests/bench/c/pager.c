/* A pager all in C: a handler that reads faults, a server that reads a RAM file, a socket between them.
 * All faults that wait travel in one request; all pages that were asked for, in one answer.
 *   pager UFFD BASE RAM_FILE unix|tcp
 * Says "ready" and serves until it is killed. UFFD is inherited; BASE is an address of the process that made it.
 */
#include "common.h"
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/stat.h>

#define EVENTS_MAX 64
#define ANSWER_BYTES (sizeof(uint64_t) + PAGE)

static void serve(int fd, const char *path)
{
        static char answer[EVENTS_MAX * ANSWER_BYTES];
        uint64_t wanted[EVENTS_MAX];
        struct stat status;
        int file = open(path, O_RDONLY);
        char *ram;
        ssize_t size;

        if (file < 0 || fstat(file, &status))
                die(path);
        ram = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_SHARED, file, 0);
        if (ram == MAP_FAILED)
                die("mmap");
        while ((size = read(fd, wanted, sizeof wanted)) > 0) {
                size_t count = (size_t)size / sizeof *wanted;
                if ((size_t)size % sizeof *wanted && !read_all(fd, (char *)wanted + size, sizeof *wanted - (size_t)size % sizeof *wanted))
                        return;
                count += (size_t)size % sizeof *wanted != 0;
                for (size_t i = 0; i < count; i++) {
                        memcpy(answer + i * ANSWER_BYTES, &wanted[i], sizeof *wanted);
                        memcpy(answer + i * ANSWER_BYTES + sizeof *wanted, ram + wanted[i] * PAGE, PAGE);
                }
                write_all(fd, answer, count * ANSWER_BYTES);
        }
}

static void take_faults(int uffd, uint64_t base, int fd)
{
        struct uffd_msg events[EVENTS_MAX];
        uint64_t wanted[EVENTS_MAX];
        ssize_t size = read(uffd, events, sizeof events);

        if (size <= 0)
                return;
        for (size_t i = 0; i < (size_t)size / sizeof *events; i++)
                wanted[i] = (events[i].arg.pagefault.address - base) / PAGE;
        write_all(fd, wanted, (size_t)size / sizeof *events * sizeof *wanted);
}

int main(int argc, char **argv)
{
        int ends[2], uffd;
        uint64_t base;
        char answer[ANSWER_BYTES];

        if (argc != 5)
                return 2;
        uffd = atoi(argv[1]);
        base = strtoul(argv[2], NULL, 0);
        connected(argv[4], ends);
        if (!fork()) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                close(ends[1]);
                serve(ends[0], argv[3]);
                return 0;
        }
        close(ends[0]);
        puts("ready");
        fflush(stdout);
        for (;;) {
                struct pollfd ready[2] = {{uffd, POLLIN, 0}, {ends[1], POLLIN, 0}};
                if (poll(ready, 2, -1) < 0)
                        die("poll");
                if (ready[0].revents)
                        take_faults(uffd, base, ends[1]);
                if (ready[1].revents) {
                        uint64_t page;
                        if (!read_all(ends[1], answer, sizeof answer))
                                return 1;
                        memcpy(&page, answer, sizeof page);
                        install(uffd, base + page * PAGE, answer + sizeof page, PAGE);
                }
        }
}
