"""Kernels compiled for a GPU that is not there: an inert Triton driver compiles each launch and records it.

Nothing runs. These tests are a process of their own, with TRITON_INTERPRET=0.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import fused_ops

try:
    import triton
    from triton.backends.compiler import GPUTarget
except ImportError:
    triton = None

if triton is None or triton.knobs.runtime.interpret:
    collect_ignore_glob = ["test_*.py"]  # there is nothing that compiles in this process


class Launch(NamedTuple):
    """One launch: the kernel's name, its grid, and what was compiled for it."""

    name: str
    programs: int
    compiled: Any

    def resources(self) -> dict[str, int]:
        """Registers and stack bytes a thread, as cuobjdump reads them from the binary."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
            Path(binary.name).write_bytes(self.compiled.asm["cubin"])
            tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
            usage = subprocess.run([tool, "-res-usage", binary.name], capture_output=True, text=True, check=True).stdout
        found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
        assert {"REG", "STACK", "LOCAL"} <= found.keys(), f"cuobjdump printed no resource usage: {usage!r}"
        return found

    def global_access_widths(self) -> set[int]:
        """Bytes of each kind of load and store between registers and global memory, and of asynchronous copies."""
        ptx = self.compiled.asm["ptx"]
        vectors = re.findall(r"\b(?:ld|st)\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)", ptx)
        copies = re.findall(r"cp\.async\.\w+\.shared\.global \[[^\]]*\], \[[^\]]*\], (?:0x)?(\d+)", ptx)
        return {int(count or 1) * int(bits) // 8 for count, bits in vectors} | {int(size, 16) for size in copies}


class InertDriver:
    """What Triton asks of a driver, for a target that need not exist. A new one is a new device to Triton's caches."""

    _devices = itertools.count()

    def __init__(self, target: GPUTarget, launches: list[Launch]) -> None:
        self.target = target
        self.device = next(self._devices)

        class Launcher:
            def __init__(self, source: Any, metadata: Any) -> None:
                self.source, self.metadata = source, metadata

            def __call__(self, x: int, y: int, z: int, *_: Any) -> None:
                assert (y, z) == (1, 1), "axes y and z of a grid end at 65,535"
                kernels = self.source.fn.device_caches[driver.device][0].values()
                compiled = next(kernel for kernel in kernels if kernel.metadata is self.metadata)
                launches.append(Launch(self.metadata.name, x, compiled))

        driver = self
        self.utils, self.launcher_cls = self, Launcher

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": self.target.warp_size}

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, _: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@pytest.fixture
def sm_90() -> Iterator[list[Launch]]:
    """Makes an inert sm_90 the active driver and 'triton' the backend; the list fills with the launches."""
    launches: list[Launch] = []
    triton.runtime.driver.set_active(InertDriver(GPUTarget("cuda", 90, 32), launches))
    with fused_ops.use_backend("triton"):
        yield launches
