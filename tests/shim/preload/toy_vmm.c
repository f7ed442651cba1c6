/* A VMM of one vCPU: maps RAM, runs until the guest halts, prints what KVM_RUN gave it. */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <linux/kvm.h>

#define RUNS_MAX 64

int main(int count, char **arguments)
{
    if (count != 3)
        return 2;
    size_t size = strtoul(arguments[2], NULL, 10);
    int ram = open(arguments[1], O_RDWR | O_CREAT, 0600), vm = open("/dev/null", O_RDWR);
    if (ram < 0 || vm < 0 || ftruncate(ram, (off_t)size))
        return 3;
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, ram, 0);
    int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    struct kvm_run *run = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    struct kvm_userspace_memory_region slot = {.memory_size = size, .userspace_addr = (uintptr_t)memory};
    if (memory == MAP_FAILED || run == MAP_FAILED || ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot))
        return 4;
    for (int i = 0; i < RUNS_MAX; i++) {
        errno = 0;
        int result = ioctl(vcpu, KVM_RUN, 0);
        printf("run %d %s exit %u\n", result, result ? strerror(errno) : "ok", run->exit_reason);
        if (!result && run->exit_reason == KVM_EXIT_HLT)
            return 0;
    }
    return 5;
}
