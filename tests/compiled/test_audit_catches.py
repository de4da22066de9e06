"""The audit's instruments on kernels made wrong on purpose: each is caught by name, and its mended twin is not."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.audit import findings
from benchmarks.audit.assembly import CodeSize
from benchmarks.audit.binary import describe
from benchmarks.audit.estimate import Work, estimate
from benchmarks.audit.layouts import reduction_layouts
from benchmarks.audit.targets import DEVICE_OF, DEVICES, TARGETS

# Triton 3.9 wants to be told whether to fuse multiply and add; these kernels do not mind.
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

MULTIPROCESSORS = 132
ELEMENTS = 2**26


@triton.jit
def copy_kernel(X_ptr, Y_ptr, SPAN: tl.constexpr):
    """One row a program, as it should be."""
    offsets = tl.program_id(0).to(tl.int64) * SPAN + tl.arange(0, SPAN)
    tl.store(Y_ptr + offsets, tl.load(X_ptr + offsets) * 2)


@triton.jit
def narrow_kernel(X_ptr, Y_ptr, stride, SPAN: tl.constexpr):
    """A row stride that may be anything: two bytes at a time."""
    offsets = tl.program_id(0).to(tl.int64) * stride + tl.arange(0, SPAN)
    tl.store(Y_ptr + offsets, tl.load(X_ptr + offsets) * 2)


@triton.jit
def holds_too_much_kernel(X_ptr, Y_ptr, SPAN: tl.constexpr):
    """Needs every element of a long row at once, of which a thread has no room for its share."""
    offsets = tl.program_id(0).to(tl.int64) * SPAN + tl.arange(0, SPAN)
    x = tl.load(X_ptr + offsets)
    x = x - tl.sum(x, axis=0) / SPAN
    x = x - tl.sum(tl.exp(x), axis=0)
    tl.store(Y_ptr + offsets, x)


@triton.jit
def copy_rows_kernel(X_ptr, Y_ptr, rows, SPAN: tl.constexpr):
    """The number of rows is a number like any other, and 1 and multiples of 16 are compiled for."""
    row = tl.program_id(0)
    offsets = row.to(tl.int64) * SPAN + tl.arange(0, SPAN)
    mask = (offsets >= 0) & (row < rows)
    tl.store(Y_ptr + offsets, tl.load(X_ptr + offsets, mask=mask), mask=mask)


@triton.jit
def constant_rows_kernel(X_ptr, Y_ptr, ROWS: tl.constexpr, SPAN: tl.constexpr):
    """The number of rows is a constant: compiled anew for each batch."""
    row = tl.program_id(0)
    offsets = row.to(tl.int64) * SPAN + tl.arange(0, SPAN)
    mask = (offsets >= 0) & (row < ROWS)
    tl.store(Y_ptr + offsets, tl.load(X_ptr + offsets, mask=mask), mask=mask)


@triton.jit
def row_sums_kernel(X_ptr, Sum_ptr, chunks, SPAN: tl.constexpr, STAGES: tl.constexpr):
    """Chunk after chunk, with a sum over the program after each."""
    total = 0.0
    offsets = tl.program_id(0).to(tl.int64) * chunks * SPAN + tl.arange(0, SPAN)
    for chunk in tl.range(chunks, num_stages=STAGES):
        total += tl.sum(tl.exp(tl.load(X_ptr + offsets + chunk * SPAN).to(tl.float32)), axis=0)
    tl.store(Sum_ptr + tl.program_id(0), total)


def x_and_y(dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(2**20, dtype=dtype), torch.empty(2**20, dtype=dtype)


def caught(launches, elements: int = ELEMENTS, target: str = "sm_90") -> set[str]:
    """What is found of these launches, by name."""
    described = [describe(launch, TARGETS[target]) for launch in launches]
    return {found.what for found in findings.of_call(described, "here", elements, DEVICE_OF[target])}


def test_a_kernel_as_it_should_be_is_not_caught(sm_90):
    copy_kernel[(2**14,)](*x_and_y(), 4096)
    assert caught(sm_90) == set()
    (launch,) = (describe(launch, TARGETS["sm_90"]) for launch in sm_90)
    # Four warps of 32 threads with 16 bytes each hold 1024 halves, so that 4096 take four loads and four stores.
    assert launch.widths == {16: 8}
    assert launch.thread_bytes_in_flight == 4 * 16
    assert (launch.threads, launch.shared_bytes, launch.copies, launch.stages) == (128, 0, 0, 1)


def test_a_spill_is_caught(sm_90):
    x, y = x_and_y(torch.float32)
    holds_too_much_kernel[(2**11,)](x, y, 65536, num_warps=4)
    assert "spills" in caught(sm_90)
    sm_90.clear()
    holds_too_much_kernel[(2**14,)](x, y, 4096, num_warps=4)
    assert "spills" not in caught(sm_90)


def test_narrow_accesses_are_caught(sm_90):
    narrow_kernel[(2**14,)](*x_and_y(), 4097, 4096)
    assert "narrow accesses" in caught(sm_90)
    assert set(describe(sm_90[0], TARGETS["sm_90"]).widths) == {2}


def test_one_narrow_operand_beside_wide_ones_is_caught(sm_90):
    copy_kernel[(2**14,)](*x_and_y(), 4096)
    wide = describe(sm_90[0], TARGETS["sm_90"])
    mixed = dataclasses.replace(wide, widths={2: 32, 16: 12})  # of four tensors one two bytes at a time
    found = findings.of_call([mixed], "here", ELEMENTS, DEVICE_OF["sm_90"])
    assert [finding.what for finding in found] == ["narrow accesses"]


def test_too_few_programs_are_caught(sm_90):
    copy_kernel[(MULTIPROCESSORS - 1,)](*x_and_y(), 4096)
    assert "under-filled" in caught(sm_90)
    assert caught(sm_90, elements=findings.LARGE_CALL - 1) == set(), "a small call need not fill a device"


def test_few_bytes_in_flight_are_caught(sm_90):
    """One program a multiprocessor, of one warp with 16 bytes a thread: 512 bytes."""
    copy_kernel[(MULTIPROCESSORS,)](*x_and_y(), 256, num_warps=1)
    assert caught(sm_90) == {"few bytes in flight"}


def test_a_lone_program_that_works_without_loading_is_caught(sm_90):
    """32 warps in step, one such program a multiprocessor: without a pipeline nothing is loaded while it sums."""
    x, y = x_and_y()
    for stages in (1, 3):
        sm_90.clear()
        row_sums_kernel[(MULTIPROCESSORS,)](x, y, 32, 16384, stages, num_warps=32)
        assert ("works without loading" in caught(sm_90)) == (stages == 1), f"num_stages={stages}"
    launch = describe(sm_90[0], TARGETS["sm_90"])
    assert launch.stages == 3
    assert launch.copies > 0


@pytest.mark.parametrize("kernel", [copy_rows_kernel, constant_rows_kernel])
def test_a_compilation_for_each_number_of_rows_is_caught(kernel, sm_90):
    x, y = x_and_y()
    for rows in (2, 3, 5, 7, 33):
        kernel[(rows,)](x, y, rows, 1024)
    compilations = {kernel.__name__: len({launch.compiled.hash for launch in sm_90})}
    found = [finding.what for finding in findings.of_compilations(compilations, "here")]
    assert found == (["recompiles with the number of rows"] if kernel is constant_rows_kernel else [])


def test_a_finding_names_the_place_and_both_numbers(sm_90):
    copy_kernel[(7,)](*x_and_y(), 4096)
    launches = [describe(sm_90[0], TARGETS["sm_90"])]
    found = findings.of_call(launches, "layer_norm_1024 forward", ELEMENTS, DEVICE_OF["sm_90"])
    assert "layer_norm_1024 forward: copy_kernel: under-filled: 7 programs, allowed 132 and more" in map(str, found)


def test_the_estimate_of_scalar_and_under_filled_kernels_is_slower(sm_90):
    """Scalar: a thread has one element of two bytes, so that a full multiprocessor has 4 KiB under way, not 64."""
    x, y = x_and_y()
    copy_kernel[(2**14,)](x, y, 4096)
    narrow_kernel[(2**17,)](x, y, 513, 512, num_warps=16)
    vector, scalar = (describe(launch, TARGETS["sm_90"]) for launch in sm_90)
    under_filled = dataclasses.replace(vector, programs=40)
    moved = 2 * 2**14 * 4096 * 2
    fast, slow, unfilled = (
        estimate(Work(launch, moved, moved, moved), DEVICES["H200"]) for launch in (vector, scalar, under_filled)
    )
    # 256 MiB at 0.9 of 4.8 TB/s, and one launch.
    assert fast.seconds == pytest.approx(moved / (0.9 * 4.8e12) + 2.5e-6)
    assert fast.limit == "memory"
    assert scalar.bytes_in_flight(MULTIPROCESSORS) == 2048 * 2
    # 132 times 4 KiB in 0.7 us and more: at most 0.77 TB/s.
    assert slow.seconds > moved / 0.78e12
    assert unfilled.seconds > 1.5 * fast.seconds


def test_instructions_follow_the_bytes_that_a_loop_accesses():
    """10 instructions before a loop of 5, which moves 32 bytes a trip: 320 bytes take 10 trips."""
    assert CodeSize(10, 0, 5, 32).issued(320) == 10 + 10 * 5
    assert CodeSize(10, 64, 0, 0).issued(64) == 10


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_compiles_and_is_read(target):
    from benchmarks.audit.inert import compiling_for

    with compiling_for(TARGETS[target]) as launches:
        copy_kernel[(2**14,)](*x_and_y(), 4096)
        row_sums_kernel[(2**10,)](*x_and_y(), 32, 4096, 1)
    copy, sums = (describe(launch, TARGETS[target]) for launch in launches)
    assert copy.widths == ({16: 8} if target != "gfx942" else {16: 4})  # 64 threads a warp: twice the threads
    assert copy.spilled_bytes == sums.spilled_bytes == 0
    assert copy.registers > 0
    assert 0 < copy.resident_programs <= TARGETS[target].multiprocessor.program_slots
    assert sums.code.loop_bytes > 0
    assert copy.code.loop_instructions == 0
    assert DEVICE_OF[target].target == target


def test_a_reduction_in_another_layout_is_told_apart(sm_90):
    for warps in (4, 8, 4):
        row_sums_kernel[(4,)](*x_and_y(), 32, 4096, 1, num_warps=warps)
    four, eight, again = (reduction_layouts([launch]) for launch in sm_90)
    assert findings.of_layouts(four, again, "here") == []
    (finding,) = findings.of_layouts(four, eight, "here")
    assert finding.what == "sums many rows in another order than few"
    assert "warpsPerCTA = [8]" in finding.found and "warpsPerCTA = [4]" in finding.allowed
