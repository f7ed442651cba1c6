/* The C library's own functions, the configuration from the environment, and the log. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "shim.h"

struct ff_config ff_config = {.userfaultfd_device = -1};
void *(*ff_real_mmap)(void *, size_t, int, int, int, off_t);
int (*ff_real_ioctl)(int, unsigned long, ...);

static void print(const char *format, va_list arguments)
{
    char text[1024] = "farfault shim: ";
    size_t used = strlen(text);
    int length = vsnprintf(text + used, sizeof text - used - 1, format, arguments);
    used += length < 0 ? 0 : (size_t)length;
    if (used > sizeof text - 2)
        used = sizeof text - 2;
    text[used] = '\n';
    ssize_t ignored = write(STDERR_FILENO, text, used + 1);
    (void)ignored;
}

void ff_log(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    print(format, arguments);
    va_end(arguments);
}

void ff_die(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    print(format, arguments);
    va_end(arguments);
    _exit(1);
}

/* Takes a variable out of the environment, so that children of the VMM see nothing of us. */
static char *take(const char *name)
{
    const char *value = getenv(name);
    char *copy = value && *value ? strdup(value) : NULL;
    unsetenv(name);
    return copy;
}

static void forget_preload(void)
{
    char *value = take("LD_PRELOAD");
    char rest[FF_PATH_BYTES] = "";
    char *state = NULL;
    for (char *part = value ? strtok_r(value, ": ", &state) : NULL; part; part = strtok_r(NULL, ": ", &state)) {
        if (strstr(part, "libfarfault_shim.so") || strlen(rest) + strlen(part) + 2 > sizeof rest)
            continue;
        if (*rest)
            strcat(rest, ":");
        strcat(rest, part);
    }
    if (*rest)
        setenv("LD_PRELOAD", rest, 1);
    free(value);
}

/* As /proc/self/fd will show it: links resolved, also where the VMM has yet to make the file. */
static const char *resolve(const char *path, char resolved[FF_PATH_BYTES])
{
    char folder[FF_PATH_BYTES];
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    if (realpath(path, resolved))
        return resolved;
    int length = snprintf(folder, sizeof folder, "%.*s", slash ? (int)(slash - path) + 1 : 1, slash ? path : ".");
    if (length < 0 || (size_t)length >= sizeof folder || !realpath(folder, resolved))
        return path;
    size_t used = strcmp(resolved, "/") ? strlen(resolved) : 0;
    if (used + strlen(name) + 2 > FF_PATH_BYTES)
        return path;
    sprintf(resolved + used, "/%s", name);
    return resolved;
}

static void read_ram(char *list)
{
    char *state = NULL;
    for (char *entry = strtok_r(list, ":", &state); entry; entry = strtok_r(NULL, ":", &state)) {
        if (ff_config.ram_count == FF_REGIONS_MAX)
            ff_die("FARFAULT_RAM names more than %u regions", FF_REGIONS_MAX);
        char *slot = ff_config.ram[ff_config.ram_count++];
        char resolved[FF_PATH_BYTES];
        const char *name = entry;
        if (strncmp(entry, "memfd=", 6) != 0)
            name = resolve(entry, resolved);
        if (strlen(name) >= FF_PATH_BYTES)
            ff_die("FARFAULT_RAM: path too long: %s", name);
        strcpy(slot, name);
    }
}

static void read_annotator(const char *text)
{
    char kind[4] = "";
    unsigned long id = 0;
    unsigned offset = 0, size = 0;
    if (sscanf(text, "%3[a-z]:%lu:%u:%u", kind, &id, &offset, &size) != 4 || !id || size > 8 || offset > 512)
        ff_die("FARFAULT_ANNOTATOR=%s is not gva|gpa:EVENT_ID:OFFSET:SIZE; start the VMM with `farfault run`", text);
    ff_config.address_source = strcmp(kind, "gpa") ? FF_ADDRESS_TRACEPOINT_GVA : FF_ADDRESS_TRACEPOINT_GPA;
    ff_config.tracepoint_id = id;
    ff_config.address_offset = offset;
    ff_config.address_size = size;
}

