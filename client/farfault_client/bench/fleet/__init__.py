"""Many VMs received by one host at once: what each gets, and whether that is fair."""
