"""Whether this process may make a userfaultfd, which way, and what it can do."""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
from pathlib import Path
from typing import Final, NamedTuple

from farfault_shim.sources.facts import Finding
from farfault_shim.uffd import abi

FEATURES: Final = {
    "SIGBUS": abi.FEATURE_SIGBUS,
    "THREAD_ID": abi.FEATURE_THREAD_ID,
    "EVENT_REMOVE": abi.FEATURE_EVENT_REMOVE,
    "EVENT_UNMAP": abi.FEATURE_EVENT_UNMAP,
    "MISSING_SHMEM": abi.FEATURE_MISSING_SHMEM,
    "MISSING_HUGETLBFS": abi.FEATURE_MISSING_HUGETLBFS,
    "MINOR_SHMEM": abi.FEATURE_MINOR_SHMEM,
}
NEEDED: Final = ("THREAD_ID", "EVENT_REMOVE", "MISSING_SHMEM")
"""By blocking userfaultfd, on RAM in tmpfs or a memfd."""
SETTING: Final = Path("/proc/sys/vm/unprivileged_userfaultfd")
REMEDY: Final = (
    f"run as root, or give this user {abi.DEVICE} (chown or an ACL; systemd: OpenFile={abi.DEVICE} and "
    "--userfaultfd-device-fd 3), or sysctl vm.unprivileged_userfaultfd=1"
)

_libc: Final = ctypes.CDLL(None, use_errno=True)


class UserfaultfdFacts(NamedTuple):
    """What was found.

    Attributes:
        system_call, device: the two ways to a descriptor, each tried.
        unprivileged_setting: vm.unprivileged_userfaultfd; empty where the kernel has none.
        features: of the kernel, by the header's names without UFFD_FEATURE_; empty where none could be asked.
    """

    system_call: Finding
    device: Finding
    unprivileged_setting: str
    features: frozenset[str]

    @property
    def permitted(self) -> bool:
        return self.system_call.ok or self.device.ok

    @property
    def usable(self) -> Finding:
        """For blocking userfaultfd."""
        if not self.permitted:
            return Finding(False, f"userfaultfd is not permitted: {self.system_call.detail}", REMEDY)
        missing = [name for name in NEEDED if name not in self.features]
        if missing:
            return Finding(False, f"the kernel's userfaultfd lacks {', '.join(missing)}", "use Linux 4.14 or newer")
        return Finding(True, self.system_call.detail if self.system_call.ok else self.device.detail)

    @property
    def sigbus(self) -> Finding:
        """For stock NOWAIT."""
        ok = "SIGBUS" in self.features
        return Finding(ok, "UFFD_FEATURE_SIGBUS" if ok else "the kernel's userfaultfd lacks SIGBUS")


def find_userfaultfd(device_fd: int | None = None) -> UserfaultfdFacts:
    """Makes a userfaultfd in each way for a moment.

    Args:
        device_fd: an inherited descriptor of ``/dev/userfaultfd``, used instead of opening it.
    """
    setting = SETTING.read_text().strip() if SETTING.exists() else ""
    by_call, call = _try_system_call(setting)
    by_device, device = _try_device(device_fd)
    features: frozenset[str] = frozenset()
    for descriptor in (by_call, by_device):
        if descriptor is not None:
            features = features or _features(descriptor)
            os.close(descriptor)
    return UserfaultfdFacts(call, device, setting, features)


def _try_system_call(setting: str) -> tuple[int | None, Finding]:
    number = abi.SYS_USERFAULTFD.get(platform.machine())
    if number is None:
        return None, Finding(False, f"userfaultfd is not known on {platform.machine()}")
    descriptor = int(_libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK))
    if descriptor >= 0:
        return descriptor, Finding(True, "system call")
    why = f"{os.strerror(ctypes.get_errno())} (vm.unprivileged_userfaultfd={setting or 'missing'})"
    return None, Finding(False, why, REMEDY)


def _try_device(device_fd: int | None) -> tuple[int | None, Finding]:
    name = abi.DEVICE if device_fd is None else f"descriptor {device_fd}"
    try:
        device = os.open(abi.DEVICE, os.O_RDWR | os.O_CLOEXEC) if device_fd is None else device_fd
        try:
            descriptor = fcntl.ioctl(device, abi.USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
        finally:
            if device_fd is None:
                os.close(device)
    except OSError as error:
        return None, Finding(False, f"{name}: {error.strerror}", REMEDY)
    return descriptor, Finding(True, name)


def _features(descriptor: int) -> frozenset[str]:
    """UFFDIO_API with no feature asked for answers with all that there are (ioctl_userfaultfd(2))."""
    argument = bytearray(abi.API.pack(abi.UFFD_API, 0, 0))
    fcntl.ioctl(descriptor, abi.UFFDIO_API, argument)
    known = abi.API.unpack(argument)[1]
    return frozenset(name for name, bit in FEATURES.items() if known & bit)
