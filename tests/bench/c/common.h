/* What the baselines share: time, stream sockets, memory under a userfaultfd. Any failure ends the program. */
#ifndef FARFAULT_BENCH_COMMON_H
#define FARFAULT_BENCH_COMMON_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul

static inline void die(const char *what)
{
        fprintf(stderr, "%s: %s\n", what, strerror(errno));
        exit(1);
}

static inline uint64_t now_ns(void)
{
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return (uint64_t)now.tv_sec * 1000000000ul + (uint64_t)now.tv_nsec;
}

static inline void write_all(int fd, const void *data, size_t size)
{
        for (const char *at = data; size;) {
                ssize_t done = write(fd, at, size);
                if (done <= 0)
                        die("write");
                at += done;
                size -= (size_t)done;
        }
}

/* 0 at the end of the stream. */
static inline int read_all(int fd, void *data, size_t size)
{
        for (char *at = data; size;) {
                ssize_t done = read(fd, at, size);
                if (done < 0)
                        die("read");
                if (!done)
                        return 0;
                at += done;
                size -= (size_t)done;
        }
        return 1;
}

static inline void no_delay(int fd)
{
        int on = 1;
        if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on))
                die("TCP_NODELAY");
}

/* Two connected sockets, "unix" or "tcp" over loopback. */
static inline void connected(const char *kind, int ends[2])
{
        struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        socklen_t length = sizeof address;
        int listener;

        if (!strcmp(kind, "unix")) {
                if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends))
                        die("socketpair");
                return;
        }
        listener = socket(AF_INET, SOCK_STREAM, 0);
        if (bind(listener, (struct sockaddr *)&address, length) || listen(listener, 1) ||
            getsockname(listener, (struct sockaddr *)&address, &length))
                die("listen");
        ends[1] = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(ends[1], (struct sockaddr *)&address, length))
                die("connect");
        ends[0] = accept(listener, NULL, NULL);
        if (ends[0] < 0)
                die("accept");
        close(listener);
        no_delay(ends[0]);
        no_delay(ends[1]);
}

static inline char *shared_memory(size_t size)
{
        int fd = memfd_create("bench", 0);
        char *memory;

        if (fd < 0 || ftruncate(fd, (off_t)size))
                die("memfd");
        memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (memory == MAP_FAILED)
                die("mmap");
        close(fd);
        return memory;
}

static inline int watched(char *memory, size_t size)
{
        struct uffdio_api api = {.api = UFFD_API};
        struct uffdio_register range = {.range = {(uintptr_t)memory, size}, .mode = UFFDIO_REGISTER_MODE_MISSING};
        int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

        if (fd < 0 || ioctl(fd, UFFDIO_API, &api) || ioctl(fd, UFFDIO_REGISTER, &range))
                die("userfaultfd");
        return fd;
}

static inline void install(int uffd, uint64_t address, const void *data, size_t size)
{
        struct uffdio_copy copy = {.dst = address, .src = (uintptr_t)data, .len = size};
        if (ioctl(uffd, UFFDIO_COPY, &copy) && errno != EEXIST)
                die("UFFDIO_COPY");
}

static inline int by_size(const void *a, const void *b)
{
        uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;
        return (left > right) - (left < right);
}

#endif
