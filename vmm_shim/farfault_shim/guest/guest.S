# The self-verifying guest: a 64 KiB firmware that checks every byte it can lose.
#
# Reset (or a start-up IPI) -> real mode -> 32-bit protected mode -> long mode -> CPL3, where each vCPU
# runs `worker` for ever on its own slice of the data pages: fill them once, then verify and change each
# of them, round after round; or, with a skew, some of them far more often than others. Nothing runs at
# CPL0 after that: no interrupt, no system call, no stack. KVM on some hosts emulates CPL0 at about 1 MIPS,
# so the code before CPL3 is kept short.
#
# `worker` is position independent and needs only: long mode, CPL3, RAM identity-mapped and accessible to
# the user, RDTSC allowed (CR4.TSD clear), rdi = vCPU index, the parameter block at PARAMETERS. A VMM that
# can set registers starts it directly, without the firmware.
#
# The .equ lines are the contract with addresses.py, parameters.py and mailbox.py; a test compares them.

# Low memory. 0xA0000-0xFFFFF is not RAM.
.equ PML4,              0x1000
.equ PDPT,              0x2000
.equ NEXT_VCPU,         0x7000          # u32: index of the next vCPU that starts
.equ WORKER,            0x8000          # copy of the code between worker and worker_end, at most a page
.equ PARAMETERS,        0x9000          # copy of the parameter block
.equ MAILBOXES,         0xA000          # 128 bytes a vCPU, up to 0xC000
.equ STACKS,            0xC000          # 64 bytes a vCPU: the frame of one iretq
.equ HISTOGRAMS,        0x20000         # a page a vCPU, up to 0x60000
.equ CLOCKS,            0x60000         # a page a vCPU, up to 0xA0000: struct pvclock_vcpu_time_info
.equ PAGE_DIRECTORIES,  0x100000        # a page for each GiB, up to 0x200000

# Parameter block: u64 fields.
.equ PARAMETERS_IN_IMAGE,     0xF000
.equ P_VCPUS,                 PARAMETERS + 32
.equ P_LOW_START,             PARAMETERS + 40
.equ P_LOW_PAGES,             PARAMETERS + 48
.equ P_HIGH_START,            PARAMETERS + 56
.equ P_PAGES_PER_VCPU,        PARAMETERS + 64
.equ P_STEP_BYTES,            PARAMETERS + 72
.equ P_ORDER_MULTIPLIER,      PARAMETERS + 80
.equ P_ORDER_INCREMENT,       PARAMETERS + 88
.equ P_ORDER_MASK,            PARAMETERS + 96
.equ P_ORDER_SHIFT,           PARAMETERS + 104
.equ P_CLOCK_INTERVAL_PAGES,  PARAMETERS + 112
.equ P_MAPPED_GIB,            PARAMETERS + 120
.equ P_SKEW_CLASSES,          PARAMETERS + 128   # 0: every page once a round
.equ P_ROUND_VISITS,          PARAMETERS + 136   # pages visited in a round with a skew
.equ P_PAUSE_TICKS,           PARAMETERS + 144   # of the TSC, after each visit with a skew
.equ PARAMETERS_BYTES,        152

# Mailbox of one vCPU: u64 fields.
.equ M_PASSES,            0             # verify rounds completed
.equ M_TOUCHED,           8             # pages verified, in all rounds
.equ M_ERRORS,            16            # words that were not what this vCPU had written
.equ M_CLOCK_LAST_NS,     24
.equ M_CLOCK_BACKWARDS,   32
.equ M_CLOCK_READS,       40
.equ M_CLOCK_VERSION,     48
.equ M_STATE,             56            # 0 boot, 1 fill, 2 verify
.equ M_ERROR_GPA,         64            # of the first error
.equ M_ERROR_SEEN,        72
.equ M_ERROR_EXPECTED,    80
.equ M_CLOCK_STEP_MAX_NS, 88
.equ M_ACCESS_MAX_TICKS,  96
.equ M_FILLED,            104           # pages filled
.equ M_BOOTS,             112           # times that this vCPU started; never cleared
.equ M_ACCESS_TICKS,      120           # TSC ticks of all accesses in the histogram

.equ GOLDEN, 0x9E3779B97F4A7C15         # page n first holds (n + 1) * GOLDEN: never zero
.equ SECOND_WORD, 2048                  # + 8 * vCPU: offset of the second word in each page

