"""A driver that runs what was compiled: to a public call the GPU is there, and computes on its CPU tensors.

For a process with TRITON_INTERPRET=0 and a target of NVIDIA's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import triton

import fused_ops
from fused_ops.kernels.launch import DeviceFacts, assume_device

from ..inert import InertDriver, Launch, active_driver
from ..targets import DEVICE_OF, Target
from .findings import Finding, Report
from .formats import BITS, Array, constant
from .global_memory import GlobalMemory
from .machine import Machine
from .ptx import parse
from .shared_memory import SharedMemory
from .threads import Threads

LANES = 16384  # at once: as many as NumPy is quick with, and their registers fit a cache


class EmulatingDriver(InertDriver):
    """Records each launch as its base does, and then runs it."""

    def __init__(self, target: Target, launches: list[Launch], findings: list[Finding]) -> None:
        super().__init__(target, launches)
        record = self.launcher_cls

        class Emulator(record):  # type: ignore[misc, valid-type]
            def __call__(self, *arguments: Any) -> None:
                super().__call__(*arguments)
                # Arguments of the kernel are the last ones; constants among them are compiled in.
                types = list(self.source.signature.values())
                given = zip(arguments[-len(types) :], types, strict=True)
                names = [name for name, kind in self.source.signature.items() if kind != "constexpr"]
                run(launches[-1], names, [value for value, kind in given if kind != "constexpr"], findings)

        self.launcher_cls = Emulator


@contextlib.contextmanager
def emulating(
    target: Target, *, facts: DeviceFacts | None = None, launches: list[Launch] | None = None
) -> Iterator[list[Finding]]:
    """Calls inside compile for `target` and are run; the list fills with what is found wrong, `launches` with what ran.

    They are scheduled for a device with `facts`, or for the target's own. Raises RuntimeError in a process whose
    kernels are interpreted.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels are interpreted in this process and cannot be compiled; set TRITON_INTERPRET=0")
    if target.backend != "cuda":
        raise ValueError(f"PTX is emulated, and {target.name} has none")
    findings: list[Finding] = []
    driver = EmulatingDriver(target, [] if launches is None else launches, findings)
    with active_driver(driver), assume_device(facts or DEVICE_OF[target.name].facts), fused_ops.use_backend("triton"):
        yield findings


def run(launch: Launch, names: Sequence[str], arguments: Sequence[Any], findings: list[Finding]) -> None:
    """Runs all programs of a launch, as many at once as there are lanes for."""
    kernel = parse(launch.compiled.asm["ptx"])
    report = Report(launch.kernel, findings)
    tensors = {name: value for name, value in zip(names, arguments, strict=True) if isinstance(value, torch.Tensor)}
    memory = GlobalMemory(tensors, report)
    # What Triton adds at the end, for scratch memory that these kernels have none of, is null.
    added = [0] * (len(kernel.parameters) - len(arguments))
    parameters = {
        name: _bits(value, ptx_type)
        for (name, ptx_type), value in zip(kernel.parameters.items(), [*arguments, *added], strict=True)
    }
    at_once = max(1, LANES // kernel.threads)
    for first in range(0, launch.programs, at_once):
        threads = Threads(first, min(at_once, launch.programs - first), kernel.threads)
        shared = SharedMemory(threads, launch.compiled.metadata.shared, report)
        Machine(kernel, launch.programs, parameters, threads, memory, shared).run()


def _bits(value: Any, ptx_type: str) -> Array:
    """An argument as its parameter holds it."""
    if isinstance(value, torch.Tensor):
        value = value.data_ptr()
    if ptx_type.startswith("f"):
        kind = {"f32": np.float32, "f64": np.float64}[ptx_type]
        return np.array([value], kind).view(f"u{BITS[ptx_type] // 8}")
    return constant(str(int(value)), BITS[ptx_type])
