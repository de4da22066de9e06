"""A part of a named workload that an interpreter runs in seconds, and that stands for the whole.

A full call has 2^26 elements, minutes to interpret. A slice is what one multiprocessor has of it: a device with one
multiprocessor and its share of the L2 gets a quarter of that multiprocessor's rows. Programs a multiprocessor, the rows
of partial sums, and whether a row is walked or shared are then those of the full call; what does not grow with the rows
(parameters, partial sums) weighs four times as much. Small calls are run whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

import fused_ops
from fused_ops.kernels.launch import H200, DeviceFacts, assume_device

from ..traffic import Direction
from ..workloads import Case, Shape, Workload, elements
from .calls import run
from .counts import LaunchTraffic, Size, TrafficCounter, size_of
from .watch import watch

SMALL_CALL = 2**20
PART_OF_A_MULTIPROCESSOR = 4


@dataclass(frozen=True)
class Slice:
    """share: of the full call's rows. multiprocessors: of the full device for each of the slice's."""

    shape: Shape
    facts: DeviceFacts
    share: float
    multiprocessors: int


@dataclass(frozen=True)
class Counted:
    """The traffic of one slice of a workload."""

    workload: str
    direction: Direction
    slice: Slice
    launches: list[LaunchTraffic]

    def moved(self, index: int, resident_programs: int) -> dict[Size, int]:
        """Bytes that a launch of the slice moves, of which so many programs run on a multiprocessor at once."""
        facts = self.slice.facts
        by_tensor = self.launches[index].moved(resident_programs * facts.multiprocessors, facts.l2_bytes)
        sizes: dict[Size, int] = {}
        for argument, count in by_tensor.items():
            sizes[size_of(argument)] = sizes.get(size_of(argument), 0) + count
        return sizes

    def moved_by_call(self, resident_programs: Sequence[int]) -> dict[Size, int]:
        """The same of all launches together."""
        total: dict[Size, int] = {}
        for index, resident in enumerate(resident_programs):
            for size, count in self.moved(index, resident).items():
                total[size] = total.get(size, 0) + count
        return total

    def full_moved(self, index: int, resident_programs: int) -> dict[Size, float]:
        """Bytes that this launch moves in the full call: partial sums grow with the multiprocessors, parameters not at
        all, everything else with the rows."""
        moved = self.moved(index, resident_programs)
        return {size: count * self._growth(size, parameter=1.0) for size, count in moved.items()}

    def full_asked(self, index: int, programs: int) -> float:
        """Bytes that this launch, of so many programs, asks for in the full call; each program asks for parameters."""
        launch = self.launches[index]
        return sum(
            (tensor.asked_read + tensor.asked_written)
            * self._growth(size_of(tensor.argument), parameter=programs / launch.programs)
            for tensor in launch.tensors
        )

    def _growth(self, size: Size, parameter: float) -> float:
        if size == "parameter":
            return parameter
        return self.slice.multiprocessors if size == "partial" else 1 / self.slice.share


def slice_of(workload: Workload, facts: DeviceFacts = H200) -> Slice:
    """The slice of a workload on a device with these facts."""
    full = workload.shape("full")
    if elements(full) <= SMALL_CALL:
        return Slice(full, facts, 1.0, 1)
    rows = max(1, elements(full) // full[-1] // facts.multiprocessors // PART_OF_A_MULTIPROCESSOR)
    part = facts._replace(multiprocessors=1, l2_bytes=facts.l2_bytes // facts.multiprocessors)
    return Slice((rows, full[-1]), part, rows * full[-1] / elements(full), facts.multiprocessors)


def slice_case(workload: Workload, part: Slice, dtype: torch.dtype) -> Case:
    """The tensors of a slice; what is in them does not matter."""
    return workload.case_of(part.shape, lambda shape, *_: torch.zeros(shape, dtype=dtype))


def count(workload: Workload, dtype: torch.dtype, direction: Direction, facts: DeviceFacts = H200) -> Counted:
    """Runs a slice of a workload under the counter."""
    part = slice_of(workload, facts)
    counter = TrafficCounter()
    case = slice_case(workload, part, dtype)
    with fused_ops.use_backend("triton"), assume_device(part.facts), watch(counter):
        run(workload.ours(), case, direction)
    return Counted(workload.name, direction, part, counter.launches)
