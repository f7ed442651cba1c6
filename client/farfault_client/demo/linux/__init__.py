"""A Linux guest that proves what a move did to it: memory, disk and network are checked while it moves.

image = build_image()
source = LinuxVm(image, Path("/tmp/src"), Path("/dev/shm/src.ram"), free_tcp_port())
destination = replace(source, directory=Path("/tmp/dst"), ram=Path("/dev/shm/dst.ram"), host_port=free_tcp_port())
... start source.source_argv() and destination.destination_argv(), move ...
log = await wait_for(lambda log: log.last_tick >= 500, source, destination, timeout_s=60)
assert not log.problems
assert log.ticks[-1] == expected_tick(image.worker, log.last_tick, worker_mib=source.worker_mib)
"""

from farfault_client.demo.linux.image import GuestImage, build_image
from farfault_client.demo.linux.serial_log import SerialLog, Tick, parse_serial
from farfault_client.demo.linux.vm import Answer, LinuxVm, ask, free_tcp_port, read_serial, wait_for
from farfault_client.demo.linux.worker import expected_tick

__all__ = [
    "Answer",
    "GuestImage",
    "LinuxVm",
    "SerialLog",
    "Tick",
    "ask",
    "build_image",
    "expected_tick",
    "free_tcp_port",
    "parse_serial",
    "read_serial",
    "wait_for",
]