.equ STATE_FILL,   1
.equ STATE_VERIFY, 2

# Behind the buckets in the vCPU's histogram page: steps that each class of a skew has gone, u64.
.equ CLASS_STEPS,     512

# struct pvclock_vcpu_time_info (Linux Documentation/virt/kvm/x86/msr.rst, MSR_KVM_SYSTEM_TIME_NEW),
# addressed from the vCPU's histogram page.
.equ C_VERSION,       CLOCKS - HISTOGRAMS
.equ C_TSC_TIMESTAMP, CLOCKS - HISTOGRAMS + 8
.equ C_SYSTEM_TIME,   CLOCKS - HISTOGRAMS + 16
.equ C_MULTIPLIER,    CLOCKS - HISTOGRAMS + 24
.equ C_SHIFT,         CLOCKS - HISTOGRAMS + 28

.equ APIC_SPURIOUS, 0xFEE000F0
.equ APIC_COMMAND,  0xFEE00300
.equ INIT_ALL_OTHERS,     0x000C4500
.equ START_UP_ALL_OTHERS, 0x000C46F0    # vector 0xF0: they start at 0xF0000, the first byte of this image

.equ CODE64, 0x08
.equ DATA,   0x10
.equ CODE32, 0x18
.equ USER_DATA,   0x28 | 3
.equ USER_CODE64, 0x30 | 3

.equ TABLE_ENTRY, 0x27                  # present, writable, user, accessed
.equ PAGE_ENTRY,  0xE7                  # the same, dirty, 2 MiB: KVM never has to write to a table

.text
image:

# ---- other vCPUs start here, by a start-up IPI: cs:ip = F000:0000 --------------------------------------
.code16
        mov     $1, %ebp
        jmp     enter

# ---- the first vCPU starts here, from the reset vector -------------------------------------------------
.globl _start
_start:
        xor     %ebp, %ebp
enter:                                  # ebp: 0 on the first vCPU, 1 on the others
        cli
        mov     %cs, %ax
        mov     %ax, %ds
        lgdtl   (gdt_pointer - image)
        mov     $0x11, %eax             # PE
        mov     %eax, %cr0
        ljmpl   $CODE32, $protected

# ---- 32-bit protected mode, no paging ------------------------------------------------------------------
.code32
protected:
        mov     $DATA, %ax
        mov     %ax, %ds
        mov     %ax, %es
        mov     %ax, %ss
        test    %ebp, %ebp
        jnz     other_vcpu

        cld
        mov     $parameters, %esi
        mov     $PARAMETERS, %edi
        mov     $(PARAMETERS_BYTES / 4), %ecx
        rep movsl
        mov     $worker, %esi
        mov     $WORKER, %edi
        mov     $((worker_end - worker + 3) / 4), %ecx
        rep movsl

        xor     %eax, %eax              # PML4 and PDPT lie side by side
        mov     $PML4, %edi
        mov     $2048, %ecx
        rep stosl
        movl    $(PDPT + TABLE_ENTRY), PML4
        mov     P_MAPPED_GIB, %ecx
        mov     $PDPT, %edi
        mov     $(PAGE_DIRECTORIES + TABLE_ENTRY), %eax
1:      mov     %eax, (%edi)
        add     $0x1000, %eax
        add     $8, %edi
        loop    1b

        mov     P_MAPPED_GIB, %ecx      # identity map of 2 MiB pages; esi:eax is the entry
        shl     $9, %ecx
        mov     $PAGE_DIRECTORIES, %edi
        mov     $PAGE_ENTRY, %eax
        xor     %esi, %esi
1:      mov     %eax, (%edi)
        mov     %esi, 4(%edi)
        add     $0x200000, %eax
        adc     $0, %esi
        add     $8, %edi
        loop    1b

        movl    $1, NEXT_VCPU
        xor     %esi, %esi              # the first vCPU is number 0
        cmpl    $1, P_VCPUS
        je      enter_long_mode
        movl    $0x1FF, APIC_SPURIOUS   # software enable
        movl    $INIT_ALL_OTHERS, APIC_COMMAND
        movl    $START_UP_ALL_OTHERS, APIC_COMMAND
        jmp     enter_long_mode

