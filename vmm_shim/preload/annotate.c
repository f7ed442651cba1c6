/* The address of an EFAULT exit.
 *
 * A kernel with annotated exits writes it into struct kvm_run. Elsewhere the newest sample of a KVM
 * tracepoint has it: a perf event of this thread writes backward into a ring that overwrites its oldest
 * samples, so the newest is always there, however many page walks lie between two exits
 * (perf_event_open(2), attr.write_backward).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <linux/perf_event.h>

#include "shim.h"

#define EXIT_MEMORY_FAULT 39 /* KVM_EXIT_MEMORY_FAULT, Linux 6.8 */
#define PAGE_BYTES 4096u
#define RING_BYTES (8u * PAGE_BYTES)
#define RECORDS_MAX 8 /* records looked at to find the newest sample */

/* struct kvm_run's memory_fault, at the start of its union. */
struct memory_fault {
    uint64_t flags, gpa, size;
};

void ff_sampler_close(struct ff_sampler *sampler)
{
    if (sampler->ring)
        munmap(sampler->ring, PAGE_BYTES + RING_BYTES);
    if (sampler->fd > 0)
        close(sampler->fd);
    *sampler = (struct ff_sampler){.fd = -1};
}

bool ff_sampler_open(struct ff_sampler *sampler)
{
    ff_sampler_close(sampler);
    if (!ff_config.tracepoint_id)
        return false;
    struct perf_event_attr attributes = {
        .type = PERF_TYPE_TRACEPOINT,
        .size = sizeof attributes,
        .config = ff_config.tracepoint_id,
        .sample_period = 1,
        .sample_type = PERF_SAMPLE_RAW,
        .write_backward = 1,
    };
    sampler->fd = (int)syscall(SYS_perf_event_open, &attributes, 0, -1, -1, PERF_FLAG_FD_CLOEXEC);
    if (sampler->fd < 0) {
        ff_log("perf_event_open: %s; exits cannot be annotated: run as root or with CAP_PERFMON, or use "
               "--fault-source blocking", strerror(errno));
        return false;
    }
    void *ring = ff_real_mmap(NULL, PAGE_BYTES + RING_BYTES, PROT_READ, MAP_SHARED, sampler->fd, 0);
    if (ring == MAP_FAILED)
        ff_log("perf ring: %s; exits cannot be annotated", strerror(errno));
    else
        sampler->ring = ring;
    return sampler->ring != NULL;
}

static void copy_out(const uint8_t *ring, uint64_t position, void *target, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++)
        ((uint8_t *)target)[i] = ring[(position + i) % RING_BYTES];
}

/* The newest address since the last call. Samples come from this very thread, so none is written meanwhile. */
static bool newest(struct ff_sampler *sampler, uint64_t *address)
{
    if (!sampler->ring)
        return false;
    const struct perf_event_mmap_page *page = sampler->ring;
    const uint8_t *ring = (const uint8_t *)sampler->ring + PAGE_BYTES;
    uint64_t head = __atomic_load_n(&page->data_head, __ATOMIC_ACQUIRE), position = head;
    uint64_t older = sampler->head;
    sampler->head = head;
    for (int i = 0; i < RECORDS_MAX && position != older; i++) {
        struct perf_event_header header;
        copy_out(ring, position, &header, sizeof header);
        if (header.size < sizeof header)
            return false;
        if (header.type == PERF_RECORD_SAMPLE) {
            *address = 0; /* the raw data follow a 32-bit size */
            copy_out(ring, position + sizeof header + 4 + ff_config.address_offset, address, ff_config.address_size);
            return true;
        }
        position += header.size;
    }
    return false;
}

void ff_annotate(struct ff_sampler *sampler, int vcpu_fd, const struct kvm_run *run, struct ff_report *report)
{
    uint64_t address;
    if (report->exit_reason == EXIT_MEMORY_FAULT) {
        struct memory_fault fault;
        memcpy(&fault, &run->hw, sizeof fault);
        report->address_source = FF_ADDRESS_KVM_RUN;
        report->flags = fault.flags;
        report->gpa = fault.gpa;
        report->size = fault.size;
    } else if (!newest(sampler, &address)) {
        report->address_source = FF_ADDRESS_NONE;
    } else if (ff_config.address_source == FF_ADDRESS_TRACEPOINT_GPA) {
        report->address_source = FF_ADDRESS_TRACEPOINT_GPA;
        report->gpa = address;
    } else {
        struct kvm_translation translation = {.linear_address = address};
        report->gva = address;
        if (ff_real_ioctl(vcpu_fd, KVM_TRANSLATE, &translation) || !translation.valid) {
            report->translate_failed = 1;
        } else {
            report->address_source = FF_ADDRESS_TRACEPOINT_GVA;
            report->gpa = translation.physical_address;
        }
        (void)newest(sampler, &address); /* the translation's own page walk */
    }
}
