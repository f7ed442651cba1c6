"""The structs of the attach protocol, against the C header; hand-overs good and bad."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from farfault_shim.attach import wire
from farfault_shim.attach.wire import (
    AddressSource,
    FaultSource,
    FrameType,
    HandOver,
    HandOverRegion,
    ProtocolError,
    Report,
    ReportKind,
    Verdict,
    VerdictKind,
)
from farfault_shim.layout import Layout
from hypothesis import given
from hypothesis import strategies as st

HEADER = Path(__file__).parents[3] / "vmm_shim" / "preload" / "farfault_attach.h"

C_PROGRAM = r"""
#include <stddef.h>
#include <stdio.h>
#include "farfault_attach.h"
#define FIELD(s, f) printf(#s "." #f " %zu\n", offsetof(struct s, f))
#define SIZE(s) printf(#s " %zu\n", sizeof(struct s))
#define NUMBER(n) printf(#n " %llu\n", (unsigned long long)(n))
int main(void) {
    SIZE(ff_frame); SIZE(ff_vcpu_hello); SIZE(ff_report); SIZE(ff_verdict); SIZE(ff_slot); SIZE(ff_vcpu_counters);
    SIZE(ff_state); FIELD(ff_state, slots_seq); FIELD(ff_state, slots); FIELD(ff_state, vcpus);
    FIELD(ff_state, attach_epoch);
    NUMBER(FF_ATTACH_VERSION); NUMBER(FF_HANDOVER_BYTES_MAX); NUMBER(FF_REGIONS_MAX); NUMBER(FF_SLOTS_MAX);
    NUMBER(FF_VCPUS_MAX); NUMBER(FF_FRAME_BYTES_MAX); NUMBER(FF_MSRS); NUMBER(FF_VERDICT_POPULATE);
    NUMBER(FF_REPORT_MAGIC); NUMBER(FF_VERDICT_MAGIC); NUMBER(FF_STATE_MAGIC);
    NUMBER(FF_FRAME_VCPU); NUMBER(FF_FRAME_RELEASED); NUMBER(FF_FRAME_READY); NUMBER(FF_FRAME_REFUSED);
    NUMBER(FF_REPORT_EXIT); NUMBER(FF_REPORT_START);
    NUMBER(FF_ADDRESS_NONE); NUMBER(FF_ADDRESS_KVM_RUN); NUMBER(FF_ADDRESS_TRACEPOINT_GVA);
    NUMBER(FF_ADDRESS_TRACEPOINT_GPA); NUMBER(FF_ADDRESS_MMIO); NUMBER(FF_ADDRESS_DECODED);
    NUMBER(FF_VERDICT_RETRY); NUMBER(FF_VERDICT_PASS); NUMBER(FF_VERDICT_COMPLETE);
    static const unsigned msrs[] = FF_MSR_LIST;
    for (unsigned i = 0; i < sizeof msrs / sizeof *msrs; i++) printf("msr%u %u\n", i, msrs[i]);
    return 0;
}
"""

C_SAMPLES = r"""
#include <stdio.h>
#include <string.h>
#include "farfault_attach.h"
int main(void) {
    struct ff_report r = {.magic = FF_REPORT_MAGIC, .kind = FF_REPORT_START,
        .address_source = FF_ADDRESS_TRACEPOINT_GPA, .vcpu = 7, .seq = 8, .ret = -1, .err = 14, .exit_reason = 39,
        .mmio_len = 4, .flags = 0x1111111111, .gpa = 0x2222222222, .size = 0x3333333333, .gva = 0x4444444444,
        .rip = 0xffffffff81000000, .exit_ns = 0x5555555555, .mmio_is_write = 1, .translate_failed = 0,
        .cr0 = 0x6666666666, .cr3 = 0x7777777777, .cr4 = 0x8888888888, .efer = 0x9999999999};
    for (int i = 0; i < (int)FF_MSRS; i++) r.msrs[i] = 0xa000000000 + i;
    struct ff_verdict v = {.magic = FF_VERDICT_MAGIC, .seq = 9, .verdict = FF_VERDICT_RETRY,
        .flags = FF_VERDICT_POPULATE, .gpa = 0xbbbbbbbbbb, .size = 4096};
    struct ff_slot s = {.id = 1, .flags = 2, .gpa = 0xcccccccccc, .size = 0xdddddddddd, .offset = 0xeeeeeeeeee};
    struct ff_vcpu_counters c = {1, 2, 3, 4, 5, 6, 7, 8, 1};
    fwrite(&r, sizeof r, 1, stdout); fwrite(&v, sizeof v, 1, stdout);
    fwrite(&s, sizeof s, 1, stdout); fwrite(&c, sizeof c, 1, stdout);
    return 0;
}
"""


def _run_c(program: str, folder: Path) -> bytes:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    source = folder / "program.c"
    source.write_text(program)
    subprocess.run(
        [compiler, "-Wall", "-Werror", "-I", HEADER.parent, "-o", folder / "program", source],
        check=True,
    )
    return subprocess.run([folder / "program"], check=True, capture_output=True).stdout


def test_sizes_offsets_and_numbers_are_those_of_the_header(tmp_path: Path) -> None:
    lines = _run_c(C_PROGRAM, tmp_path).decode().splitlines()
    header = {name: int(value) for name, value in (line.split() for line in lines)}
    ours = {
        "ff_frame": wire.FRAME.size,
        "ff_vcpu_hello": wire.VCPU_HELLO.size,
        "ff_report": wire.REPORT.size,
        "ff_verdict": wire.VERDICT.size,
        "ff_slot": wire.SLOT.size,
        "ff_vcpu_counters": wire.VCPU_COUNTERS.size,
        "ff_state": wire.STATE_BYTES,
        "ff_state.slots_seq": wire.SLOTS_SEQ_OFFSET,
        "ff_state.slots": wire.STATE_HEAD.size,
        "ff_state.vcpus": wire.STATE_HEAD.size + wire.SLOTS_MAX * wire.SLOT.size,
        "ff_state.attach_epoch": 16,
        "FF_ATTACH_VERSION": wire.VERSION,
        "FF_HANDOVER_BYTES_MAX": wire.HANDOVER_BYTES_MAX,
        "FF_REGIONS_MAX": wire.REGIONS_MAX,
        "FF_SLOTS_MAX": wire.SLOTS_MAX,
        "FF_VCPUS_MAX": wire.VCPUS_MAX,
        "FF_FRAME_BYTES_MAX": wire.FRAME_BYTES_MAX,
        "FF_MSRS": len(wire.PARAVIRTUAL_MSRS),
        "FF_VERDICT_POPULATE": wire.VERDICT_POPULATE,
        "FF_REPORT_MAGIC": wire.REPORT_MAGIC,
        "FF_VERDICT_MAGIC": wire.VERDICT_MAGIC,
        "FF_STATE_MAGIC": wire.STATE_MAGIC,
        **{f"FF_FRAME_{kind.name}": kind.value for kind in FrameType},
        **{f"FF_REPORT_{kind.name}": kind.value for kind in ReportKind},
        **{f"FF_ADDRESS_{kind.name}": kind.value for kind in AddressSource},
        **{f"FF_VERDICT_{kind.name}": kind.value for kind in VerdictKind},
        **{f"msr{index}": msr for index, msr in enumerate(wire.PARAVIRTUAL_MSRS)},
    }
    assert ours == header


def test_every_field_is_read_where_the_compiler_put_it(tmp_path: Path) -> None:
    data = _run_c(C_SAMPLES, tmp_path)
    report, rest = data[: wire.REPORT.size], data[wire.REPORT.size :]
    expected = Report(
        kind=ReportKind.START,
        vcpu=7,
        seq=8,
        address_source=AddressSource.TRACEPOINT_GPA,
        ret=-1,
        err=14,
        exit_reason=39,
        mmio_len=4,
        flags=0x1111111111,
        gpa=0x2222222222,
        size=0x3333333333,
        gva=0x4444444444,
        rip=0xFFFFFFFF81000000,
        exit_ns=0x5555555555,
        mmio_is_write=True,
        translate_failed=False,
        cr0=0x6666666666,
        cr3=0x7777777777,
        cr4=0x8888888888,
        efer=0x9999999999,
        msrs=tuple(0xA000000000 + index for index in range(12)),
    )
    assert Report.unpack(report) == expected
    assert expected.pack() == report
    verdict = Verdict(9, VerdictKind.RETRY, wire.VERDICT_POPULATE, 0xBBBBBBBBBB, 4096)
    assert Verdict.unpack(rest[: wire.VERDICT.size]) == verdict
    assert verdict.pack() == rest[: wire.VERDICT.size]
    rest = rest[wire.VERDICT.size :]
    assert wire.SLOT.unpack_from(rest) == (1, 2, 0xCCCCCCCCCC, 0xDDDDDDDDDD, 0xEEEEEEEEEE)
    assert wire.VCPU_COUNTERS.unpack_from(rest, wire.SLOT.size) == (1, 2, 3, 4, 5, 6, 7, 8, 1)


@pytest.mark.parametrize(
    ("offset", "patch", "message"),
    [
        (0, b"\0\0\0\0", "magic"),
        (4, b"\x09\0", "9 is not a valid ReportKind"),
        (6, b"\x63\0", "99 is not a valid AddressSource"),
        (8, b"\0\x04\0\0", "vCPU 1024"),
    ],
)
def test_a_report_with_a_bad_field_is_refused(offset: int, patch: bytes, message: str) -> None:
    data = bytearray(Report(ReportKind.EXIT, 0, 1).pack())
    data[offset : offset + len(patch)] = patch
    with pytest.raises(ProtocolError, match=message):
        Report.unpack(bytes(data))


@pytest.mark.parametrize("size", [0, 1, wire.REPORT.size - 1, wire.REPORT.size + 1])
def test_a_report_of_a_wrong_size_is_refused(size: int) -> None:
    with pytest.raises(ProtocolError, match="bytes instead of"):
        Report.unpack(bytes(size))


@given(st.binary(min_size=wire.REPORT.size, max_size=wire.REPORT.size))
def test_no_report_raises_anything_else(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        Report.unpack(data)
    patched = wire.REPORT_MAGIC.to_bytes(4, "little") + b"\1\0\0\0\0\0\0\0" + data[12:]
    assert Report.unpack(patched).pack()[:12] == patched[:12]


@pytest.mark.parametrize(("offset", "value"), [(0, 1), (8, 0), (8, 4)])
def test_a_verdict_with_a_bad_field_is_refused(offset: int, value: int) -> None:
    data = bytearray(Verdict(1, VerdictKind.PASS).pack())
    data[offset : offset + 4] = value.to_bytes(4, "little")
    with pytest.raises(ProtocolError):
        Verdict.unpack(bytes(data))
    with pytest.raises(ProtocolError):
        Verdict.unpack(bytes(data)[:-1])


TWO_REGIONS = HandOver(
    regions=(
        HandOverRegion(0x7F0000000000, 0, 1 << 20, 0, 4096),
        HandOverRegion(0x7F8000000000, 0, 4 << 20, 1 << 20, 2 << 20),
    ),
    fault_source=FaultSource.BLOCKING,
    descriptors=("uffd",),
    is_plain=True,
)


def test_a_firecracker_hand_over_is_read() -> None:
    text = b"""[{"base_host_virt_addr":140737488355328,"size":268435456,"offset":0,"page_size":4096,
                 "page_size_kib":4096}]"""
    handover = HandOver.parse(text)
    assert handover.is_plain
    assert handover.fault_source is FaultSource.BLOCKING
    assert handover.descriptors == ("uffd",)
    assert handover.layout() == Layout([(256 << 20, 4096)])


def test_an_older_firecracker_hand_over_has_bytes_in_page_size_kib() -> None:
    text = b'[{"base_host_virt_addr":0,"size":4194304,"offset":0,"page_size_kib":2097152}]'
    assert HandOver.parse(text).regions[0].page_size_bytes == 2 << 20


@pytest.mark.parametrize("is_plain", [True, False])
def test_hand_overs_survive_the_wire(is_plain: bool) -> None:
    fields: dict[str, Any] = {"is_plain": is_plain}
    if not is_plain:
        fields |= {"fault_source": FaultSource.STOCK_NOWAIT, "descriptors": ("uffd", "alias_uffd", "state", "ram0")}
    handover = HandOver(**{**vars_of(TWO_REGIONS), **fields})
    assert HandOver.parse(handover.pack()) == handover


def vars_of(handover: HandOver) -> dict[str, Any]:
    return {name: getattr(handover, name) for name in handover.__dataclass_fields__}


def test_regions_are_sorted_by_offset() -> None:
    objects = json.loads(TWO_REGIONS.pack())
    assert HandOver.parse(json.dumps(objects[::-1]).encode()) == TWO_REGIONS


def _region(**changes: Any) -> dict[str, Any]:
    return {"base_host_virt_addr": 4096, "size": 4096, "offset": 0, "page_size": 4096} | changes


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b"[]",
        b"[1]",
        b"nonsense",
        b"\xff\xfe",
        b"[" * 60_000,
        json.dumps([_region(page_size=8192)]).encode(),
        json.dumps([_region(page_size=-4096)]).encode(),
        json.dumps([_region(size=0)]).encode(),
        json.dumps([_region(size=-4096)]).encode(),
        json.dumps([_region(size=4097)]).encode(),
        json.dumps([_region(size="big")]).encode(),
        json.dumps([_region(size=None)]).encode(),
        json.dumps([_region(size=float("inf"))]).encode(),
        json.dumps([_region(base_host_virt_addr=1)]).encode(),
        json.dumps([_region(base_host_virt_addr=-4096)]).encode(),
        json.dumps([_region(base_host_virt_addr=1 << 64)]).encode(),
        json.dumps([_region(size=1 << 64)]).encode(),
        json.dumps([_region(alias_host_virt_addr=1)]).encode(),
        json.dumps([_region(offset=4096)]).encode(),
        json.dumps([_region(), _region()]).encode(),
        json.dumps([_region(), _region(offset=8192)]).encode(),
        json.dumps([_region(offset=4096 * i) for i in range(65)]).encode(),
        json.dumps([_region(farfault=5)]).encode(),
        json.dumps([_region(farfault={})]).encode(),
        json.dumps([_region(farfault={"version": 2, "fds": [], "fault_source": "blocking"})]).encode(),
        json.dumps([_region(farfault={"version": 1, "fds": 3, "fault_source": "blocking"})]).encode(),
        json.dumps([_region(farfault={"version": 1, "fds": ["uffd", "uffd"], "fault_source": "blocking"})]).encode(),
        json.dumps([_region(farfault={"version": 1, "fds": ["uffd"], "fault_source": "magic"})]).encode(),
        json.dumps([_region(farfault={"version": 1, "fds": ["uffd"]})]).encode(),
    ],
)
def test_a_malformed_hand_over_is_refused(text: bytes) -> None:
    with pytest.raises(ProtocolError):
        HandOver.parse(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["base_host_virt_addr", "size", "offset", "page_size", "page_size_kib", "farfault", "version"]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_no_hand_over_raises_anything_else(value: Any) -> None:
    try:
        HandOver.parse(json.dumps([value, value]).encode())
    except ProtocolError:
        return
