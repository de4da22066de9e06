"""The memory checker on kernels made wrong on purpose: each is caught by name, and its mended twin is not."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed, so there is nothing to watch")

import triton
import triton.language as tl

from benchmarks.audit.memory_checker import (
    OUT_OF_BOUNDS,
    READ_OF_ANOTHERS_WRITE,
    TWO_WRITERS,
    MemoryChecker,
    MemoryFault,
    checked,
)
from benchmarks.audit.watch import watch
from tests.conftest import HAS_GPU
from tests.wrong_kernels import copy_kernel

pytestmark = pytest.mark.skipif(HAS_GPU, reason="a compiled kernel cannot be watched")

BLOCK = 8


@triton.jit
def descriptor_kernel(X_ptr, Y_ptr, elements, step, BLOCK: tl.constexpr):
    """By tensor descriptors, which leave out what lies beyond the tensors."""
    first = tl.program_id(0) * step
    x = tl.make_tensor_descriptor(X_ptr, [elements], [1], [BLOCK])
    y = tl.make_tensor_descriptor(Y_ptr, [elements], [1], [BLOCK])
    y.store([first], x.load([first]))


@triton.jit
def overlapping_kernel(X_ptr, Y_ptr, step, BLOCK: tl.constexpr):
    """With a step under BLOCK, neighbours write the same elements of y."""
    offsets = tl.program_id(0) * step + tl.arange(0, BLOCK)
    tl.store(Y_ptr + offsets, tl.load(X_ptr + offsets))


@triton.jit
def neighbour_kernel(Y_ptr, distance, BLOCK: tl.constexpr):
    """Writes its own block of y after it has read the one at a distance: 0 is its own."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(Y_ptr + (offsets + distance * BLOCK) % (tl.num_programs(0) * BLOCK))
    tl.store(Y_ptr + offsets, y + 1)


@triton.jit
def count_kernel(Count_ptr, ATOMIC: tl.constexpr):
    """Every program adds 1 to one counter."""
    if ATOMIC:
        tl.atomic_add(Count_ptr, 1.0)
    else:
        tl.store(Count_ptr, tl.load(Count_ptr) + 1.0)


@triton.jit
def rows_kernel(X_ptr, Y_ptr, stride, COLUMNS: tl.constexpr, REACH: tl.constexpr):
    """Reads REACH columns of each row: more than COLUMNS reach into the gap before the next."""
    row = tl.program_id(0)
    columns = tl.arange(0, REACH)
    x = tl.load(X_ptr + row * stride + columns)
    tl.store(Y_ptr + row * COLUMNS + columns, x, mask=columns < COLUMNS)


def found(launch) -> list[str]:
    """What the checker reports of a launch."""
    checker = MemoryChecker()
    with watch(checker):
        launch()
    return [problem.what for problem in checker.problems]


@pytest.mark.parametrize("masked", [True, False])
def test_a_lane_out_of_bounds_is_caught_and_not_carried_out(masked):
    x, y = torch.arange(20.0), torch.full((20,), -1.0)
    problems = found(lambda: copy_kernel[(3,)](x, y, 20, BLOCK, masked))
    assert problems == ([] if masked else [OUT_OF_BOUNDS, OUT_OF_BOUNDS])
    assert torch.equal(x, y)


@pytest.mark.parametrize("step", [BLOCK, BLOCK // 2])
def test_tensor_descriptors_are_watched(step):
    """The third program's block ends beyond both tensors, of 20 elements; by half steps neighbours overlap."""
    x, y = torch.arange(20.0), torch.empty(20)
    problems = found(lambda: descriptor_kernel[(3,)](x, y, 20, step, BLOCK))
    assert problems == ([] if step == BLOCK else [TWO_WRITERS])
    if step == BLOCK:
        assert torch.equal(x, y)


def test_a_gap_between_rows_is_out_of_bounds():
    x, y = torch.zeros(3, 8)[:, :4], torch.empty(3, 4)
    assert found(lambda: rows_kernel[(3,)](x, y, 8, 4, 4)) == []
    assert found(lambda: rows_kernel[(3,)](x, y, 8, 4, 8)) == [OUT_OF_BOUNDS]


@pytest.mark.parametrize("step", [BLOCK, BLOCK - 1])
def test_two_programs_that_write_one_address_are_caught(step):
    x, y = torch.zeros(64), torch.empty(64)
    problems = found(lambda: overlapping_kernel[(4,)](x, y, step, BLOCK))
    assert problems == ([] if step == BLOCK else [TWO_WRITERS])


@pytest.mark.parametrize("distance", [0, 1, 3])
def test_a_read_of_anothers_write_is_caught_in_either_order(distance):
    """Four programs run in order here: at distance 1 the read comes first, at 3 the write."""
    y = torch.zeros(4 * BLOCK)
    problems = found(lambda: neighbour_kernel[(4,)](y, distance, BLOCK))
    assert problems == ([] if distance == 0 else [READ_OF_ANOTHERS_WRITE])


@pytest.mark.parametrize("atomic", [True, False])
def test_atomics_may_meet_and_plain_accesses_may_not(atomic):
    count = torch.zeros(1)
    problems = found(lambda: count_kernel[(5,)](count, atomic))
    assert problems == ([] if atomic else [READ_OF_ANOTHERS_WRITE, TWO_WRITERS])
    assert count.item() == 5


def test_a_fault_names_kernel_tensor_element_and_programs():
    x, y = torch.zeros(64), torch.empty(64)
    with (
        pytest.raises(
            MemoryFault, match=r"overlapping_kernel: two programs .* Y: store of program 1, element 7, .* program 0's"
        ),
        checked(),
    ):
        overlapping_kernel[(4,)](x, y, BLOCK - 1, BLOCK)


def test_two_views_of_one_storage_are_told_apart():
    """y is the second half of what x is the first of: a read of x is no read of y."""
    both = torch.zeros(2, 16)
    assert found(lambda: copy_kernel[(2,)](both[0], both[1], 16, BLOCK, True)) == []


def test_a_shuffled_order_runs_every_program_once():
    x, y = torch.arange(64.0), torch.empty(64)
    with watch(shuffle=3):
        copy_kernel[(8,)](x, y, 64, BLOCK, True)
    assert torch.equal(x, y)


def test_nothing_is_hooked_afterwards_not_even_after_an_error():
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    def methods():
        return GridExecutor._init_args_hst, InterpreterBuilder.set_grid_idx, InterpreterBuilder.create_masked_load

    before = methods()
    with pytest.raises(ZeroDivisionError), watch():
        assert methods() != before
        raise ZeroDivisionError
    assert methods() == before
