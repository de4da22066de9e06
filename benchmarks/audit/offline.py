"""What the launches of a public call look like, compiled for a device that is not there."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..traffic import Direction
from ..workloads import Shape, Workload
from .binary import CompiledLaunch, describe
from .calls import run, unfilled_case
from .inert import Launch, compiling_for
from .targets import Target

Tensor = torch.Tensor


def compiled_launches(
    workload: Workload, dtype: torch.dtype, direction: Direction, target: Target, shape: Shape | None = None
) -> list[CompiledLaunch]:
    """The launches of one call at its full size (or at `shape`), in order."""
    launches = record(workload, dtype, direction, target, shape)
    return [describe(launch, target) for launch in launches]


def record(
    workload: Workload, dtype: torch.dtype, direction: Direction, target: Target, shape: Shape | None = None
) -> list[Launch]:
    """The same, as Triton compiled them."""
    with compiling_for(target) as launches:
        run(workload.ours(), unfilled_case(workload, shape or workload.shape("full"), dtype), direction)
    return launches


def compilations(workload: Workload, dtype: torch.dtype, target: Target, counts: Iterable[int]) -> dict[str, int]:
    """How many times each kernel is compiled over these numbers of rows, images or filters, forward and backward."""
    hashes: dict[str, set[str]] = {}
    with compiling_for(target) as launches:
        for samples in counts:
            run(workload.ours(), unfilled_case(workload, workload.of_samples(samples), dtype), "forward+backward")
    for launch in launches:
        hashes.setdefault(launch.kernel, set()).add(launch.compiled.hash)
    return {kernel: len(found) for kernel, found in hashes.items()}
