/* RAM files: the VMM's mapping under a blocking userfaultfd, KVM's alias under a SIGBUS one, memslots. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <linux/userfaultfd.h>

#include "shim.h"

#ifndef USERFAULTFD_IOC_NEW /* Linux 6.1 */
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif
#define MEMORY_FAULT_INFO_ENABLE 1 /* KVM_MEMORY_FAULT_INFO_ENABLE of the absent-mapping-fault series */
#define HUGETLBFS_FILESYSTEM 0x958458f6

struct ff_region ff_regions[FF_REGIONS_MAX];
int ff_uffd = -1, ff_alias_uffd = -1, ff_state_fd = -1;
struct ff_state *ff_state;

/* Slots as the VMM set them; published to the state area in flat offsets. */
struct slot {
    uint32_t id, flags;
    uint64_t gpa, size, region_offset;
    unsigned region;
};
static struct slot slots[FF_SLOTS_MAX];
static pthread_rwlock_t lock = PTHREAD_RWLOCK_INITIALIZER;
static unsigned mapped_count;

static int make_userfaultfd(uint64_t features)
{
    int fd = -1;
    if (ff_config.userfaultfd_device >= 0)
        fd = ff_real_ioctl(ff_config.userfaultfd_device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) {
        int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
        if (device >= 0) {
            fd = ff_real_ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
            close(device);
        }
    }
    if (fd < 0)
        ff_die("userfaultfd is not permitted: %s; run the VMM as root, or give its user /dev/userfaultfd, "
               "or sysctl vm.unprivileged_userfaultfd=1", strerror(errno));
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    if (ff_real_ioctl(fd, UFFDIO_API, &api))
        ff_die("the kernel lacks userfaultfd features %#lx: %s", (unsigned long)features, strerror(errno));
    return fd;
}

static void watch(int uffd, void *address, uint64_t size)
{
    struct uffdio_register range = {.range = {(uintptr_t)address, size}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (ff_real_ioctl(uffd, UFFDIO_REGISTER, &range))
        ff_die("UFFDIO_REGISTER of %lu bytes: %s", (unsigned long)size, strerror(errno));
}

static void make_state(void)
{
    ff_state_fd = memfd_create("farfault-state", MFD_CLOEXEC);
    if (ff_state_fd < 0 || ftruncate(ff_state_fd, sizeof *ff_state))
        ff_die("state area: %s", strerror(errno));
    ff_state = ff_real_mmap(NULL, sizeof *ff_state, PROT_READ | PROT_WRITE, MAP_SHARED, ff_state_fd, 0);
    if (ff_state == MAP_FAILED)
        ff_die("state area: %s", strerror(errno));
    ff_state->magic = FF_STATE_MAGIC;
    ff_state->version = FF_ATTACH_VERSION;
    ff_state->pid = (uint32_t)getpid();
}

/* Which configured region a descriptor is; -1: none. */
static int region_of(int fd)
{
    char link[64], target[FF_PATH_BYTES];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, target, sizeof target - 1);
    if (length < 0)
        return -1;
    target[length] = 0;
    for (unsigned i = 0; i < ff_config.ram_count; i++) {
        const char *wanted = ff_config.ram[i];
        if (!strncmp(wanted, "memfd=", 6)) {
            size_t name = strlen(wanted + 6);
            if (!strncmp(target, "/memfd:", 7) && !strncmp(target + 7, wanted + 6, name) &&
                (target[7 + name] == 0 || target[7 + name] == ' '))
                return (int)i;
        } else if (!strcmp(target, wanted)) {
            return (int)i;
        }
    }
    return -1;
}

/* Writes all slots in flat offsets; the caller holds the lock for writing. */
static void publish_slots(void)
{
    if (!ff_state)
        return;
    atomic_fetch_add((_Atomic uint32_t *)&ff_state->slots_seq, 1);
    for (unsigned i = 0; i < FF_SLOTS_MAX; i++) {
        const struct slot *slot = &slots[i];
        ff_state->slots[i] = (struct ff_slot){slot->id, slot->flags, slot->gpa, slot->size,
                                              ff_regions[slot->region].offset + slot->region_offset};
    }
    atomic_fetch_add((_Atomic uint32_t *)&ff_state->slots_seq, 1);
}

static uint32_t page_size_of(int fd)
{
    struct statfs fs;
    return fstatfs(fd, &fs) == 0 && fs.f_type == HUGETLBFS_FILESYSTEM ? (uint32_t)fs.f_bsize : 4096;
}

