/* The limit of the background: memory through a socket in 256 KiB pieces, thrown away or installed.
 *   stream unix|tcp MIB INSTALL
 */
#include "common.h"

#define PIECE (256ul << 10)

static void send_all(int fd, size_t size)
{
        char *source = shared_memory(size), *buffer = malloc(PIECE);

        memset(source, 7, size);
        write_all(fd, "r", 1);
        for (size_t at = 0; at < size; at += PIECE) {
                memcpy(buffer, source + at, PIECE); /* as a server does that may not lend the memory itself */
                write_all(fd, buffer, PIECE);
        }
}

int main(int argc, char **argv)
{
        int ends[2], uffd = -1, with_install;
        size_t size;
        char *target = NULL, *piece = malloc(PIECE), ready;
        uint64_t began;
        double took_s;

        if (argc != 4)
                return 2;
        size = strtoul(argv[2], NULL, 10) << 20;
        with_install = atoi(argv[3]);
        connected(argv[1], ends);
        if (!fork()) {
                close(ends[1]);
                send_all(ends[0], size);
                return 0;
        }
        close(ends[0]);
        if (with_install) {
                target = shared_memory(size);
                uffd = watched(target, size);
        }
        read_all(ends[1], &ready, 1);
        began = now_ns();
        for (size_t at = 0; at < size; at += PIECE) {
                if (!read_all(ends[1], piece, PIECE))
                        die("piece");
                if (with_install)
                        install(uffd, (uintptr_t)target + at, piece, PIECE);
        }
        took_s = (double)(now_ns() - began) / 1e9;
        close(ends[1]);
        wait(NULL);
        printf("{\"mb_per_s\": %.1f}\n", (double)size / 1e6 / took_s);
        return 0;
}