/* FLAG[:INFO_CAPABILITY], decimal: the numbers of a patched kernel. */
static void read_kernel_nowait(const char *text)
{
    unsigned flag = 0, capability = 0;
    if (!text || sscanf(text, "%u:%u", &flag, &capability) < 1 || !flag)
        ff_die("FARFAULT_KERNEL_NOWAIT=%s is not FLAG[:INFO_CAPABILITY]; start the VMM with `farfault run`",
               text ? text : "");
    ff_config.slot_flag = flag;
    ff_config.info_capability = capability;
}

static void read_userfaultfd_device(const char *text)
{
    char *end;
    long descriptor = strtol(text, &end, 10);
    if (*end || descriptor < 0 || descriptor > INT_MAX || fcntl((int)descriptor, F_SETFD, FD_CLOEXEC))
        ff_die("FARFAULT_UFFD_DEV_FD=%s is not an open descriptor", text);
    ff_config.userfaultfd_device = (int)descriptor;
}

static void read_fault_source(const char *source, const char *kernel_nowait)
{
    if (!source || !strcmp(source, "blocking"))
        ff_config.mode = FF_MODE_BLOCKING;
    else if (!strcmp(source, "stock-nowait"))
        ff_config.mode = FF_MODE_NOWAIT;
    else if (!strcmp(source, "kernel-nowait"))
        ff_config.mode = FF_MODE_KERNEL_NOWAIT;
    else
        ff_die("FARFAULT_FAULT_SOURCE=%s is neither blocking, stock-nowait nor kernel-nowait", source);
    if (ff_config.mode == FF_MODE_KERNEL_NOWAIT)
        read_kernel_nowait(kernel_nowait);
}

/* Better no VMM than one that runs a guest whose first missing page it cannot name. */
static void check_annotator(void)
{
    struct ff_sampler sampler = {.fd = -1};
    if (!ff_config.tracepoint_id)
        ff_die("stock-nowait needs FARFAULT_ANNOTATOR; start the VMM with `farfault run`");
    if (!ff_sampler_open(&sampler))
        ff_die("stock-nowait cannot work for this user");
    ff_sampler_close(&sampler);
}

__attribute__((constructor)) static void configure(void)
{
    ff_real_mmap = (void *(*)(void *, size_t, int, int, int, off_t))dlsym(RTLD_NEXT, "mmap");
    ff_real_ioctl = (int (*)(int, unsigned long, ...))dlsym(RTLD_NEXT, "ioctl");
    char *attach = take("FARFAULT_ATTACH"), *ram = take("FARFAULT_RAM");
    char *source = take("FARFAULT_FAULT_SOURCE"), *annotator = take("FARFAULT_ANNOTATOR");
    char *kernel_nowait = take("FARFAULT_KERNEL_NOWAIT"), *device = take("FARFAULT_UFFD_DEV_FD");
    if (attach) {
        forget_preload();
        if (!ram)
            ff_die("FARFAULT_ATTACH is set but FARFAULT_RAM is not; start the VMM with `farfault run`");
        if (strlen(attach) >= sizeof ff_config.attach_path)
            ff_die("FARFAULT_ATTACH is longer than %zu bytes: %s", sizeof ff_config.attach_path - 1, attach);
        strcpy(ff_config.attach_path, attach);
        read_ram(ram);
        if (annotator)
            read_annotator(annotator);
        if (device)
            read_userfaultfd_device(device);
        read_fault_source(source, kernel_nowait);
        if (ff_config.mode == FF_MODE_NOWAIT)
            check_annotator();
    }
    free(attach);
    free(ram);
    free(source);
    free(annotator);
    free(kernel_nowait);
    free(device);
}
