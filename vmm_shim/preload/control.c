/* The attach socket: one thread that hands memory over, and again whenever the receiver comes back. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "shim.h"

atomic_bool ff_released;
static int connection = -1;  /* of the control thread only */
static int new_vcpu_event = -1;
static char handover[FF_HANDOVER_BYTES_MAX];

static void pause_ms(long ms)
{
    struct timespec interval = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L};
    nanosleep(&interval, NULL);
}

static const char *fault_source(void)
{
    switch (ff_config.mode) {
    case FF_MODE_NOWAIT:
        return "stock-nowait";
    case FF_MODE_KERNEL_NOWAIT:
        return "kernel-nowait";
    default:
        return "blocking";
    }
}

/* The JSON and its descriptors. Returns the length of the text. */
static size_t describe(int *descriptors, unsigned *count)
{
    char names[FF_REGIONS_MAX * 12 + 64] = "\"uffd\"";
    size_t used = 0;
    *count = 0;
    descriptors[(*count)++] = ff_uffd;
    if (ff_alias_uffd >= 0) {
        strcat(names, ",\"alias_uffd\"");
        descriptors[(*count)++] = ff_alias_uffd;
    }
    strcat(names, ",\"state\"");
    descriptors[(*count)++] = ff_state_fd;
    for (unsigned i = 0; i < ff_config.ram_count; i++) {
        char name[16];
        snprintf(name, sizeof name, ",\"ram%u\"", i);
        strcat(names, name);
        descriptors[(*count)++] = ff_regions[i].fd;
    }
    for (unsigned i = 0; i < ff_config.ram_count; i++) {
        const struct ff_region *region = &ff_regions[i];
        used += (size_t)snprintf(handover + used, sizeof handover - used,
                                 "%s{\"base_host_virt_addr\":%lu,\"size\":%lu,\"offset\":%lu,\"page_size\":%u,"
                                 "\"page_size_kib\":%u,\"alias_host_virt_addr\":%lu",
                                 i ? "," : "[", (unsigned long)(uintptr_t)region->base, (unsigned long)region->size,
                                 (unsigned long)region->offset, region->page_size, region->page_size,
                                 (unsigned long)(uintptr_t)region->alias);
        if (i == 0)
            used += (size_t)snprintf(handover + used, sizeof handover - used,
                                     ",\"farfault\":{\"version\":%u,\"fault_source\":\"%s\",\"fds\":[%s]}",
                                     FF_ATTACH_VERSION, fault_source(), names);
        used += (size_t)snprintf(handover + used, sizeof handover - used, "}");
    }
    used += (size_t)snprintf(handover + used, sizeof handover - used, "]");
    return used;
}

static int send_with(const void *data, size_t length, const int *descriptors, unsigned count)
{
    char control[CMSG_SPACE(sizeof(int) * (FF_REGIONS_MAX + 3))];
    struct iovec part = {(void *)(uintptr_t)data, length};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control,
                             .msg_controllen = CMSG_SPACE(sizeof(int) * count)};
    memset(control, 0, sizeof control);
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(sizeof(int) * count);
    memcpy(CMSG_DATA(head), descriptors, sizeof(int) * count);
    return sendmsg(connection, &message, MSG_NOSIGNAL) == (ssize_t)length ? 0 : -1;
}

static void announce(const struct ff_vcpu_hello *hello, int descriptor)
{
    struct {
        struct ff_frame frame;
        struct ff_vcpu_hello hello;
    } message = {{FF_FRAME_VCPU, sizeof *hello}, *hello};
    if (send_with(&message, sizeof message, &descriptor, 1))
        ff_log("vCPU %u cannot be announced: %s", hello->vcpu, strerror(errno));
}

static int read_all(void *data, size_t length)
{
    if (!length)
        return 0; /* recv of nothing waits for something */
    return recv(connection, data, length, MSG_WAITALL) == (ssize_t)length ? 0 : -1;
}

/* Obeys frames until the connection ends. Returns how long to wait before the next attempt; -1: released. */
static long follow(void)
{
    bool ready = false;
    for (;;) {
        struct pollfd waiting[2] = {{.fd = connection, .events = POLLIN}, {.fd = new_vcpu_event, .events = POLLIN}};
        if (poll(waiting, ready ? 2 : 1, -1) < 0)
            continue;
        if (ready && waiting[1].revents) {
            uint64_t count;
            if (read(new_vcpu_event, &count, sizeof count) > 0)
                ff_vcpu_channels(announce);
        }
        if (!waiting[0].revents)
            continue;
        struct ff_frame frame;
        char payload[FF_FRAME_BYTES_MAX + 1];
        if (read_all(&frame, sizeof frame) || frame.length > FF_FRAME_BYTES_MAX || read_all(payload, frame.length))
            return FF_ATTACH_RETRY_MS;
        payload[frame.length] = 0;
        switch (frame.type) {
        case FF_FRAME_READY:
            ready = true;
            ff_state->attach_epoch++;
            ff_vcpu_channels(announce);
            break;
        case FF_FRAME_RELEASED:
            return -1;
        case FF_FRAME_REFUSED:
            ff_log("the receiver refused this VM: %s", payload);
            return FF_REFUSED_RETRY_MS;
        default:
            ff_log("frame type %u from the receiver", frame.type);
            return FF_REFUSED_RETRY_MS;
        }
    }
}

static void *control(void *unused)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int descriptors[FF_REGIONS_MAX + 3];
    unsigned count;
    bool told = false;
    (void)unused;
    strcpy(address.sun_path, ff_config.attach_path);
    for (;;) {
        long wait_ms = FF_ATTACH_RETRY_MS;
        connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (connection >= 0 && connect(connection, (struct sockaddr *)&address, sizeof address) == 0) {
            size_t length = describe(descriptors, &count);
            if (send_with(handover, length, descriptors, count) == 0)
                wait_ms = follow();
            if (wait_ms >= 0)
                ff_log("the receiver is gone; the guest waits for missing pages until one comes back");
            told = true;
        } else if (!told) {
            ff_log("waiting for a receiver at %s: %s", ff_config.attach_path, strerror(errno));
            told = true;
        }
        if (connection >= 0)
            close(connection);
        connection = -1;
        if (wait_ms < 0)
            break;
        pause_ms(wait_ms);
    }
    atomic_store(&ff_released, true);
    close(ff_uffd); /* every range is unregistered: nothing waits on these any more */
    if (ff_alias_uffd >= 0)
        close(ff_alias_uffd);
    return NULL;
}

void ff_control_start(void)
{
    pthread_t thread;
    sigset_t all, before;
    new_vcpu_event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&thread, NULL, control, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error)
        ff_die("control thread: %s", strerror(error));
    pthread_detach(thread);
}

void ff_control_new_vcpu(void)
{
    uint64_t one = 1;
    ssize_t ignored = write(new_vcpu_event, &one, sizeof one);
    (void)ignored;
}
