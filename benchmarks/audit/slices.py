"""A part of a named workload that an interpreter runs in seconds, and that stands for the whole.

A full call has 2^26 elements, minutes to interpret. A slice is what one multiprocessor has of it: a device with one
multiprocessor and its share of the L2 gets an eighth of that multiprocessor's rows. Programs a multiprocessor, the rows
of partial sums, and whether a row is walked or shared are then those of the full call; what does not grow with the rows
(parameters, partial sums) weighs more. Small calls are run whole.

A launch of the full call moves as many times the bytes of a slice's launch, of each tensor, as the tensor is larger
there. How large they are is seen by making both calls and running none of their launches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

import fused_ops
from fused_ops.kernels.channel_norm.config import LONG_PLANE
from fused_ops.kernels.launch import H200, DeviceFacts, assume_device

from ..traffic import Direction
from ..workloads import Case, Shape, Workload, elements
from .binary import CompiledLaunch
from .calls import run
from .counts import LaunchTraffic, Size, TrafficCounter, size_of
from .planned import PlannedLaunch, planned
from .watch import watch

SMALL_CALL = 2**20
PART_OF_A_MULTIPROCESSOR = 8
# Channels of a tile at most, of 16 bits: channels_last, of planes, and of planes that are longer than a tile.
MOST_SIDE_BY_SIDE, MOST_PLANES, FEW_PLANES = 64, 32, 8
LONGER_THAN_A_TILE = 2**10
# Channels of a wide access, of any type.
ALIKE = 8


@dataclass(frozen=True)
class Slice:
    """workload: with as many groups as the slice has. multiprocessors: of the full device for each of the slice's."""

    workload: Workload
    shape: Shape
    facts: DeviceFacts
    multiprocessors: int


@dataclass(frozen=True)
class Growth:
    """How many times a launch has in the full call what it has in a slice: programs, and bytes of each tensor."""

    programs: float
    bytes: dict[str, float]


@dataclass(frozen=True)
class Counted:
    """The traffic of one slice of a workload, and how each launch grows to the full call's."""

    workload: str
    direction: Direction
    slice: Slice
    launches: list[LaunchTraffic]
    growth: list[Growth]

    def moved(self, resident_programs: Sequence[int]) -> dict[Size, int]:
        """Bytes that the slice's call moves, by size of tensor; of each launch so many programs run on a multiprocessor
        at once."""
        total: dict[Size, int] = {}
        for index, resident in enumerate(resident_programs):
            for argument, count in self._moved(index, resident).items():
                total[size_of(argument)] = total.get(size_of(argument), 0) + count
        return total

    def full_moved(self, index: int, resident_programs: int) -> float:
        """Bytes that a launch moves in the full call."""
        growth = self.growth[index].bytes
        return sum(count * growth[argument] for argument, count in self._moved(index, resident_programs).items())

    def full_asked(self, index: int) -> float:
        """Bytes that a launch asks for in the full call. Each program asks for its parameters anew."""
        growth = self.growth[index]
        asked = {tensor.argument: tensor.asked_read + tensor.asked_written for tensor in self.launches[index].tensors}
        return sum(
            count * (growth.programs if size_of(argument) == "parameter" else growth.bytes[argument])
            for argument, count in asked.items()
        )

    def full_asked_of_l2(self, index: int, multiprocessors: int, l1_bytes: int) -> float:
        """Of those bytes what the L1 does not serve: of parameters that fit it each of the multiprocessors that have
        work gets a copy."""
        growth, asked = self.growth[index], self.full_asked(index)
        parameters = [tensor for tensor in self.launches[index].tensors if size_of(tensor.argument) == "parameter"]
        copy = sum(tensor.read * growth.bytes[tensor.argument] for tensor in parameters)
        if copy > l1_bytes:
            return asked
        read = sum(tensor.asked_read for tensor in parameters) * growth.programs
        return asked - read + min(read, copy * multiprocessors)

    def _moved(self, index: int, resident_programs: int) -> dict[str, int]:
        facts, launch = self.slice.facts, self.launches[index]
        full_programs = launch.programs * self.growth[index].programs / self.slice.multiprocessors
        resident = min(resident_programs * facts.multiprocessors, math.ceil(full_programs))
        return launch.moved(resident, facts.l2_bytes)


