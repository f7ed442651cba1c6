"""Single steps of a fault beside the same steps in C: same run, same CPUs, in turn."""
