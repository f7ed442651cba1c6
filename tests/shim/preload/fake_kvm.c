/* A KVM with a NOWAIT interface, as far as one vCPU that walks through RAM needs it: preloaded after the shim.
 *
 * Page by page, an absent one ends KVM_RUN with an annotated -EFAULT. Some pages have a story of their own.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <linux/kvm.h>

#define PAGE 4096u
#define EXIT_MEMORY_FAULT 39
#define MMIO_PAGE 3    /* its first access is emulated */
#define POISONED_PAGE 5 /* fails once with EHWPOISON */
#define PRIVATE_PAGE 7 /* fails once with the private flag */

static struct kvm_userspace_memory_region slot;
static struct kvm_run *run;
static uint64_t page;
static int told;

static int resident(uint64_t index)
{
    unsigned char state = 0;
    return mincore((void *)(uintptr_t)(slot.userspace_addr + index * PAGE), PAGE, &state) == 0 && (state & 1);
}

static int fault(uint64_t gpa, uint64_t flags)
{
    uint64_t fields[3] = {flags, gpa, PAGE};
    run->exit_reason = EXIT_MEMORY_FAULT;
    memcpy(&run->hw, fields, sizeof fields);
    errno = EFAULT;
    return -1;
}

static int step(void)
{
    if (page == MMIO_PAGE && !told++) {
        run->exit_reason = KVM_EXIT_MMIO;
        run->mmio.phys_addr = page * PAGE + 8;
        run->mmio.len = 8;
        run->mmio.is_write = 0;
        memset(run->mmio.data, 0xee, sizeof run->mmio.data);
        return 0;
    }
    if (page == MMIO_PAGE && told == 2) {
        uint64_t value, expected = *(uint64_t *)(uintptr_t)(slot.userspace_addr + page * PAGE + 8);
        memcpy(&value, run->mmio.data, sizeof value);
        printf("mmio %s\n", value == expected ? "completed" : "wrong");
    }
    if (page == POISONED_PAGE && told != 3) {
        told = 3;
        errno = EHWPOISON;
        return -1;
    }
    if (page == PRIVATE_PAGE && told != 4) {
        told = 4;
        return fault(page * PAGE, 1 << 3);
    }
    if (!resident(page))
        return fault(page * PAGE, 0);
    if (++page * PAGE == slot.memory_size) {
        run->exit_reason = KVM_EXIT_HLT;
        return 0;
    }
    return step();
}

__attribute__((visibility("default"))) int ioctl(int fd, unsigned long request, ...)
{
    static int (*real)(int, unsigned long, ...);
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    if (!real)
        real = (int (*)(int, unsigned long, ...))dlsym(RTLD_NEXT, "ioctl");
    switch (request) {
    case KVM_CREATE_VCPU:
        fd = memfd_create("fake-vcpu", 0);
        return ftruncate(fd, PAGE) ? -1 : fd;
    case KVM_ENABLE_CAP:
        printf("enable %u %llu\n", ((struct kvm_enable_cap *)argument)->cap,
               ((struct kvm_enable_cap *)argument)->args[0]);
        return 0;
    case KVM_SET_USER_MEMORY_REGION:
        slot = *(struct kvm_userspace_memory_region *)argument;
        printf("slot flags %#x\n", slot.flags);
        return 0;
    case KVM_GET_SREGS:
        memset(argument, 0, sizeof(struct kvm_sregs));
        return 0;
    case KVM_GET_MSRS:
        return 0;
    case KVM_GET_REGS:
        memset(argument, 0, sizeof(struct kvm_regs));
        return 0;
    case KVM_RUN:
        if (!run)
            run = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        return step();
    default:
        return real(fd, request, argument);
    }
}
