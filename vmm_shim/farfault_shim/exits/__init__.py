"""What a KVM_RUN exit means. No I/O."""
