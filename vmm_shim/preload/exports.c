/* The functions that the VMM calls instead of the C library's. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <sys/mman.h>

#include "shim.h"

#ifndef KVM_SET_USER_MEMORY_REGION2 /* Linux 6.8 */
#define KVM_SET_USER_MEMORY_REGION2 0x40a0ae49UL
#endif
#define FF_MEMORY_REGION2_BYTES 160

#define EXPORT __attribute__((visibility("default")))

/* Calls before our constructor has run (another library's) go straight to the C library. */
static void resolve(void)
{
    if (!ff_real_mmap)
        ff_real_mmap = (void *(*)(void *, size_t, int, int, int, off_t))dlsym(RTLD_NEXT, "mmap");
    if (!ff_real_ioctl)
        ff_real_ioctl = (int (*)(int, unsigned long, ...))dlsym(RTLD_NEXT, "ioctl");
}

EXPORT void *mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
    resolve();
    void *mapped = ff_real_mmap(address, length, protection, flags, fd, offset);
    if (ff_config.mode != FF_MODE_OFF && mapped != MAP_FAILED && fd >= 0)
        ff_memory_mapped(mapped, length, flags, fd, offset);
    return mapped;
}

EXPORT void *mmap64(void *address, size_t length, int protection, int flags, int fd, off64_t offset)
{
    return mmap(address, length, protection, flags, fd, offset);
}

EXPORT int ioctl(int fd, unsigned long request, ...)
{
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    resolve();
    if (ff_config.mode == FF_MODE_OFF)
        return ff_real_ioctl(fd, request, argument);
    int result;
    switch (request) {
    case KVM_RUN:
        return ff_vcpu_run(fd, argument);
    case KVM_SET_USER_MEMORY_REGION:
        return ff_memory_set_slot(fd, request, argument, sizeof(struct kvm_userspace_memory_region));
    case KVM_SET_USER_MEMORY_REGION2:
        return ff_memory_set_slot(fd, request, argument, FF_MEMORY_REGION2_BYTES);
    case KVM_CREATE_VCPU:
        result = ff_real_ioctl(fd, request, argument);
        if (result >= 0)
            ff_vcpu_created(result, (uint32_t)(uintptr_t)argument);
        return result;
    case KVM_SET_MSRS:
        result = ff_real_ioctl(fd, request, argument);
        if (result > 0) {
            int saved = errno;
            ff_vcpu_msrs_set(fd, argument);
            errno = saved;
        }
        return result;
    case KVM_SET_SIGNAL_MASK:
        result = ff_real_ioctl(fd, request, argument);
        if (result == 0)
            ff_vcpu_signal_mask(fd, argument);
        return result;
    default:
        return ff_real_ioctl(fd, request, argument);
    }
}
