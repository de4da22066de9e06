"""The devices that the audit compiles for and estimates: published figures, none of them measured here.

| figure | where from |
|---|---|
| multiprocessors, registers, threads, shared memory, L1, L2 | the makers' architecture white papers and tuning guides |
| bandwidth | the data sheet's peak |
| clock | the boost clock |
| latency, L2 bandwidth, launch, the share of the peak a copy reaches | assumptions, the same for all: see `Device` |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fused_ops.kernels.launch import DeviceFacts

KIB, MIB = 2**10, 2**20


@dataclass(frozen=True)
class Multiprocessor:
    """What programs share on one multiprocessor (AMD: compute unit), and in which portions registers are given out.

    registers: a thread's worth of all of them together. warp_slots: resident warps. issue: warp instructions a cycle.
    cache_bytes: of the L1, with shared memory where both are one.
    """

    registers: int
    register_granule: int
    most_registers: int
    warp_slots: int
    program_slots: int
    shared_bytes: int
    shared_reserved: int  # by the system for each program
    issue: float
    cache_bytes: int
    shares_cache: bool  # with shared memory

    def l1_bytes(self, shared: int) -> int:
        """What the L1 holds beside so much shared memory in use."""
        return self.cache_bytes - (shared if self.shares_cache else 0)


@dataclass(frozen=True)
class Target:
    """An architecture to compile for. backend and arch are what Triton calls it."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    multiprocessor: Multiprocessor

    def triton(self) -> Any:
        """As Triton's GPUTarget."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.backend, self.arch, self.warp_size)

    def resident_programs(self, warps: int, registers: int, shared: int) -> int:
        """How many programs fit on a multiprocessor at once."""
        unit = self.multiprocessor
        granule = unit.register_granule
        by_registers = unit.registers // (warps * self.warp_size * max(granule, -(-registers // granule) * granule))
        by_shared = unit.shared_bytes // max(1, shared + unit.shared_reserved)
        return min(unit.warp_slots // warps, unit.program_slots, by_registers, by_shared)


def _nvidia(shared_kib: int) -> Multiprocessor:
    # 65,536 registers, to a warp in portions of 256; a warp scheduler in each quarter issues one instruction a cycle;
    # the L1 has 28 KiB more than shared memory can take.
    return Multiprocessor(65536, 8, 255, 64, 32, shared_kib * KIB, KIB, 4.0, (shared_kib + 28) * KIB, True)


# A compute unit: four SIMDs with 512 vector registers (half of them accumulators) for each of 64 lanes; a wave of 64
# takes a SIMD of 16 lanes four cycles.
_CDNA3 = Multiprocessor(4 * 512 * 64, 8, 512, 32, 32, 64 * KIB, 0, 1.0, 32 * KIB, False)

TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, _nvidia(164)),
        Target("sm_90", "cuda", 90, 32, _nvidia(228)),
        Target("sm_100", "cuda", 100, 32, _nvidia(228)),
        Target("gfx942", "hip", "gfx942", 64, _CDNA3),
    )
}


@dataclass(frozen=True)
class Device:
    """A model of a device for the estimate. Rates in bytes or cycles a second.

    copy_share: of the peak bandwidth that a copy reaches (an H200: 4.3 of 4.8 TB/s). latency: of a load under load.
    """

    name: str
    target: str
    facts: DeviceFacts
    bandwidth: float
    l2_bandwidth: float
    clock: float
    copy_share: float = 0.9
    latency: float = 0.7e-6
    launch: float = 2.5e-6


DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        Device("A100", "sm_80", DeviceFacts(108, 40 * MIB, shared_bytes=163 * KIB), 2.04e12, 4.5e12, 1.41e9),
        Device("H100", "sm_90", DeviceFacts(132, 50 * MIB), 3.35e12, 5.5e12, 1.98e9),
        Device("H200", "sm_90", DeviceFacts(132, 50 * MIB), 4.8e12, 5.5e12, 1.98e9),
        Device("B200", "sm_100", DeviceFacts(148, 126 * MIB), 8.0e12, 10e12, 1.85e9),
        # An L2 of 4 MiB on each of the eight dies; the 256 MiB behind them are left out.
        Device("MI300X", "gfx942", DeviceFacts(304, 32 * MIB, 4 * 512 * 64, 160 * KIB), 5.3e12, 17e12, 2.1e9),
    )
}

# Where a target is all that is named.
DEVICE_OF: Mapping[str, Device] = {
    target: DEVICES[name]
    for target, name in (("sm_80", "A100"), ("sm_90", "H200"), ("sm_100", "B200"), ("gfx942", "MI300X"))
}
