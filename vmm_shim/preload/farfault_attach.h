/* The attach protocol between a VMM and its receiver: what lies on the wire, byte for byte.
 *
 * docs/attach-protocol.md tells the story; farfault_shim/attach/wire.py holds the same structs and a
 * test compares the two. All integers are little-endian (x86-64, aarch64 hosts).
 *
 * 1. Hand-over. The VMM connects to the receiver's unix stream socket and sends, in one sendmsg, the
 *    JSON array that Firecracker sends, one object a region:
 *      [{"base_host_virt_addr":N,"size":N,"offset":N,"page_size":4096,"page_size_kib":4096}, ...]
 *    with the userfaultfd of that mapping as the first descriptor (SCM_RIGHTS). "offset" places the
 *    region in the flat space of all regions; every offset below is in that space.
 *    The extension adds to each object  "alias_host_virt_addr":N  (0: none) and to the first one
 *      "farfault":{"version":1,"fault_source":"stock-nowait","fds":["uffd","alias_uffd","state","ram0",...]}
 *    fault_source: "stock-nowait" (alias under a SIGBUS userfaultfd), "blocking", "kernel-nowait" or
 *    "simulated". "fds" names the descriptors in order. A plain Firecracker peer sends neither.
 * 2. Frames on the same stream: struct ff_frame, then `length` bytes of payload.
 * 3. One SOCK_SEQPACKET pair a vCPU, one end sent with FF_FRAME_VCPU: struct ff_report up, struct
 *    ff_verdict down, at most one report outstanding; `seq` pairs them and a stale verdict is dropped.
 */
#ifndef FARFAULT_ATTACH_H
#define FARFAULT_ATTACH_H

#include <stdint.h>

#define FF_ATTACH_VERSION 1u
#define FF_HANDOVER_BYTES_MAX 65536u
#define FF_REGIONS_MAX 64u
#define FF_SLOTS_MAX 512u
#define FF_VCPUS_MAX 1024u
#define FF_MSRS 12u
#define FF_FRAME_BYTES_MAX 4096u

enum ff_frame_type {
    FF_FRAME_VCPU = 1,     /* VMM -> receiver: struct ff_vcpu_hello and one SOCK_SEQPACKET descriptor */
    FF_FRAME_RELEASED = 2, /* receiver -> VMM: all memory is installed and unregistered; pass everything on */
    FF_FRAME_READY = 3,    /* receiver -> VMM: the hand-over was accepted */
    FF_FRAME_REFUSED = 4,  /* receiver -> VMM: payload is the reason, UTF-8; the VMM reports it and keeps trying */
};

struct ff_frame {
    uint32_t type;
    uint32_t length; /* bytes of payload, at most FF_FRAME_BYTES_MAX */
};

struct ff_vcpu_hello {
    uint32_t vcpu; /* the argument of KVM_CREATE_VCPU */
    uint32_t tid;
};

#define FF_REPORT_MAGIC 0x31524646u  /* "FFR1" */
#define FF_VERDICT_MAGIC 0x31564646u /* "FFV1" */
#define FF_STATE_MAGIC 0x31534646u   /* "FFS1" */

enum ff_report_kind {
    FF_REPORT_EXIT = 1,  /* KVM_RUN returned something that may be a far fault */
    FF_REPORT_START = 2, /* before a vCPU's first KVM_RUN, and again after KVM_SET_MSRS of a listed MSR */
};

enum ff_address_source {
    FF_ADDRESS_NONE = 0,
    FF_ADDRESS_KVM_RUN = 1,        /* memory_fault of struct kvm_run */
    FF_ADDRESS_TRACEPOINT_GVA = 2, /* kvmmmu:kvm_mmu_pagetable_walk, then KVM_TRANSLATE */
    FF_ADDRESS_TRACEPOINT_GPA = 3, /* kvm:kvm_page_fault */
    FF_ADDRESS_MMIO = 4,           /* mmio.phys_addr of struct kvm_run */
    FF_ADDRESS_DECODED = 5,        /* instruction decode */
};

