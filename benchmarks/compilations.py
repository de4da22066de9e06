"""How often a call has something compiled: a kernel by Triton, a graph by torch.compile."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch._dynamo.utils import counters

from fused_ops.backend import HAS_TRITON

from .timing import Run

_kernels = 0


def _count_kernel(*args: Any, **kwargs: Any) -> None:
    global _kernels
    _kernels += 1


def listen() -> None:
    """Has Triton report what it compiles in this process, for whomever, whether or not the result lies in its cache on
    disk. Inductor compiles most of its kernels in processes of its own."""
    if HAS_TRITON:
        from triton import knobs

        # The hook behind a compilation of a jitted function would have its constants written as JSON, which functions
        # are not.
        knobs.compilation.listener = _count_kernel


def so_far() -> int:
    """Kernels since `listen`, and graphs since the last reset of torch.compile."""
    return _kernels + int(counters["stats"]["unique_graphs"])


def first_call(run: Run, device: torch.device) -> tuple[float, int]:
    """The seconds that a call takes which nothing was prepared for, and what it compiled."""
    before, started = so_far(), time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, so_far() - before
