/* libfarfault_shim.so: layers.
 *
 *   exports.c   mmap, mmap64, ioctl as the VMM calls them; inert unless FARFAULT_ATTACH is set
 *   vcpu.c      KVM_RUN: report an exit that may be a far fault, wait for the verdict, obey it
 *   annotate.c  the address of an EFAULT exit: struct kvm_run or a tracepoint sample
 *   memory.c    RAM files: alias mappings, userfaultfd, memslots
 *   control.c   the attach socket: hand-over, re-attach for ever, release
 *   real.c      the C library's own functions, configuration, log
 *
 * The library decides nothing about pages: the receiver does (farfault_shim.exits.classifier).
 */
#ifndef FARFAULT_SHIM_H
#define FARFAULT_SHIM_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include <linux/kvm.h>

#include "farfault_attach.h"

#define FF_WAIT_POLL_MS 20        /* a waiting vCPU looks at immediate_exit at least this often */
#define FF_ATTACH_RETRY_MS 100    /* between two attempts to reach the receiver */
#define FF_REFUSED_RETRY_MS 1000  /* after the receiver refused the hand-over */
#define FF_PATH_BYTES 4096

enum ff_mode { FF_MODE_OFF, FF_MODE_BLOCKING, FF_MODE_NOWAIT, FF_MODE_KERNEL_NOWAIT };

/* ---- real.c ---- */
struct ff_config {
    enum ff_mode mode;
    char attach_path[108];
    char ram[FF_REGIONS_MAX][FF_PATH_BYTES]; /* a path, or "memfd=NAME" */
    unsigned ram_count;
    uint64_t tracepoint_id; /* 0: no annotator */
    uint32_t address_offset;
    uint32_t address_size;
    enum ff_address_source address_source;
    uint32_t slot_flag;       /* kernel NOWAIT: set on every memslot in RAM */
    uint32_t info_capability; /* kernel NOWAIT: KVM_CAP_MEMORY_FAULT_INFO where it must be enabled; 0: not */
    int userfaultfd_device;   /* inherited descriptor of /dev/userfaultfd; -1: none */
};
extern struct ff_config ff_config;
extern void *(*ff_real_mmap)(void *, size_t, int, int, int, off_t);
extern int (*ff_real_ioctl)(int, unsigned long, ...);
void ff_log(const char *format, ...) __attribute__((format(printf, 1, 2)));
_Noreturn void ff_die(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* ---- memory.c ---- */
struct ff_region {
    uint8_t *base;  /* the VMM's own mapping; NULL: not mapped yet */
    uint8_t *alias; /* KVM's mapping in stock NOWAIT mode; else NULL: KVM uses the base */
    uint64_t size;
    uint64_t offset; /* in the flat space; valid once all regions are mapped */
    uint32_t page_size;
    int fd;
};
extern struct ff_region ff_regions[FF_REGIONS_MAX];
extern int ff_uffd, ff_alias_uffd, ff_state_fd;
extern struct ff_state *ff_state;
void ff_memory_mapped(void *address, size_t length, int flags, int fd, off_t offset);
int ff_memory_set_slot(int vm_fd, unsigned long request, const void *argument, size_t argument_bytes);
/* The VMM's or (for_kvm) KVM's address of guest memory; NULL where [gpa, gpa+size) is in no slot. */
uint8_t *ff_memory_at(uint64_t gpa, uint64_t size, bool for_kvm);

/* ---- annotate.c ---- */
struct ff_sampler {
    void *ring;
    int fd;
    uint64_t head;
};
/* False: this thread's exits cannot be annotated; the log says why, where there is a tracepoint at all. */
bool ff_sampler_open(struct ff_sampler *sampler);
void ff_sampler_close(struct ff_sampler *sampler);
void ff_annotate(struct ff_sampler *sampler, int vcpu_fd, const struct kvm_run *run, struct ff_report *report);

/* ---- vcpu.c ---- */
void ff_vcpu_created(int vcpu_fd, uint32_t vcpu);
void ff_vcpu_msrs_set(int vcpu_fd, const struct kvm_msrs *msrs);
void ff_vcpu_signal_mask(int vcpu_fd, const struct kvm_signal_mask *mask);
int ff_vcpu_run(int vcpu_fd, void *argument);
/* Control thread: gives every known vCPU a fresh channel by calling announce(hello, descriptor). */
void ff_vcpu_channels(void (*announce)(const struct ff_vcpu_hello *, int));

/* ---- control.c ---- */
extern atomic_bool ff_released;
void ff_control_start(void);
void ff_control_new_vcpu(void); /* a vCPU without a channel appeared */

#endif
