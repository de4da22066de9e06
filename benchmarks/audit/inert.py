"""Compilation for a GPU that is not there: an inert Triton driver compiles each launch, records it, and runs nothing.

For a process with TRITON_INTERPRET=0. Tensors stay on the CPU; what is in them afterwards means nothing.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton

import fused_ops
from fused_ops.kernels.launch import assume_device

from . import cubin
from .targets import DEVICE_OF, Target

WORD_BYTES = 4  # in which a driver counts what is spilled


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel's name, the number of its programs, and what was compiled for it."""

    kernel: str
    programs: int
    compiled: Any

    @property
    def warps(self) -> int:
        return int(self.compiled.metadata.num_warps)


class InertDriver:
    """What Triton asks of a driver. A new one is a new device to Triton's caches.

    Launches are appended to `launches`; where that is None they cost as little as a call can.
    """

    _devices = itertools.count()

    def __init__(self, target: Target, launches: list[Launch] | None) -> None:
        self.target = target
        self.device = next(self._devices)
        self.utils = self
        self.launcher_cls = _ignore if launches is None else self._recorder(launches)

    def _recorder(self, launches: list[Launch]) -> Any:
        driver = self

        class Recorder:
            def __init__(self, source: Any, metadata: Any) -> None:
                self.source, self.metadata = source, metadata

            def __call__(self, x: int, y: int, z: int, *_: Any) -> None:
                assert (y, z) == (1, 1), "axes y and z of a grid end at 65,535"
                kernels = self.source.fn.device_caches[driver.device][0].values()
                compiled = next(kernel for kernel in kernels if kernel.metadata is self.metadata)
                launches.append(Launch(self.metadata.name, x, compiled))

        return Recorder

    def load_binary(self, name: str, binary: bytes, *_: Any) -> tuple[int, int, int, int, int]:
        """(module, function, registers, spilled words, most threads): of registers and spills the launcher reads."""
        registers = spilled_bytes = 0
        if self.target.backend == "cuda":
            registers, spilled_bytes = cubin.resources(binary, name)
        return 1, 1, registers, spilled_bytes // WORD_BYTES, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        unit = self.target.multiprocessor
        return {"max_shared_mem": unit.shared_bytes - unit.shared_reserved, "warpSize": self.target.warp_size}

    def get_current_target(self) -> Any:
        return self.target.triton()

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, _: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _ignore(source: Any, metadata: Any) -> Any:
    return _no_launch


def _no_launch(*_: Any) -> None:
    """A launch that costs nothing."""


@contextlib.contextmanager
def compiling_for(target: Target, *, record: bool = True) -> Iterator[list[Launch]]:
    """Calls inside compile for `target`, schedule for its device, and launch nothing; the list fills with launches.

    Raises RuntimeError in a process whose kernels are interpreted.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels are interpreted in this process and cannot be compiled; set TRITON_INTERPRET=0")
    launches: list[Launch] = []
    with (
        active_driver(InertDriver(target, launches if record else None)),
        assume_device(DEVICE_OF[target.name].facts),
        fused_ops.use_backend("triton"),
    ):
        yield launches


@contextlib.contextmanager
def active_driver(driver: InertDriver) -> Iterator[None]:
    """Makes it Triton's, and the one before it again at the end."""
    config = triton.runtime.driver
    try:
        previous = config.active
    except RuntimeError:  # what Triton raises where there is no GPU
        previous = None
    config.set_active(driver)
    try:
        yield
    finally:
        config.set_active(previous)