other_vcpu:
        mov     $1, %esi
        lock xadd %esi, NEXT_VCPU
        cmp     P_VCPUS, %esi
        jae     park

enter_long_mode:                        # esi: vCPU index
        mov     $0x20, %eax             # PAE
        mov     %eax, %cr4
        mov     $PML4, %eax
        mov     %eax, %cr3
        mov     $0xC0000080, %ecx       # EFER
        mov     $0x100, %eax            # LME
        xor     %edx, %edx
        wrmsr
        mov     $0x80010033, %eax       # PG, WP, NE, ET, MP, PE
        mov     %eax, %cr0
        ljmpl   $CODE64, $long_mode

park:                                   # more vCPUs than the parameters want
        hlt
        jmp     park

# ---- long mode -----------------------------------------------------------------------------------------
.code64
long_mode:
        mov     $USER_DATA, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     $DATA, %eax
        mov     %eax, %ss
        mov     %esi, %edi              # edi: vCPU index, zero-extended
        mov     %edi, %eax
        shl     $6, %eax
        lea     STACKS + 64(%rax), %esp

        cmpq    $0, P_CLOCK_INTERVAL_PAGES
        je      1f
        mov     $0x40000000, %eax       # a KVM guest? (not below Hyper-V's leaves, which we never ask for)
        cpuid
        cmp     $0x4B4D564B, %ebx       # "KVMK"
        jne     1f
        mov     $0x40000001, %eax
        cpuid
        test    $8, %al                 # KVM_FEATURE_CLOCKSOURCE2
        jz      1f
        mov     $0x4B564D01, %ecx       # MSR_KVM_SYSTEM_TIME_NEW
        mov     %edi, %eax
        shl     $12, %eax
        add     $(CLOCKS + 1), %eax
        xor     %edx, %edx
        wrmsr
1:
        pushq   $USER_DATA
        pushq   $0
        pushq   $2                      # flags: no interrupts, no I/O
        pushq   $USER_CODE64
        pushq   $WORKER
        iretq

# ---- CPL3 ----------------------------------------------------------------------------------------------
#   rdi  vCPU index, then expected word   r8   offset of the second word    r12  round; 0: fill
#   rsi  address of the page              r9   pages until the clock read   r13  first page of the slice
#   rbp  word seen                        r10  steps left in the round      r14  histogram
#   rbx  state of the order               r11  increment of the order       r15  mailbox
# With a skew: r10 visits left in the round, r11 class, r12 round of the class, from 1 on.

.macro check offset:vararg              # the word in rbp must be the one in rdi
        cmp     %rdi, %rbp
        je      9f
        incq    M_ERRORS(%r15)
        cmpq    $1, M_ERRORS(%r15)
        jne     9f
        lea     \offset, %rax
        mov     %rax, M_ERROR_GPA(%r15)
        mov     %rbp, M_ERROR_SEEN(%r15)
        mov     %rdi, M_ERROR_EXPECTED(%r15)
9:
.endm

.macro read_tsc                         # rax; clobbers rdx. Waits for the loads before it, holds back those after it
        lfence
        rdtsc
        lfence
        shl     $32, %rdx
        or      %rdx, %rax
.endm

worker:
        mov     %rdi, %r15
        shl     $7, %r15
        add     $MAILBOXES, %r15
        xor     %eax, %eax
.irp    field, M_PASSES, M_TOUCHED, M_ERRORS, M_FILLED, M_ERROR_GPA, M_ERROR_SEEN, M_ERROR_EXPECTED
        mov     %rax, \field(%r15)
.endr
.irp    field, M_CLOCK_LAST_NS, M_CLOCK_BACKWARDS, M_CLOCK_READS, M_CLOCK_VERSION, M_CLOCK_STEP_MAX_NS
        mov     %rax, \field(%r15)
.endr
        mov     %rax, M_ACCESS_MAX_TICKS(%r15)
        mov     %rax, M_ACCESS_TICKS(%r15)
        incq    M_BOOTS(%r15)

        mov     %rdi, %r14
        shl     $12, %r14
        add     $HISTOGRAMS, %r14
        mov     $128, %ecx              # buckets, and steps of classes
