"""Which annotators this host has and lets this process use."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from farfault_shim.annotate.annotator import TRACEPOINTS, AddressKind, Annotator, Tracepoint
from farfault_shim.annotate.event_format import EventFormat, EventFormatError
from farfault_shim.annotate.perf import SamplerUnavailableError, TracepointSampler

TRACEFS_PATHS: Final = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))
MOUNT_REMEDY: Final = "as root: mount -t tracefs tracefs /sys/kernel/tracing"


class Discovery(NamedTuple):
    """What became of one tracepoint.

    Attributes:
        tracepoint: that was looked for.
        annotator: None where it cannot be used; then `problem` and `remedy` say why and what to do.
    """

    tracepoint: Tracepoint
    annotator: Annotator | None
    problem: str = ""
    remedy: str = ""


def discover(tracefs_paths: Iterable[Path] = TRACEFS_PATHS) -> dict[AddressKind, Discovery]:
    """Looks for each KVM tracepoint, reads its format and opens a perf event on it for a moment."""
    paths = tuple(tracefs_paths)
    return {tracepoint.kind: _discover(tracepoint, paths) for tracepoint in TRACEPOINTS}


def _discover(tracepoint: Tracepoint, paths: tuple[Path, ...]) -> Discovery:
    text = forbidden = None
    for root in paths:
        try:
            text = (root / "events" / tracepoint.system / tracepoint.event / "format").read_text()
            break
        except PermissionError:
            forbidden = root
        except OSError:
            continue
    if text is None:
        return Discovery(tracepoint, None, *_why_missing(tracepoint, paths, forbidden))
    try:
        annotator = Annotator.of_event(tracepoint, EventFormat.parse(text))
        TracepointSampler(annotator).close()
    except EventFormatError as error:
        return Discovery(tracepoint, None, str(error), "use --fault-source blocking and report this kernel's format")
    except SamplerUnavailableError as error:
        return Discovery(tracepoint, None, error.problem, error.remedy)
    return Discovery(tracepoint, annotator)


def _why_missing(tracepoint: Tracepoint, paths: tuple[Path, ...], forbidden: Path | None) -> tuple[str, str]:
    if forbidden is not None:
        return (
            f"{forbidden} may not be read by this user",
            "run as root, or as root: mount -o remount,gid=GROUP,mode=750 /sys/kernel/tracing for a group of the user",
        )
    for root in paths:
        if (root / "events").is_dir():
            if (root / "events" / "kvm").is_dir():
                return f"this kernel has no tracepoint {tracepoint}", "use --fault-source blocking"
            return f"no tracepoint {tracepoint}: KVM is not loaded", "modprobe kvm_intel or kvm_amd"
    return "tracefs is not mounted", MOUNT_REMEDY
