"""What our call of a workload takes of a GPU at its full size: the traffic that a slice counts, scaled to it.

Of each of its tensors, a launch of the full call moves as many times the bytes of a slice's launch as the tensor is
larger there: rows and statistics grow with the rows, parameters not at all, and partial sums with the multiprocessors,
of which a slice has one. How large they are is seen by making the full call and running none of its launches.

For a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from triton.runtime import interpreter

import fused_ops
from fused_ops.kernels.launch import H200, DeviceFacts, assume_device

from ..memory import kept_bytes
from ..records import Counts
from ..traffic import Direction
from ..workloads import Shape, Workload
from . import slices
from .calls import run
from .counts import LaunchTraffic
from .offline import unfilled_case

Tensor = torch.Tensor


def count(workload: Workload, dtype: torch.dtype, direction: Direction, facts: DeviceFacts = H200) -> Counts:
    """Of one call at the full size on a device with these facts."""
    counted = slices.count(workload, dtype, direction, facts)
    part = counted.slice
    in_slice = _planned(workload, part.shape, dtype, direction, part.facts)
    in_full = _planned(workload, workload.shape("full"), dtype, direction, facts)
    kernels = [[launch.kernel for launch in launches] for launches in (counted.launches, in_slice, in_full)]
    if not kernels[0] == kernels[1] == kernels[2]:
        raise RuntimeError(f"a slice of {workload.name} must launch what the full call does, but launches {kernels}")
    moved = sum(
        _scaled(launch, small, large, part.facts)
        for launch, small, large in zip(counted.launches, in_slice, in_full, strict=True)
    )
    return Counts(len(in_full), round(moved), _kept(workload, dtype) if direction == "forward+backward" else None)


@dataclass(frozen=True)
class PlannedLaunch:
    """A launch that was not run: its kernel, and the bytes of each of its tensors."""

    kernel: str
    tensor_bytes: dict[str, int]


@contextlib.contextmanager
def planning() -> Iterator[list[PlannedLaunch]]:
    """Kernels inside are not run: the list fills with their launches."""
    launches: list[PlannedLaunch] = []

    def note(executor: Any, *args: Any, **options: Any) -> None:
        named = {**dict(zip(executor.arg_names, args, strict=False)), **options}
        tensors = {name.removesuffix("_ptr"): value for name, value in named.items() if isinstance(value, Tensor)}
        launches.append(PlannedLaunch(executor.fn.__name__, {name: value.nbytes for name, value in tensors.items()}))

    with mock.patch.object(interpreter.GridExecutor, "__call__", note):
        yield launches


def _planned(
    workload: Workload, shape: Shape, dtype: torch.dtype, direction: Direction, facts: DeviceFacts
) -> list[PlannedLaunch]:
    with fused_ops.use_backend("triton"), assume_device(facts), planning() as launches:
        run(workload.ours(), unfilled_case(workload, shape, dtype), direction)
    return launches


def _scaled(launch: LaunchTraffic, small: PlannedLaunch, large: PlannedLaunch, facts: DeviceFacts) -> float:
    # One program a multiprocessor is resident in any case; how many more, only a compiler knows. A row is walked twice
    # where `walks_rows` of the launch tables finds that the rows of all of them stay in the L2 in between.
    moved = launch.moved(facts.multiprocessors, facts.l2_bytes)
    return sum(count * large.tensor_bytes[name] / small.tensor_bytes[name] for name, count in moved.items())


def _kept(workload: Workload, dtype: torch.dtype) -> int:
    with fused_ops.use_backend("triton"), planning():
        return kept_bytes(workload.ours(), unfilled_case(workload, workload.shape("full"), dtype))
