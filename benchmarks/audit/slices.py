"""A part of a named workload that an interpreter runs in seconds, and that stands for the whole.

A full call has 2^26 elements, minutes to interpret. A slice is what one multiprocessor has of it: a device with one
multiprocessor and its share of the L2 gets a quarter of that multiprocessor's rows. Programs a multiprocessor, the rows
of partial sums, and whether a row is walked or shared are then those of the full call; what does not grow with the rows
(parameters, partial sums) weighs four times as much. Small calls are run whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import fused_ops
from fused_ops.kernels.launch import H200, DeviceFacts, assume_device

from ..traffic import Direction
from ..workloads import Case, Shape, Workload, elements
from .allowances import Allowance, allowance
from .calls import run
from .counts import LaunchTraffic, TrafficCounter
from .watch import watch

SMALL_CALL = 2**20
PART_OF_A_MULTIPROCESSOR = 4


@dataclass(frozen=True)
class Slice:
    """share: of the full call's rows."""

    shape: Shape
    facts: DeviceFacts
    share: float


@dataclass(frozen=True)
class Counted:
    """The traffic of one slice of a workload, and what it may be."""

    workload: str
    direction: Direction
    slice: Slice
    launches: list[LaunchTraffic]
    allowed: Allowance


def slice_of(workload: Workload, facts: DeviceFacts = H200) -> Slice:
    """The slice of a workload on a device with these facts."""
    full = workload.shape("full")
    if elements(full) <= SMALL_CALL:
        return Slice(full, facts, 1.0)
    rows = max(1, elements(full) // full[-1] // facts.multiprocessors // PART_OF_A_MULTIPROCESSOR)
    part = facts._replace(multiprocessors=1, l2_bytes=facts.l2_bytes // facts.multiprocessors)
    return Slice((rows, full[-1]), part, rows * full[-1] / elements(full))


def count(workload: Workload, dtype: torch.dtype, direction: Direction, facts: DeviceFacts = H200) -> Counted:
    """Runs a slice of a workload under the counter."""
    part = slice_of(workload, facts)
    counter = TrafficCounter()
    case: Case = workload.case_of(part.shape, lambda shape, *_: torch.zeros(shape, dtype=dtype))
    with fused_ops.use_backend("triton"), assume_device(part.facts), watch(counter):
        run(workload.ours(), case, direction)
    allowed = allowance(workload, case, direction, part.facts.multiprocessors, counter.launches)
    return Counted(workload.name, direction, part, counter.launches, allowed)
