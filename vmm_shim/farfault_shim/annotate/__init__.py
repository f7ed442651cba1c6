"""Annotators: where the address of a bare -EFAULT exit comes from, on kernels that do not annotate it."""

from farfault_shim.annotate.annotator import AddressKind, Annotator
from farfault_shim.annotate.discover import Discovery, discover
from farfault_shim.annotate.perf import SamplerUnavailableError, TracepointSampler

__all__ = [
    "AddressKind",
    "Annotator",
    "Discovery",
    "SamplerUnavailableError",
    "TracepointSampler",
    "discover",
]