void ff_memory_mapped(void *address, size_t length, int flags, int fd, off_t offset)
{
    int index = region_of(fd);
    if (index < 0)
        return;
    const char *name = ff_config.ram[index];
    struct ff_region *region = &ff_regions[index];
    struct stat status;
    if (region->base) {
        ff_log("%s is mapped a second time at %p; only the first mapping waits for pages", name, address);
        return;
    }
    if ((flags & MAP_TYPE) != MAP_SHARED && (flags & MAP_TYPE) != MAP_SHARED_VALIDATE)
        ff_die("%s is mapped privately; give the VMM's memory backend share=on", name);
    if (fstat(fd, &status) || offset != 0 || (uint64_t)status.st_size != length)
        ff_die("%s: %zu bytes mapped at %ld of a file of %ld; map the whole file", name, length, (long)offset,
               (long)status.st_size);
    if (status.st_blocks)
        ff_die("%s already holds %ld KiB; pages that are there are never fetched; remove it and start again", name,
               (long)status.st_blocks / 2);
    pthread_rwlock_wrlock(&lock);
    if (!ff_state)
        make_state();
    if (ff_uffd < 0)
        ff_uffd = make_userfaultfd(UFFD_FEATURE_THREAD_ID | UFFD_FEATURE_EVENT_REMOVE);
    *region = (struct ff_region){.base = address, .size = length, .page_size = page_size_of(fd)};
    region->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    watch(ff_uffd, address, length);
    if (ff_config.mode == FF_MODE_NOWAIT) {
        if (ff_alias_uffd < 0)
            ff_alias_uffd = make_userfaultfd(UFFD_FEATURE_SIGBUS);
        region->alias = ff_real_mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
        if (region->alias == MAP_FAILED || region->fd < 0)
            ff_die("%s: alias mapping: %s", name, strerror(errno));
        madvise(region->alias, length, MADV_DONTFORK);
        watch(ff_alias_uffd, region->alias, length);
    }
    bool all = ++mapped_count == ff_config.ram_count;
    if (all) {
        uint64_t flat = 0;
        for (unsigned i = 0; i < ff_config.ram_count; i++) {
            ff_regions[i].offset = flat;
            flat += ff_regions[i].size;
        }
        publish_slots();
    }
    pthread_rwlock_unlock(&lock);
    if (all)
        ff_control_start();
}

static void remember_slot(const struct kvm_userspace_memory_region *set, unsigned region)
{
    struct slot *free_entry = NULL, *entry = NULL;
    for (unsigned i = 0; i < FF_SLOTS_MAX && !entry; i++) {
        if (slots[i].size && slots[i].id == set->slot)
            entry = &slots[i];
        else if (!slots[i].size && !free_entry)
            free_entry = &slots[i];
    }
    entry = entry ? entry : free_entry;
    if (!set->memory_size) {
        if (entry && entry->size)
            *entry = (struct slot){0};
    } else if (!entry) {
        ff_die("more than %u memslots", FF_SLOTS_MAX);
    } else {
        *entry = (struct slot){.id = set->slot, .flags = set->flags, .gpa = set->guest_phys_addr,
                               .size = set->memory_size, .region = region,
                               .region_offset = set->userspace_addr - (uintptr_t)ff_regions[region].base};
    }
    publish_slots();
}

/* Kernel NOWAIT: the slot's vCPU faults leave KVM_RUN; some kernels annotate them only when told to. */
static void add_slot_flag(int vm_fd, uint8_t *region, uint32_t flags)
{
    static atomic_bool informed;
    flags |= ff_config.slot_flag;
    memcpy(region + offsetof(struct kvm_userspace_memory_region, flags), &flags, sizeof flags);
    if (ff_config.info_capability && !atomic_exchange(&informed, true)) {
        struct kvm_enable_cap enable = {.cap = ff_config.info_capability, .args = {MEMORY_FAULT_INFO_ENABLE}};
        if (ff_real_ioctl(vm_fd, KVM_ENABLE_CAP, &enable))
            ff_log("KVM_ENABLE_CAP(%u): %s; exits may carry no address", ff_config.info_capability, strerror(errno));
    }
}

int ff_memory_set_slot(int vm_fd, unsigned long request, const void *argument, size_t argument_bytes)
{
    uint8_t copy[256];
    struct kvm_userspace_memory_region set;
    if (argument_bytes > sizeof copy)
        return ff_real_ioctl(vm_fd, request, argument);
    memcpy(copy, argument, argument_bytes);
    memcpy(&set, argument, sizeof set); /* region2 begins with the fields of region */
    unsigned region = 0;
    while (region < ff_config.ram_count &&
           !(ff_regions[region].base && set.userspace_addr - (uintptr_t)ff_regions[region].base < ff_regions[region].size))
        region++;
    bool ours = region < ff_config.ram_count;
    if (ours && ff_regions[region].alias) {
        uint64_t alias = (uintptr_t)ff_regions[region].alias + (set.userspace_addr - (uintptr_t)ff_regions[region].base);
        memcpy(copy + offsetof(struct kvm_userspace_memory_region, userspace_addr), &alias, sizeof alias);
    }
    if (ours && ff_config.mode == FF_MODE_KERNEL_NOWAIT)
        add_slot_flag(vm_fd, copy, set.flags);
    int result = ff_real_ioctl(vm_fd, request, copy);
    if (result == 0 && (ours || !set.memory_size)) {
        pthread_rwlock_wrlock(&lock);
        remember_slot(&set, region);
        pthread_rwlock_unlock(&lock);
    }
    return result;
}

uint8_t *ff_memory_at(uint64_t gpa, uint64_t size, bool for_kvm)
{
    uint8_t *found = NULL;
    pthread_rwlock_rdlock(&lock);
    for (unsigned i = 0; i < FF_SLOTS_MAX && !found; i++) {
        const struct slot *slot = &slots[i];
        if (slot->size && gpa >= slot->gpa && gpa - slot->gpa < slot->size && size <= slot->size - (gpa - slot->gpa)) {
            const struct ff_region *region = &ff_regions[slot->region];
            uint8_t *start = for_kvm && region->alias ? region->alias : region->base;
            found = start ? start + slot->region_offset + (gpa - slot->gpa) : NULL;
        }
    }
    pthread_rwlock_unlock(&lock);
    return found;
}
