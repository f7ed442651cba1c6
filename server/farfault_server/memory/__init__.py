"""Where pages come from: RAM files, another process's memory, snapshots, synthetic memory."""

from farfault_server.memory.source import PageRegion, ServedMemory

__all__ = ["PageRegion", "ServedMemory"]