1:      mov     %rax, -8(%r14, %rcx, 8)
        dec     %ecx
        jnz     1b

        lea     SECOND_WORD(, %rdi, 8), %r8
        mov     %rdi, %r13
        imul    P_PAGES_PER_VCPU, %r13
        mov     P_CLOCK_INTERVAL_PAGES, %r9
        xor     %r12d, %r12d
        movq    $STATE_FILL, M_STATE(%r15)

# The order of a round is a full-period generator modulo a power of two, x = a * x + c, mixed by
# x ^ (x >> shift); numbers past the slice are skipped. a = c = 1 and shift = 63: ascending order.
round:
        test    %r12, %r12
        jz      1f
        cmpq    $0, P_SKEW_CLASSES
        jne     skew_round
1:      mov     P_ORDER_INCREMENT, %r11
        imul    %r12, %r11
        inc     %r11
        mov     P_ORDER_MASK, %rbx
        lea     1(%rbx), %r10
step:
        imul    P_ORDER_MULTIPLIER, %rbx
        add     %r11, %rbx
        and     P_ORDER_MASK, %rbx
        mov     %rbx, %rdx
        mov     P_ORDER_SHIFT, %ecx
        shr     %cl, %rdx
        xor     %rbx, %rdx
        cmp     P_PAGES_PER_VCPU, %rdx
        jae     next

visit:                                  # rdx: number of the page in the slice
        add     %r13, %rdx              # rdx: number of the data page
        mov     %rdx, %rsi
        mov     P_LOW_START, %rcx
        cmp     P_LOW_PAGES, %rsi
        jb      1f
        sub     P_LOW_PAGES, %rsi
        mov     P_HIGH_START, %rcx
1:      imul    P_STEP_BYTES, %rsi
        add     %rcx, %rsi

        lea     1(%rdx), %rdi
        mov     $GOLDEN, %rcx
        imul    %rcx, %rdi
        test    %r12, %r12
        jz      fill
        lea     -1(%rdi, %r12), %rdi    # what the round before has left

        read_tsc
        mov     %rax, %rcx
        mov     (%rsi), %rbp            # the access that may fault
        read_tsc
        sub     %rcx, %rax
        add     %rax, M_ACCESS_TICKS(%r15)
        cmp     M_ACCESS_MAX_TICKS(%r15), %rax
        jbe     1f
        mov     %rax, M_ACCESS_MAX_TICKS(%r15)
1:      or      $1, %rax
        bsr     %rax, %rax
        incq    (%r14, %rax, 8)

        check   (%rsi)
        mov     (%rsi, %r8), %rbp
        check   (%rsi, %r8)

        inc     %rdi                    # a wrong word is put right, so each error counts once
        mov     %rdi, (%rsi)
        mov     %rdi, (%rsi, %r8)
        cmpq    $0, P_SKEW_CLASSES
        je      1f
        incq    CLASS_STEPS(%r14, %r11, 8)
1:      incq    M_TOUCHED(%r15)
        dec     %r9
        jz      clock
next:
        test    %r12, %r12
        jz      1f
        cmpq    $0, P_SKEW_CLASSES
        jne     skew_next
1:      dec     %r10
        jnz     step
        mov     %r12, M_PASSES(%r15)
        inc     %r12
        movq    $STATE_VERIFY, M_STATE(%r15)
        jmp     round

fill:
        mov     %rdi, (%rsi)
        mov     %rdi, (%rsi, %r8)
        incq    M_FILLED(%r15)
        jmp     next

# A skew: page of rank r, from 0 on, is in class floor(log2(r + 1)), and each visit is to a class that is drawn at
# random, all alike: rank r is visited about once where rank 0 is visited r times. Within a class every page is
# visited once a round of the class, so the number of its visits follows from the steps that the class has gone.
skew_round:
        mov     P_ROUND_VISITS, %r10
skew_step:
        imul    P_ORDER_MULTIPLIER, %rbx        # a generator modulo 2^64; its high half is used
        add     P_ORDER_INCREMENT, %rbx
        inc     %rbx
        mov     %rbx, %rcx
        shr     $32, %rcx
        imul    P_SKEW_CLASSES, %rcx
        shr     $32, %rcx
        mov     %rcx, %r11
        mov     CLASS_STEPS(%r14, %r11, 8), %rdx
        mov     %rdx, %r12
        shr     %cl, %r12               # the class has 2^class pages; each of its rounds starts at another one
        mov     $GOLDEN, %rax
        imul    %r12, %rax
        inc     %r12
        add     %rax, %rdx
        mov     $1, %eax
        shl     %cl, %rax
        dec     %rax
        and     %rax, %rdx
        add     %rax, %rdx              # rdx: rank
        cmp     P_PAGES_PER_VCPU, %rdx
        jb      1f
        incq    CLASS_STEPS(%r14, %r11, 8)      # the last class has fewer pages
        jmp     skew_step
