/* KVM_RUN of one vCPU: exits that may be far faults are reported, and the receiver's verdict is obeyed. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "shim.h"

#ifndef MADV_POPULATE_WRITE /* Linux 5.14 */
#define MADV_POPULATE_WRITE 23
#endif
#define PAGE_BYTES 4096u
#define RELEASED_RETRIES_MAX 64 /* restarts in a row at one address once nobody decides any more */
#define SIGNAL_SET_BYTES 8 /* of the kernel's sigset_t */

struct vcpu {
    int fd; /* 0: the entry is free */
    uint32_t id;
    pid_t tid;
    struct kvm_run *run;
    struct ff_sampler sampler;
    int channel;             /* of the vCPU thread only; -1: none */
    atomic_int next_channel; /* from the control thread; -1: none */
    uint32_t seq;
    uint64_t last_gpa;
    uint64_t released_gpa;     /* of the exits after the release, and how many came in a row at it */
    unsigned released_retries;
    atomic_bool needs_start; /* pages that KVM itself touches must be installed before the next KVM_RUN */
    bool mmio_pending;       /* an MMIO exit waits for its verdict over a kick: KVM must not run before */
    bool has_signal_mask;
    uint8_t signal_mask[SIGNAL_SET_BYTES];
};

static struct vcpu vcpus[FF_VCPUS_MAX];
static atomic_uint vcpu_count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread struct vcpu *mine;

static struct vcpu *find(int fd)
{
    if (mine && mine->fd == fd)
        return mine;
    unsigned count = atomic_load(&vcpu_count);
    for (unsigned i = 0; i < count; i++)
        if (vcpus[i].fd == fd)
            return &vcpus[i];
    return NULL;
}

void ff_vcpu_created(int fd, uint32_t id)
{
    if (id >= FF_VCPUS_MAX)
        ff_die("vCPU %u: more than %u are not supported", id, FF_VCPUS_MAX);
    struct kvm_run *run = ff_real_mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (run == MAP_FAILED)
        ff_die("vCPU %u: %s", id, strerror(errno));
    pthread_mutex_lock(&lock);
    struct vcpu *vcpu = find(fd);
    unsigned count = atomic_load(&vcpu_count);
    if (!vcpu && count == FF_VCPUS_MAX)
        ff_die("more than %u vCPUs are not supported", FF_VCPUS_MAX);
    if (!vcpu)
        vcpu = &vcpus[count];
    *vcpu = (struct vcpu){.fd = fd, .id = id, .run = run, .channel = -1, .next_channel = -1, .needs_start = true};
    if (vcpu == &vcpus[count])
        atomic_store(&vcpu_count, count + 1);
    pthread_mutex_unlock(&lock);
}

void ff_vcpu_msrs_set(int fd, const struct kvm_msrs *msrs)
{
    static const uint32_t listed[FF_MSRS] = FF_MSR_LIST;
    struct vcpu *vcpu = find(fd);
    for (uint32_t i = 0; vcpu && i < msrs->nmsrs; i++)
        for (unsigned k = 0; k < FF_MSRS; k++)
            if (msrs->entries[i].index == listed[k])
                atomic_store(&vcpu->needs_start, true);
}

void ff_vcpu_signal_mask(int fd, const struct kvm_signal_mask *mask)
{
    struct vcpu *vcpu = find(fd);
    if (!vcpu)
        return;
    vcpu->has_signal_mask = mask && mask->len == SIGNAL_SET_BYTES;
    if (vcpu->has_signal_mask)
        memcpy(vcpu->signal_mask, mask->sigset, SIGNAL_SET_BYTES);
}

void ff_vcpu_channels(void (*announce)(const struct ff_vcpu_hello *, int))
{
    unsigned count = atomic_load(&vcpu_count);
    for (unsigned i = 0; i < count; i++) {
        struct vcpu *vcpu = &vcpus[i];
        int pair[2];
        if (!vcpu->tid || vcpu->fd <= 0)
            continue;
        if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair)) {
            ff_log("vCPU %u: channel: %s", vcpu->id, strerror(errno));
            continue;
        }
        struct ff_vcpu_hello hello = {vcpu->id, (uint32_t)vcpu->tid};
        announce(&hello, pair[1]);
        close(pair[1]);
        int unused = atomic_exchange(&vcpu->next_channel, pair[0]);
        if (unused >= 0)
            close(unused);
    }
}