def slice_of(workload: Workload, facts: DeviceFacts = H200) -> Slice:
    """The slice of a workload on a device with these facts."""
    full = workload.shape("full")
    if elements(full) <= SMALL_CALL:
        return Slice(workload, full, facts, 1)
    planes_for_all = not (workload.of.norm or workload.of.over_last_dim or workload.channels_last)
    if workload.of.by_channel or planes_for_all:  # of a residual add, where all programs share a pass of the channels
        return _slice_of_images(workload, full, facts)
    rows = max(1, workload.samples(full) // facts.multiprocessors // PART_OF_A_MULTIPROCESSOR)
    part = facts._replace(multiprocessors=1, l2_bytes=facts.l2_bytes // facts.multiprocessors)
    return Slice(workload, workload.of_samples(rows), part, facts.multiprocessors)


def _slice_of_images(workload: Workload, full: Shape, facts: DeviceFacts) -> Slice:
    """A few images, or a part of one, of fewer channels where these do not share statistics, its planes as long as they
    have to be; on the whole device, since how planes are shared depends little on how many there are."""
    samples, channels, *positions = full
    plane = elements(tuple(positions))
    groups = workload.groups
    if workload.of.by_channel in ("batch", "single", "groups"):
        least = MOST_SIDE_BY_SIDE if workload.channels_last else FEW_PLANES
        if plane <= LONGER_THAN_A_TILE and not workload.channels_last:
            least = MOST_PLANES
        of_group = channels // groups if workload.of.by_channel == "groups" else 1
        # What is left divides by as much, which decides how channels are accessed.
        unit = math.lcm(of_group, min(ALIKE, channels & -channels))
        channels = min(channels, max(1, least // unit) * unit)
        groups = min(groups, channels // of_group)
    if plane > LONG_PLANE:
        along = positions[0] * LONG_PLANE // plane
        positions = [max(1, along), *positions[1:]]
    most = SMALL_CALL // 4
    if workload.of.by_channel == "batch":  # where of few samples partial results weigh more than in the full call
        most = SMALL_CALL // 2 if workload.channels_last or plane > LONGER_THAN_A_TILE else 3 * SMALL_CALL // 2
    samples = min(samples, max(1, most // elements((channels, *positions))))
    return Slice(replace(workload, groups=groups), (samples, channels, *positions), facts, 1)


def require_same_kernels(
    name: str, of_slice: Sequence[LaunchTraffic], of_call: Sequence[PlannedLaunch | CompiledLaunch]
) -> None:
    """RuntimeError where a slice of the workload does not launch what the full call does."""
    slice_kernels, call_kernels = ([launch.kernel for launch in launches] for launches in (of_slice, of_call))
    if slice_kernels != call_kernels:
        raise RuntimeError(
            f"a slice of {name} must launch what the full call does, {call_kernels}, but launches {slice_kernels}"
        )


def count(workload: Workload, dtype: torch.dtype, direction: Direction, facts: DeviceFacts = H200) -> Counted:
    """Runs a slice of a workload under the counter. RuntimeError where it does not launch what the full call does."""
    part = slice_of(workload, facts)
    counter = TrafficCounter()
    case: Case = part.workload.case_of(part.shape, lambda shape, *_: torch.zeros(shape, dtype=dtype))
    with fused_ops.use_backend("triton"), assume_device(part.facts), watch(counter):
        run(part.workload.ours(), case, direction)
    small = planned(part.workload, part.shape, dtype, direction, part.facts)
    large = planned(workload, workload.shape("full"), dtype, direction, facts)
    require_same_kernels(workload.name, counter.launches, large)
    growth = [
        Growth(
            full.programs / of_slice.programs,
            {name: count / of_slice.tensor_bytes[name] for name, count in full.tensor_bytes.items()},
        )
        for of_slice, full in zip(small, large, strict=True)
    ]
    return Counted(workload.name, direction, part, counter.launches, growth)
