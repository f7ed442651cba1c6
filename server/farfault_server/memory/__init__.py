"""Where pages come from: RAM files, another process's memory, snapshots, synthetic memory."""

from farfault_server.memory.file_region import FileRegion
from farfault_server.memory.source import PageRegion, ServedMemory

__all__ = ["FileRegion", "PageRegion", "ServedMemory"]