/* The vCPU's thread runs it for the first time, or a new thread took it over. */
static void adopt(struct vcpu *vcpu)
{
    mine = vcpu;
    pid_t tid = (pid_t)syscall(SYS_gettid);
    if (vcpu->tid == tid)
        return;
    vcpu->tid = tid;
    if (ff_state)
        ff_state->vcpus[vcpu->id].tid = (uint32_t)tid;
    if (ff_config.mode != FF_MODE_BLOCKING) {
        (void)ff_sampler_open(&vcpu->sampler);
        ff_control_new_vcpu();
    }
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void send_report(struct vcpu *vcpu, const struct ff_report *report)
{
    if (vcpu->channel >= 0 && send(vcpu->channel, report, sizeof *report, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) {
        close(vcpu->channel); /* the receiver is gone; the next one brings a new channel */
        vcpu->channel = -1;
    }
}

/* True: a verdict for this report is in *verdict. Stale ones are dropped. */
static bool read_verdict(struct vcpu *vcpu, uint32_t seq, struct ff_verdict *verdict)
{
    for (;;) {
        ssize_t got = recv(vcpu->channel, verdict, sizeof *verdict, MSG_DONTWAIT);
        if (got == (ssize_t)sizeof *verdict && verdict->magic == FF_VERDICT_MAGIC) {
            if (verdict->seq == seq)
                return true;
        } else if (got < 0 && (errno == EAGAIN || errno == EINTR)) {
            return false;
        } else {
            close(vcpu->channel);
            vcpu->channel = -1;
            return false;
        }
    }
}

/* All memory is here: what KVM_RUN missed is at most not mapped. */
static struct ff_verdict verdict_after_release(struct vcpu *vcpu, const struct ff_report *report)
{
    if (report->ret == 0)
        return (struct ff_verdict){.verdict = FF_VERDICT_COMPLETE};
    vcpu->released_retries = report->gpa == vcpu->released_gpa ? vcpu->released_retries + 1 : 1;
    vcpu->released_gpa = report->gpa;
    if (vcpu->released_retries > RELEASED_RETRIES_MAX) {
        vcpu->released_retries = 0;
        ff_log("vCPU %u: KVM_RUN keeps failing with EFAULT after the release: gpa %#lx, rip %#lx; the VMM gets the error",
               vcpu->id, (unsigned long)report->gpa, (unsigned long)report->rip);
        return (struct ff_verdict){.verdict = FF_VERDICT_PASS};
    }
    if (report->address_source == FF_ADDRESS_NONE)
        return (struct ff_verdict){.verdict = FF_VERDICT_RETRY};
    return (struct ff_verdict){.verdict = FF_VERDICT_RETRY, .flags = FF_VERDICT_POPULATE,
                               .gpa = report->gpa & ~(uint64_t)(PAGE_BYTES - 1), .size = PAGE_BYTES};
}

/* Waits for as long as it takes, and stays stoppable. 0: *verdict holds; -1: a kick came (errno EINTR). */
static int wait_verdict(struct vcpu *vcpu, struct ff_report *report, struct ff_verdict *verdict)
{
    struct ff_vcpu_counters *counters = &ff_state->vcpus[vcpu->id];
    const struct timespec interval = {.tv_nsec = FF_WAIT_POLL_MS * 1000000L};
    uint64_t began = now_ns();
    int result = 0;
    report->seq = ++vcpu->seq;
    counters->waiting = 1;
    send_report(vcpu, report);
    for (;;) {
        int fresh = atomic_exchange(&vcpu->next_channel, -1);
        if (fresh >= 0) {
            if (vcpu->channel >= 0)
                close(vcpu->channel);
            vcpu->channel = fresh;
            send_report(vcpu, report);
        }
        if (vcpu->channel >= 0 && read_verdict(vcpu, report->seq, verdict))
            break;
        if (atomic_load(&ff_released)) {
            *verdict = verdict_after_release(vcpu, report);
            break;
        }
        if (vcpu->run->immediate_exit) {
            result = -1;
            break;
        }
        struct pollfd waiting = {.fd = vcpu->channel, .events = POLLIN};
        struct timespec left = interval;
        const void *mask = vcpu->has_signal_mask ? vcpu->signal_mask : NULL;
        if (syscall(SYS_ppoll, &waiting, 1, &left, mask, SIGNAL_SET_BYTES) < 0 && errno == EINTR) {
            result = -1;
            break;
        }
    }
    counters->waiting = 0;
    counters->blocked_ns += now_ns() - began;
    if (result) {
        counters->kicks++;
        errno = EINTR;
    }
    return result;
}

/* Reports what the processor can reach by itself: control registers and para-virtual MSRs. */
static int report_start(struct vcpu *vcpu)
{
    static const uint32_t listed[FF_MSRS] = FF_MSR_LIST;
    struct ff_report report = {.magic = FF_REPORT_MAGIC, .kind = FF_REPORT_START, .vcpu = vcpu->id, .ret = -1};
    struct ff_verdict verdict;
    struct kvm_sregs sregs;
    atomic_store(&vcpu->needs_start, false);
    if (ff_real_ioctl(vcpu->fd, KVM_GET_SREGS, &sregs) == 0) {
        report.cr0 = sregs.cr0;
        report.cr3 = sregs.cr3;
        report.cr4 = sregs.cr4;
        report.efer = sregs.efer;
    }
    for (unsigned i = 0; i < FF_MSRS; i++) {
        struct {
            struct kvm_msrs head;
            struct kvm_msr_entry entry;
        } one = {.head.nmsrs = 1, .entry.index = listed[i]};
        if (ff_real_ioctl(vcpu->fd, KVM_GET_MSRS, &one) == 1)
            report.msrs[i] = one.entry.data;
    }
    report.exit_ns = now_ns();
    if (wait_verdict(vcpu, &report, &verdict)) {
        atomic_store(&vcpu->needs_start, true);
        return -1;
    }
    return 0;
}

/* Finishes an emulated access to RAM through the VMM's mapping, whole where it is aligned. */
static bool complete_mmio(struct kvm_run *run)
{
    uint8_t *memory = ff_memory_at(run->mmio.phys_addr, run->mmio.len, false);
    if (!memory || run->mmio.len > sizeof run->mmio.data)
        return false;
    void *to = run->mmio.is_write ? memory : run->mmio.data;
    const void *from = run->mmio.is_write ? run->mmio.data : memory;
    uint64_t value = 0;
    bool aligned = (uintptr_t)memory % run->mmio.len == 0;
    if (aligned && run->mmio.len == 8) {
        __atomic_store_n((uint64_t *)to, __atomic_load_n((const uint64_t *)from, __ATOMIC_RELAXED), __ATOMIC_RELAXED);
    } else if (aligned && run->mmio.len == 4) {
        __atomic_store_n((uint32_t *)to, __atomic_load_n((const uint32_t *)from, __ATOMIC_RELAXED), __ATOMIC_RELAXED);
    } else {
        memcpy(&value, from, run->mmio.len);
        memcpy(to, &value, run->mmio.len);
    }
    return true;
}

/* What to do after an exit that was reported: 1 restart KVM_RUN, 0 give the VMM its result, -1 a kick. */
static int settle(struct vcpu *vcpu, struct ff_report *report)
{
    struct ff_vcpu_counters *counters = &ff_state->vcpus[vcpu->id];
    struct ff_verdict verdict;
    if (wait_verdict(vcpu, report, &verdict))
        return -1;
    switch (verdict.verdict) {
    case FF_VERDICT_RETRY:
        if (verdict.flags & FF_VERDICT_POPULATE) {
            uint8_t *memory = ff_memory_at(verdict.gpa, verdict.size, true);
            if (memory)
                (void)madvise(memory, verdict.size, MADV_POPULATE_WRITE);
        }
        return 1;
    case FF_VERDICT_COMPLETE:
        if (complete_mmio(vcpu->run))
            return 1;
        break;
    default:
        break;
    }
    counters->passed++;
    return 0;
}

static void describe_fault(struct vcpu *vcpu, struct ff_report *report)
{
    struct ff_vcpu_counters *counters = &ff_state->vcpus[vcpu->id];
    ff_annotate(&vcpu->sampler, vcpu->fd, vcpu->run, report);
    if (report->exit_reason)
        counters->exits_annotated++;
    else
        counters->exits_bare++;
    if (report->address_source == FF_ADDRESS_NONE)
        counters->lost_samples++;
    if (report->address_source == FF_ADDRESS_NONE || report->gpa == vcpu->last_gpa) {
        struct kvm_regs registers; /* for the log line of an exit that makes no progress */
        if (ff_real_ioctl(vcpu->fd, KVM_GET_REGS, &registers) == 0)
            report->rip = registers.rip;
    }
    vcpu->last_gpa = report->gpa;
}

static int run_nowait(struct vcpu *vcpu, void *argument)
{
    struct kvm_run *run = vcpu->run;
    for (;;) {
        int result = 0, error = 0;
        if (atomic_load_explicit(&vcpu->needs_start, memory_order_relaxed) && !run->immediate_exit &&
            report_start(vcpu))
            return -1;
        if (!vcpu->mmio_pending) {
            run->exit_reason = 0;
            result = ff_real_ioctl(vcpu->fd, KVM_RUN, argument);
            error = errno;
        }
        bool fault = result < 0 && error == EFAULT;
        bool mmio = result == 0 && run->exit_reason == KVM_EXIT_MMIO;
        if (!fault && !(mmio && ff_memory_at(run->mmio.phys_addr, 1, false))) {
            errno = error;
            return result;
        }
        struct ff_report report = {.magic = FF_REPORT_MAGIC, .kind = FF_REPORT_EXIT, .vcpu = vcpu->id, .ret = result,
                                   .err = fault ? error : 0, .exit_reason = run->exit_reason, .exit_ns = now_ns()};
        if (fault) {
            describe_fault(vcpu, &report);
        } else {
            report.address_source = FF_ADDRESS_MMIO;
            report.gpa = run->mmio.phys_addr;
            report.mmio_len = run->mmio.len;
            report.mmio_is_write = run->mmio.is_write;
            ff_state->vcpus[vcpu->id].exits_mmio += !vcpu->mmio_pending;
        }
        int next = settle(vcpu, &report);
        vcpu->mmio_pending = mmio && next < 0;
        if (next < 0) {
            errno = EINTR;
            return -1;
        }
        if (next == 0) {
            errno = error;
            return result;
        }
    }
}

int ff_vcpu_run(int fd, void *argument)
{
    struct vcpu *vcpu = find(fd);
    if (!vcpu || !ff_state)
        return ff_real_ioctl(fd, KVM_RUN, argument);
    adopt(vcpu);
    if (ff_config.mode == FF_MODE_BLOCKING)
        return ff_real_ioctl(fd, KVM_RUN, argument);
    return run_nowait(vcpu, argument);
}
