"""What the audit finds of one call, put together from its parts: compiled, counted, timed on the host, estimated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..records import Call
from ..workloads import Workload, elements
from . import allowances
from .allowances import LEAST, Schedule, allowance
from .binary import CompiledLaunch
from .calls import unfilled_case
from .estimate import Estimate, Work, estimate
from .findings import SMALL_KERNELS, Finding
from .host import HostTime
from .slices import Counted, require_same_kernels
from .targets import TARGETS, Device


@dataclass(frozen=True)
class LaunchRow:
    """One launch of a call: as compiled, the bytes that it moves and asks for, instructions that its threads issue for
    each element of x, and an estimate of its time."""

    compiled: CompiledLaunch
    moved_bytes: float
    asked_bytes: float
    instructions: float
    estimate: Estimate


@dataclass(frozen=True)
class AuditRow(Call):
    """One call at its full size. least_bytes: the fewest that it can move. compilations: over row counts, the most of
    any of its kernels. host: None where it was not timed."""

    target: str
    device: str
    launches: list[LaunchRow]
    least_bytes: float
    compilations: int
    host: HostTime | None = None

    @property
    def moved_bytes(self) -> float:
        return sum(launch.moved_bytes for launch in self.launches)

    @property
    def asked_bytes(self) -> float:
        return sum(launch.asked_bytes for launch in self.launches)

    @property
    def seconds(self) -> float:
        """An estimate."""
        return sum(launch.estimate.seconds for launch in self.launches)

    @property
    def limit(self) -> str:
        """What bounds the launch that is estimated to take longest."""
        return max(self.launches, key=lambda launch: launch.estimate.seconds).estimate.limit

    @property
    def large(self) -> list[CompiledLaunch]:
        """The launches that touch tensors of x's size."""
        return [launch.compiled for launch in self.launches if launch.compiled.kernel not in SMALL_KERNELS]


def assemble(
    workload: Workload,
    dtype: torch.dtype,
    compiled: Sequence[CompiledLaunch],
    compilations: int,
    counted: Counted,
    device: Device,
    host: HostTime | None = None,
) -> tuple[AuditRow, list[Finding]]:
    """One row, and where the traffic of its slice exceeds an allowance.

    Raises RuntimeError where the slice runs other kernels than the call that it stands for.
    """
    require_same_kernels(workload.name, counted.launches, compiled)
    full, launches = workload.shape("full"), []
    for index, launch in enumerate(compiled):
        moved, asked = counted.full_moved(index, launch.resident_programs), counted.full_asked(index)
        work = Work(launch, moved, asked, _asked_of_l2(counted, index, launch, device))
        launches.append(LaunchRow(launch, moved, asked, work.instructions / elements(full), estimate(work, device)))
    type_name = str(dtype).removeprefix("torch.")
    least = allowance(workload, unfilled_case(workload, full, dtype, "meta"), counted.direction, LEAST).total
    names = (workload.name, workload.function, full, type_name, counted.direction)
    row = AuditRow(*names, device.target, device.name, launches, least, compilations, host)
    where = f"{workload.name} {type_name} {device.name} {counted.direction}"
    return row, traffic_findings([launch.resident_programs for launch in compiled], counted, dtype, where)


def _asked_of_l2(counted: Counted, index: int, launch: CompiledLaunch, device: Device) -> float:
    multiprocessors = device.facts.multiprocessors
    shared = launch.side_by_side(multiprocessors) * launch.shared_bytes
    l1_bytes = TARGETS[device.target].multiprocessor.l1_bytes(shared)
    return counted.full_asked_of_l2(index, min(multiprocessors, launch.programs), l1_bytes)


def traffic_findings(
    resident_programs: Sequence[int], counted: Counted, dtype: torch.dtype, where: str
) -> list[Finding]:
    """Where a slice moves more than it is allowed; of each launch so many programs run on a multiprocessor at once."""
    part = counted.slice
    workload = part.workload
    case = unfilled_case(workload, part.shape, dtype, "meta")
    schedule = Schedule.allowed(workload, case, counted.launches, part.facts)
    allowed = allowance(workload, case, counted.direction, schedule)
    moved = counted.moved(resident_programs)
    return allowances.of_call(where, workload.span(part.shape), counted.launches, moved, allowed)
