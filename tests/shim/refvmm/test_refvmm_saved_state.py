"""The device-state format: whole or refused."""

from __future__ import annotations

import pytest
from farfault_shim.refvmm.saved_state import SavedState, SavedStateError, VcpuState
from hypothesis import given
from hypothesis import strategies as st

STATE = SavedState("kvm", "pc", 128 << 20, 10**12, (VcpuState(b"r" * 144, b"s" * 312, b"x" * 4096, {16: 1 << 63}),))
PACKED = STATE.pack()


def test_round_trip() -> None:
    assert SavedState.unpack(PACKED) == STATE


@given(st.integers(0, len(PACKED) - 1), st.integers(1, 255))
def test_every_flipped_bit_is_found(place: int, change: int) -> None:
    damaged = bytearray(PACKED)
    damaged[place] ^= change
    with pytest.raises(SavedStateError):
        SavedState.unpack(bytes(damaged))


@given(st.integers(0, len(PACKED) - 1))
def test_every_shorter_state_is_refused(size_bytes: int) -> None:
    with pytest.raises(SavedStateError):
        SavedState.unpack(PACKED[:size_bytes])


def test_more_than_a_state_is_refused() -> None:
    with pytest.raises(SavedStateError, match="with a body of"):
        SavedState.unpack(PACKED + b"x")


@pytest.mark.parametrize(
    ("ours", "named"),
    [
        (("simulated", "pc", 128 << 20, 1), "another KVM"),
        (("kvm", "q35", 128 << 20, 1), "another machine"),
        (("kvm", "pc", 64 << 20, 1), "another RAM"),
        (("kvm", "pc", 128 << 20, 2), "another number of vCPUs: 1, this VM has 2"),
    ],
)
def test_a_state_of_another_vm_is_named(ours: tuple[str, str, int, int], named: str) -> None:
    with pytest.raises(SavedStateError, match=named):
        STATE.check_fits(*ours)
