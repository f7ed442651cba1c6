"""The VMM side of Farfault: KVM exits and what they mean, userfaultfd, installing pages, attaching VMMs."""