1:      mov     P_ORDER_SHIFT, %ecx     # from ranks to pages: a permutation modulo 2^n, until it stays within the slice
2:
.rept 2
        imul    P_ORDER_MULTIPLIER, %rdx
        add     P_ORDER_INCREMENT, %rdx
        inc     %rdx
        and     P_ORDER_MASK, %rdx
        mov     %rdx, %rax
        shr     %cl, %rax
        xor     %rax, %rdx
.endr
        cmp     P_PAGES_PER_VCPU, %rdx
        jae     2b
        jmp     visit

skew_next:
        mov     P_PAUSE_TICKS, %rbp
        test    %rbp, %rbp
        jz      2f
        read_tsc
        mov     %rax, %rcx
1:      pause
        read_tsc
        sub     %rcx, %rax
        cmp     %rbp, %rax              # a TSC that went back ends the pause
        jb      1b
2:      dec     %r10
        jnz     skew_step
        incq    M_PASSES(%r15)
        jmp     skew_round

# time = system_time + ((tsc - tsc_timestamp) << shift) * multiplier >> 32, if the version stayed even and
# the same; else again after the next page.
clock:
        mov     P_CLOCK_INTERVAL_PAGES, %r9
        cmpl    $0, C_MULTIPLIER(%r14)  # nobody fills this page: no kvmclock here
        je      next
        mov     C_VERSION(%r14), %edi
        test    $1, %edi
        jnz     clock_later
        read_tsc
        sub     C_TSC_TIMESTAMP(%r14), %rax
        movsbl  C_SHIFT(%r14), %ecx
        test    %ecx, %ecx
        js      1f
        shl     %cl, %rax
        jmp     2f
1:      neg     %ecx
        shr     %cl, %rax
2:      mov     C_MULTIPLIER(%r14), %edx
        mul     %rdx
        shrd    $32, %rdx, %rax
        add     C_SYSTEM_TIME(%r14), %rax
        cmp     C_VERSION(%r14), %edi
        jne     clock_later

        cmpq    $0, M_CLOCK_READS(%r15)
        je      2f
        mov     %rax, %rcx
        sub     M_CLOCK_LAST_NS(%r15), %rcx
        jae     1f
        incq    M_CLOCK_BACKWARDS(%r15)
        jmp     2f
1:      cmp     M_CLOCK_STEP_MAX_NS(%r15), %rcx
        jbe     2f
        mov     %rcx, M_CLOCK_STEP_MAX_NS(%r15)
2:      mov     %rax, M_CLOCK_LAST_NS(%r15)
        mov     %rdi, M_CLOCK_VERSION(%r15)
        incq    M_CLOCK_READS(%r15)
        jmp     next
clock_later:
        mov     $1, %r9d
        jmp     next
worker_end:
.org worker + 4096                      # an error here: the worker does not fit its page

.balign 8
gdt:
        .quad   0
        .quad   0x00AF9B000000FFFF      # CODE64
        .quad   0x00CF93000000FFFF      # DATA
        .quad   0x00CF9B000000FFFF      # CODE32
        .quad   0
        .quad   0x00CFF3000000FFFF      # USER_DATA
        .quad   0x00AFFB000000FFFF      # USER_CODE64
gdt_end:
gdt_pointer:
        .word   gdt_end - gdt - 1
        .long   gdt

.org PARAMETERS_IN_IMAGE
parameters:
        .ascii  "FARFAULT"
        .quad   2                       # version of this block
        .quad   worker - image
        .quad   worker_end - worker
        .quad   0                       # no vCPU: parameters.py fills in the rest
.org PARAMETERS_IN_IMAGE + PARAMETERS_BYTES

.org 0xFFF0
.code16
        ljmp    $0xF000, $(_start - image)
.org 0x10000
