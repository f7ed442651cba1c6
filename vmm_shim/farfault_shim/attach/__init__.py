"""The attach protocol: how a VMM hands its memory and its vCPUs' exits to a receiver (docs/attach-protocol.md)."""
