"""The parts of an audit of one workload, each for a worker process: compiled, counted, timed on the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..traffic import DIRECTIONS, Direction
from ..workloads import WORKLOADS, elements
from . import findings, offline, sweep
from .binary import CompiledLaunch
from .findings import Finding
from .targets import DEVICE_OF, TARGETS

# One row, an odd number, one that 16 divides, and more rows than a multiprocessor can hold.
ROW_COUNTS = (1, 3, 16, 5000)


@dataclass(frozen=True)
class Compiled:
    """A workload on one target: the launches of each direction, and how often each kernel was compiled."""

    workload: str
    target: str
    launches: dict[Direction, list[CompiledLaunch]]
    compilations: dict[str, int]
    findings: list[Finding]


def compile_workload(name: str, dtype_name: str, target_name: str) -> Compiled:
    """Compiles the calls of a workload at its full size, and over row counts."""
    workload, dtype, target = WORKLOADS[name], getattr(torch, dtype_name), TARGETS[target_name]
    shape = workload.shape("full")
    launches = {direction: offline.compiled_launches(workload, dtype, direction, target) for direction in DIRECTIONS}
    rows = elements(shape) // shape[-1]
    compilations = offline.compilations(workload, dtype, target, (*ROW_COUNTS, rows))
    where = f"{name} {dtype_name} {target_name}"
    multiprocessors = DEVICE_OF[target_name].facts.multiprocessors
    found = [
        finding
        for direction, of_direction in launches.items()
        for finding in findings.of_call(of_direction, f"{where} {direction}", elements(shape), multiprocessors)
    ]
    return Compiled(name, target_name, launches, compilations, found + findings.of_compilations(compilations, where))


def compile_tables(share: slice, target_name: str) -> list[sweep.Spill]:
    """A share of every entry of the launch tables on one target."""
    return sweep.spills(list(sweep.calls())[share], target_name)
