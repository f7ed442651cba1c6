"""The reference VMM: a small VMM in Python that speaks the attach protocol natively and can be moved.

::

    memory        RAM in a file, its mappings and memslots
    boot          the self-verifying worker, its page tables, first registers
    gate          start and stop of all vCPUs
    vcpu_thread   the loop around KVM_RUN
    far_faults    exits that may be far faults: reported to the receiver, its verdict obeyed
    machine       the VM as a whole: run states, save, load
    saved_state   the device-state file format
    qmp           the server side of QMP: messages (no I/O), commands, the socket
    command       ``farfault reference-vmm``
"""
