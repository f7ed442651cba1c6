/* The limit of an installation: UFFDIO_COPY into a shared memory file that nobody waits for.
 *   install RUN_PAGES PAGES
 */
#include "common.h"

int main(int argc, char **argv)
{
        size_t run, pages;
        char *target, *data;
        uint64_t began;
        int uffd;

        if (argc != 3)
                return 2;
        run = strtoul(argv[1], NULL, 10);
        pages = strtoul(argv[2], NULL, 10) / run * run;
        target = shared_memory(pages * PAGE);
        uffd = watched(target, pages * PAGE);
        data = malloc(run * PAGE);
        memset(data, 7, run * PAGE);
        began = now_ns();
        for (size_t at = 0; at < pages; at += run)
                install(uffd, (uintptr_t)target + at * PAGE, data, run * PAGE);
        printf("{\"us_per_call\": %.3f}\n", (double)(now_ns() - began) / 1e3 / (double)(pages / run));
        return 0;
}