struct ff_report {
    uint32_t magic;
    uint16_t kind;
    uint16_t address_source;
    uint32_t vcpu;
    uint32_t seq;
    int32_t ret;          /* of KVM_RUN: 0 or -1 */
    int32_t err;          /* errno where ret is -1 */
    uint32_t exit_reason; /* cleared to 0 before KVM_RUN, so 0 means "untouched" */
    uint32_t mmio_len;
    uint64_t flags; /* memory_fault.flags */
    uint64_t gpa;   /* valid where address_source is not NONE */
    uint64_t size;  /* memory_fault.size; 0 where unknown */
    uint64_t gva;
    uint64_t rip;
    uint64_t exit_ns; /* CLOCK_MONOTONIC at the exit */
    uint32_t mmio_is_write;
    uint32_t translate_failed; /* a GVA was sampled but KVM_TRANSLATE found no mapping */
    uint64_t cr0, cr3, cr4, efer; /* START only */
    uint64_t msrs[FF_MSRS];       /* START only, in the order of FF_MSR_LIST; 0 where not readable */
};

/* Pages that KVM itself writes: kvmclock, wall clock, async page fault, steal time, PV EOI (new and old
 * numbers), then Hyper-V's reference TSC, VP assist, SIMP, SIEFP, hypercall. */
#define FF_MSR_LIST                                                                                        \
    {0x4b564d00, 0x4b564d01, 0x4b564d02, 0x4b564d03, 0x4b564d04, 0x11,                                     \
     0x12,       0x40000021, 0x40000073, 0x40000083, 0x40000082, 0x40000001}

enum ff_verdict_kind {
    FF_VERDICT_RETRY = 1,    /* restart KVM_RUN */
    FF_VERDICT_PASS = 2,     /* give the VMM the result it would have had */
    FF_VERDICT_COMPLETE = 3, /* finish the MMIO access in RAM through the mapping, then restart */
};

#define FF_VERDICT_POPULATE 1u /* first make [gpa, gpa + size) present with MADV_POPULATE_WRITE */

struct ff_verdict {
    uint32_t magic;
    uint32_t seq;
    uint32_t verdict;
    uint32_t flags;
    uint64_t gpa;
    uint64_t size;
};

/* The "state" memfd: written by the VMM side, read by the receiver (and again by the next one). */
struct ff_slot {
    uint32_t id;
    uint32_t flags;
    uint64_t gpa;
    uint64_t size;   /* 0: the entry is free */
    uint64_t offset; /* of the slot's first byte in the flat space */
};

struct ff_vcpu_counters {
    uint64_t exits_annotated;
    uint64_t exits_bare;
    uint64_t exits_mmio;
    uint64_t passed; /* verdict PASS */
    uint64_t kicks;  /* waits that a signal or immediate_exit ended */
    uint64_t blocked_ns;
    uint64_t lost_samples;
    uint32_t tid;
    uint32_t waiting; /* 1 while the vCPU waits for a verdict */
};

struct ff_state {
    uint32_t magic;
    uint32_t version;
    uint32_t pid;
    uint32_t slots_seq; /* seqlock: odd while slots change */
    uint32_t attach_epoch;
    uint32_t reserved[11];
    struct ff_slot slots[FF_SLOTS_MAX];
    struct ff_vcpu_counters vcpus[FF_VCPUS_MAX];
};

_Static_assert(sizeof(struct ff_frame) == 8, "ff_frame");
_Static_assert(sizeof(struct ff_vcpu_hello) == 8, "ff_vcpu_hello");
_Static_assert(sizeof(struct ff_report) == 216, "ff_report");
_Static_assert(sizeof(struct ff_verdict) == 32, "ff_verdict");
_Static_assert(sizeof(struct ff_slot) == 32, "ff_slot");
_Static_assert(sizeof(struct ff_vcpu_counters) == 64, "ff_vcpu_counters");
_Static_assert(sizeof(struct ff_state) == 64 + 32 * FF_SLOTS_MAX + 64 * FF_VCPUS_MAX, "ff_state");

#endif
