"""KVM's interface: numbers and structs, the real /dev/kvm, and a simulated one that behaves the same."""
