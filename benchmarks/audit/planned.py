"""What a call would launch: the kernels, their programs and tensors, noted without running any of them.

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
from fused_ops.kernels.launch import DeviceFacts, assume_device

from ..traffic import Direction
from ..workloads import Shape, Workload
from .calls import run, unfilled_case


@dataclass(frozen=True)
class PlannedLaunch:
    """A launch that was not run: its kernel, its number of programs, and the bytes of each of its tensors."""

    kernel: str
    programs: int
    tensor_bytes: dict[str, int]


@contextlib.contextmanager
def planning() -> Iterator[list[PlannedLaunch]]:
    """Kernels inside are not run: the list fills with their launches."""
    launches: list[PlannedLaunch] = []

    def note(executor: Any, *args: Any, **options: Any) -> None:
        named = {**dict(zip(executor.arg_names, args, strict=False)), **options}
        tensors = {name.removesuffix("_ptr"): value for name, value in named.items() if isinstance(value, torch.Tensor)}
        sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
        launches.append(PlannedLaunch(executor.fn.__name__, executor.grid[0], sizes))

    with mock.patch.object(interpreter.GridExecutor, "__call__", note):
        yield launches


def planned(
    workload: Workload, shape: Shape, dtype: torch.dtype, direction: Direction, facts: DeviceFacts
) -> list[PlannedLaunch]:
    """The launches of our call on an x of this shape, on a device with these facts."""
    with fused_ops.use_backend("triton"), assume_device(facts), planning() as launches:
        run(workload.ours(), unfilled_case(workload, shape, dtype), direction)
    return launches
