/* The limit of one 4 KiB fetch: a small request, a page in reply, one at a time.
 *   pingpong unix|tcp COUNT
 */
#include "common.h"

#define SOURCE_PAGES 16384ul

struct request {
        uint64_t page, id;
};

static void serve(int fd)
{
        char *source = shared_memory(SOURCE_PAGES * PAGE), reply[sizeof(struct request) + PAGE];
        struct request request;

        memset(source, 7, SOURCE_PAGES * PAGE);
        write_all(fd, "r", 1);
        while (read_all(fd, &request, sizeof request)) {
                memcpy(reply, &request, sizeof request);
                memcpy(reply + sizeof request, source + request.page * PAGE, PAGE);
                write_all(fd, reply, sizeof reply);
        }
}

int main(int argc, char **argv)
{
        int ends[2];
        size_t count;
        uint64_t *took;
        char reply[sizeof(struct request) + PAGE], ready;

        if (argc != 3)
                return 2;
        count = strtoul(argv[2], NULL, 10);
        took = calloc(count, sizeof *took);
        connected(argv[1], ends);
        if (!fork()) {
                close(ends[1]);
                serve(ends[0]);
                return 0;
        }
        close(ends[0]);
        read_all(ends[1], &ready, 1);
        for (size_t i = 0; i < count; i++) {
                struct request request = {(i * 7919) % SOURCE_PAGES, i};
                uint64_t began = now_ns();
                write_all(ends[1], &request, sizeof request);
                if (!read_all(ends[1], reply, sizeof reply))
                        die("reply");
                took[i] = now_ns() - began;
        }
        close(ends[1]);
        wait(NULL);
        qsort(took, count, sizeof *took, by_size);
        printf("{\"p50_us\": %.2f, \"p99_us\": %.2f}\n", (double)took[count / 2] / 1e3, (double)took[count * 99 / 100] / 1e3);
        return 0;
}
