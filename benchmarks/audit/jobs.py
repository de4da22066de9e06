"""The parts of an audit, each for a worker process of its kind: compiled, counted, timed on the host."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..traffic import DIRECTIONS, Direction
from ..workloads import WORKLOADS, Shape, Workload, elements
from . import findings, host, offline, slices
from .binary import WIDEST_ACCESS, CompiledLaunch
from .findings import Finding
from .layouts import reduction_layouts
from .slices import Counted
from .targets import DEVICE_OF, TARGETS

# Rows: one, an odd number, one that 16 divides, and more than a multiprocessor can hold.
ROW_COUNTS = (1, 3, 16, 5000)
MOST_ELEMENTS = 2**29  # of a call that is compiled; more find no address space
FEW = 4  # samples, that several programs share if they are long


@dataclass(frozen=True)
class Compiled:
    """A workload on one target: the launches of each direction, and how often each kernel was compiled."""

    launches: dict[Direction, list[CompiledLaunch]]
    compilations: dict[str, int]
    findings: list[Finding]


def compile_workload(name: str, dtype_name: str, target_name: str) -> Compiled:
    """Compiles the calls of a workload at its full size, and over row counts. Needs a process that compiles."""
    workload, dtype, target = WORKLOADS[name], getattr(torch, dtype_name), TARGETS[target_name]
    shape = workload.shape("full")
    launches = {direction: offline.compiled_launches(workload, dtype, direction, target) for direction in DIRECTIONS}
    samples = workload.samples(shape)
    most = MOST_ELEMENTS // elements(workload.sample(shape))
    of_batch = workload.of.by_channel in ("batch", "mixed")
    fewest = 2 if of_batch else 1  # of one value there are no statistics
    counts = [count for count in ROW_COUNTS if fewest <= count <= most]
    compilations = offline.compilations(workload, dtype, target, (*counts, samples))
    where = f"{name} {dtype_name} {target_name}"
    device = DEVICE_OF[target_name]
    found = [
        finding
        for direction, of_direction in launches.items()
        for finding in findings.of_call(
            of_direction,
            f"{where} {direction}",
            0 if workload.launch_bound else elements(shape),  # which no memory bounds, and so no loads in flight
            device,
            workload.of.by_channel == "mixed",
            widest_access(workload, shape, dtype.itemsize),
        )
    ]
    found += findings.of_compilations(compilations, where)
    if workload.of.norm and not of_batch:  # in which no sample stands for itself
        few, many = (
            reduction_layouts(offline.record(workload, dtype, "forward", target, workload.of_samples(count)))
            for count in (FEW, samples)
        )
        found += findings.of_layouts(few, many, where)
    return Compiled(launches, compilations, found)


def widest_access(workload: Workload, shape: Shape, itemsize: int) -> int:
    """Bytes that every run of neighbours lets a thread move at a time, 16 at most: contiguous planes each begin where
    the one before ends."""
    if not workload.of.by_channel or workload.channels_last:
        return WIDEST_ACCESS
    return math.gcd(WIDEST_ACCESS, elements(shape[2:]) * itemsize)


def count_workload(name: str, dtype_name: str, target_name: str) -> dict[Direction, Counted]:
    """Counts the traffic of a slice of a workload. Needs a process that interprets."""
    facts = DEVICE_OF[target_name].facts
    dtype = getattr(torch, dtype_name)
    return {direction: slices.count(WORKLOADS[name], dtype, direction, facts) for direction in DIRECTIONS}


def time_on_host(name: str) -> dict[Direction, host.HostTime]:
    """Times Python's part of the calls of a workload. Needs a process that compiles, and a machine that does nothing
    else."""
    return {direction: host.host_time(WORKLOADS[name], direction) for direction in DIRECTIONS}
