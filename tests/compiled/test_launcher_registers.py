"""A launcher asks for more registers of a thread until none of its values is kept in memory."""

from __future__ import annotations

from typing import Any

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


@triton.jit
def holding_kernel(X_ptr, Y_ptr, count, SIZE: tl.constexpr):
    """Holds SIZE elements until their sum is known."""
    place = tl.arange(0, SIZE)
    x = tl.load(X_ptr + place, mask=place < count, other=0.0)
    tl.store(Y_ptr + place, x - tl.sum(x), mask=place < count)


@triton.jit
def keeping_a_stack_kernel(X_ptr, Y_ptr, count, SIZE: tl.constexpr):
    """The sine of what is large takes a stack, which no register makes smaller."""
    place = tl.arange(0, SIZE)
    tl.store(Y_ptr + place, tl.sin(tl.load(X_ptr + place, mask=place < count)), mask=place < count)


def launched(
    target: str, most_registers: int | None, size: int, times: int = 1, kernel: Any = holding_kernel
) -> list[tuple[int, int]]:
    """(registers, spilled bytes) of each launch of a kernel of four warps."""
    x = torch.empty(size)
    launch = Launcher(kernel, 4, size, most_registers=most_registers)
    with compiling_for(TARGETS[target]) as launches:
        for _ in range(times):
            launch(1, CPU, (x,), (torch.empty_like(x),), size)
        return [resources(each, TARGETS[target]) for each in launches]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_what_spills_gets_more_registers_and_is_launched_once(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (registers, spilled), again = launched(target, 32, 8192, times=2)
    assert spilled == 0 and registers > 32
    assert again == (registers, spilled)
    monkeypatch.setattr("fused_ops.kernels.launcher.more_registers", lambda *_: None)
    ((registers, spilled),) = launched(target, 32, 8192)
    assert spilled > 0 and registers <= 32


def test_what_no_register_helps_is_launched_with_the_fewest() -> None:
    ((registers, spilled),) = launched("sm_90", None, 128, kernel=keeping_a_stack_kernel)
    assert spilled > 0 and registers < 64


def test_what_no_thread_has_registers_for_is_launched_as_it_is() -> None:
    ((registers, spilled),) = launched("sm_90", None, 65536)
    assert spilled > 0 and registers >= 248


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
