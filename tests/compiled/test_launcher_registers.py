"""A launcher asks for more registers of a thread until none of its values is kept in memory."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.audit.binary import resources
from benchmarks.audit.inert import compiling_for
from benchmarks.audit.targets import TARGETS
from fused_ops.kernels.launch import more_registers
from fused_ops.kernels.launcher import Launcher

CPU = torch.device("cpu")


def bound_once(launcher: Launcher, programs: int, arguments: Any, options: dict[str, Any]) -> None:
    """In place of `Launcher._bound_registers`: the first bound, whatever spills."""
    options["maxnreg"] = launcher.most_registers


def bounds_of(num_warps: int, registers: int = 32) -> list[int]:
    """All that are tried after so many registers."""
    found = []
    while (more := more_registers(num_warps, registers)) is not None:
        found.append(registers := more)
    return found


@triton.jit
def holding_kernel(X_ptr, Y_ptr, count, SIZE: tl.constexpr):
    """Holds SIZE elements until their sum is known."""
    place = tl.arange(0, SIZE)
    x = tl.load(X_ptr + place, mask=place < count, other=0.0)
    tl.store(Y_ptr + place, x - tl.sum(x), mask=place < count)


def launched(target: str, most_registers: int | None, size: int, times: int = 1) -> list[tuple[int, int]]:
    """(registers, spilled bytes) of each launch of a kernel of four warps."""
    x = torch.empty(size)
    launch = Launcher(holding_kernel, 4, size, most_registers=most_registers)
    with compiling_for(TARGETS[target]) as launches:
        for _ in range(times):
            launch(1, CPU, (x,), (torch.empty_like(x),), size)
        return [resources(each, TARGETS[target]) for each in launches]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_what_spills_gets_more_registers_and_is_launched_once(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (registers, spilled), again = launched(target, 32, 8192, times=2)
    assert spilled == 0 and registers > 32
    assert again == (registers, spilled)
    monkeypatch.setattr(Launcher, "_bound_registers", bound_once)
    ((registers, spilled),) = launched(target, 32, 8192)
    assert spilled > 0 and registers <= 32


def test_what_no_thread_has_registers_for_is_launched_as_it_is() -> None:
    ((registers, spilled),) = launched("sm_90", None, 65536)
    assert spilled > 0 and registers >= 248


class SpillingKernel:
    """Compiles to what spills as much as is told of (warps, bound), or eight bytes; takes all registers it may."""

    def __init__(self, spills: dict[tuple[int, int | None], int]) -> None:
        self.spills = spills
        self.tried: list[tuple[int, int | None]] = []

    def warmup(self, *arguments: Any, grid: Any, num_warps: int, maxnreg: int | None = None) -> Any:
        self.tried.append((num_warps, maxnreg))
        compiled = MagicMock(n_regs=maxnreg or 32, n_spills=self.spills.get(self.tried[-1], 8))
        compiled.result.return_value = compiled
        return compiled


@pytest.mark.parametrize(
    ("num_warps", "spills", "tried", "best"),
    [
        (16, {(16, None): 0}, [(16, None)], (16, None)),
        (16, {(16, 128): 0}, [(16, None), (16, 64), (16, 128)], (16, 128)),
        (32, {(16, None): 0}, [(32, None), (32, 64), (16, None)], (16, None)),
        (32, {(32, 64): 4, (16, 128): 6}, [(32, None), (32, 64), (16, None), (16, 64), (16, 128)], (32, 64)),
        (1, {}, [(1, None), *((1, bound) for bound in bounds_of(1))], (1, None)),
    ],
)
def test_what_spills_least_is_launched_and_half_the_warps_are_tried_at_last(num_warps, spills, tried, best):
    kernel = SpillingKernel(spills)
    launch = Launcher(kernel, num_warps, may_halve=True)
    options: dict[str, Any] = {"num_warps": num_warps}
    launch._bound_registers(1, (), options)
    assert kernel.tried == tried
    assert (options["num_warps"], options.get("maxnreg")) == best
    kernel.tried.clear()
    Launcher(kernel, num_warps)._bound_registers(1, (), {"num_warps": num_warps})
    assert kernel.tried == [each for each in tried if each[0] == num_warps]


def test_the_bound_grows_until_a_program_is_alone_or_a_thread_has_all() -> None:
    assert more_registers(num_warps=8, registers=64) == 85  # 3 programs of 256 threads instead of 4
    assert more_registers(num_warps=16, registers=64) == 128
    assert more_registers(num_warps=16, registers=120) == 128  # 16 more there are not
    assert more_registers(num_warps=16, registers=128) is None
    assert more_registers(num_warps=32, registers=64) is None
    assert more_registers(num_warps=4, registers=168) == 255  # 2 instead of 3, which would leave 256
    assert more_registers(num_warps=4, registers=255) is None
    for num_warps in (1, 2, 4, 8, 16, 32):
        bound, bounds = 16, []
        while (larger := more_registers(num_warps, bound)) is not None:
            assert larger > bound and larger * num_warps * 32 <= 65536
            bounds.append(bound := larger)
        assert len(bounds) <= (255 - 16) / 16
