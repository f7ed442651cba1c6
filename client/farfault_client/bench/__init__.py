"""Benchmarks: whole moves beside QEMU's own post-copy, single steps beside C, faults by number of vCPUs."""
