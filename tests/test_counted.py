"""What is counted without a GPU, against arithmetic by hand: launches, bytes moved, bytes kept; and the table of it."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed, so there is nothing to count")

from benchmarks import counted, memory, run
from benchmarks.audit import eager, full_size, slices
from benchmarks.environment import ROOT
from benchmarks.records import CountedRow, Counts, Run
from benchmarks.report import text
from benchmarks.traffic import DIRECTIONS
from benchmarks.workloads import WORKLOADS, Shape, Shapes, Workload
from fused_ops.kernels.launch import H200, DeviceFacts
from tests.conftest import HAS_GPU

interpreted = pytest.mark.skipif(HAS_GPU, reason="a compiled kernel cannot be watched")

BF16, F32 = torch.bfloat16, torch.float32


def workload(shape: Shape, function: str, *, residual: bool = False, activation: str | None = None) -> Workload:
    return Workload("small", function, Shapes(shape, shape, shape), residual, activation)


def after_gelu(shape: Shape) -> Workload:
    return workload(shape, "layer_norm", residual=True, activation="gelu")


def after_relu(shape: Shape) -> Workload:
    return workload(shape, "layer_norm", residual=True, activation="relu")


def add_rms(shape: Shape) -> Workload:
    return workload(shape, "add_rms_norm")


class Bytes:
    """S of one pass over x, P of a parameter, R of a statistic (float32, one a row), M of a mask (a bit an element)."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.S = math.prod(shape) * dtype.itemsize
        self.P = shape[-1] * dtype.itemsize
        self.R = math.prod(shape[:-1]) * 4
        self.M = math.prod(shape) // 8


def both(count: Callable[..., Counts], each: Workload, dtype: torch.dtype) -> list[Counts]:
    return [count(each, dtype, direction) for direction in DIRECTIONS]


# --- torch eager's chain -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_eager_layer_norm_then_residual_then_gelu(dtype: torch.dtype) -> None:
    shape = (64, 1024)
    b = Bytes(shape, dtype)
    # norm: x, weight, bias -> n, mean, rstd; add: n, residual -> z; gelu: z -> y
    forward = (2 * b.S + 2 * b.P + 2 * b.R) + 3 * b.S + 2 * b.S
    # gelu: dy, z -> dz, which is dresidual; norm: dz, x, mean, rstd, weight -> dx; dz, x, mean, rstd -> dweight, dbias
    backward = 3 * b.S + (3 * b.S + b.P + 2 * b.R) + (2 * b.S + 2 * b.P + 2 * b.R)
    kept = 2 * b.S + 2 * b.R  # x, z, mean, rstd
    found = both(eager.count, after_gelu(shape), dtype)
    assert found == [Counts(3, forward), Counts(6, forward + backward, kept)]


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_eager_layer_norm_then_residual_then_relu(dtype: torch.dtype) -> None:
    shape = (3, 5, 768)
    b = Bytes(shape, dtype)
    forward = (2 * b.S + 2 * b.P + 2 * b.R) + 3 * b.S + 2 * b.S
    backward = 3 * b.S + (3 * b.S + b.P + 2 * b.R) + (2 * b.S + 2 * b.P + 2 * b.R)  # relu: dy, y -> dz
    kept = 2 * b.S + 2 * b.R  # x, y, mean, rstd
    found = both(eager.count, after_relu(shape), dtype)
    assert found == [Counts(3, forward), Counts(6, forward + backward, kept)]


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_eager_add_then_rms_norm_is_fused_and_adds_up_two_gradients(dtype: torch.dtype) -> None:
    shape = (64, 1024)
    b = Bytes(shape, dtype)
    forward = 3 * b.S + (2 * b.S + b.P + b.R)  # x, residual -> total; total, weight -> y, rstd
    # dy, total, rstd, weight -> d; dy, total, rstd -> dweight; d, dtotal -> dx, which is dresidual
    backward = (3 * b.S + b.R + b.P) + (2 * b.S + b.R + b.P) + 3 * b.S
    found = both(eager.count, add_rms(shape), dtype)
    assert found == [Counts(2, forward), Counts(5, forward + backward, b.S + b.R)]  # total, rstd


def test_eager_sums_parameter_gradients_of_many_short_rows_in_blocks() -> None:
    shape = (2**18, 256)
    b = Bytes(shape, BF16)
    sums = 4096 * b.P  # 2^15 blocks over the 8 groups of 32 columns
    forward = 2 * b.S + 2 * b.P + 2 * b.R
    backward = (3 * b.S + b.P + 2 * b.R) + (2 * b.S + 2 * b.R + 2 * sums) + 2 * (sums + b.P)
    _, found = both(eager.count, workload(shape, "layer_norm"), BF16)
    assert found == Counts(5, forward + backward, b.S + 2 * b.R)
    _, few_rows = both(eager.count, workload((2**16, 256), "layer_norm"), BF16)
    _, long_rows = both(eager.count, workload((2**17, 2112), "layer_norm"), BF16)
    assert few_rows.launches == long_rows.launches == 3


def test_eager_norms_rows_that_vectors_do_not_fit_in_two_kernels() -> None:
    shape = (8, 1023)
    b = Bytes(shape, F32)
    forward, _ = both(eager.count, workload(shape, "layer_norm"), F32)
    assert forward == Counts(2, (b.S + 2 * b.R) + (2 * b.S + 2 * b.P + 2 * b.R))  # the moments, and what applies them


@pytest.mark.parametrize("name", ["layer_norm_residual_gelu", "add_layer_norm_relu", "gpt2_decode_add_layer_norm"])
def test_eager_keeps_at_the_full_size_what_torch_really_keeps(name: str) -> None:
    shape = (4, WORKLOADS[name].shape("full")[-1])
    small = dataclasses.replace(WORKLOADS[name], shapes=Shapes(shape, shape, shape))
    kept = memory.kept_bytes(small.torch_composition(), small.case("full", F32, "cpu"))
    assert eager.count(small, F32, "forward+backward").kept_bytes == kept


def test_a_tensor_is_read_once_and_an_expanded_one_has_few_bytes() -> None:
    tensor = torch.empty(8, 16, device="meta")
    assert eager.Launch([tensor, tensor, tensor.detach()], [tensor]).moved_bytes == 2 * tensor.nbytes
    assert eager.Launch([tensor[:, :1].expand(8, 16)], []).moved_bytes == 8 * 4
    assert eager.Launch([tensor, torch.empty_like(tensor)], []).moved_bytes == 2 * tensor.nbytes


# --- ours ----------------------------------------------------------------------------------------------------------


def partial_rows(each: Workload, dtype: torch.dtype) -> int:
    """Of a call that is run whole: each program of the backward writes one row of partial sums."""
    launches = slices.count(each, dtype, "forward+backward").launches
    return next(launch.programs for launch in launches if launch.kernel == "row_norm_backward_kernel")


@interpreted
@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_our_layer_norm_with_residual_and_gelu(dtype: torch.dtype) -> None:
    shape = (64, 1024)
    b, each = Bytes(shape, dtype), after_gelu(shape)
    partials = partial_rows(each, dtype) * shape[-1] * 4
    forward = 3 * b.S + 2 * b.P  # x, residual, weight, bias -> y
    # dy, x, residual, weight, bias, mean, rstd -> dx, dresidual, partial sums -> dweight, dbias
    backward = (5 * b.S + 2 * b.P + 2 * b.R + 2 * partials) + (2 * partials + 2 * b.P)
    kept = 2 * b.S + 2 * b.R  # x, residual, mean, rstd
    found = both(full_size.count, each, dtype)
    assert found == [Counts(1, forward), Counts(3, forward + 2 * b.R + backward, kept)]


@interpreted
@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_our_layer_norm_with_residual_and_relu_keeps_a_mask(dtype: torch.dtype) -> None:
    shape = (64, 1024)
    b, each = Bytes(shape, dtype), after_relu(shape)
    partials = partial_rows(each, dtype) * shape[-1] * 4
    forward = 3 * b.S + 2 * b.P
    # dy, x, mask, weight, mean, rstd -> dx, dresidual, partial sums -> dweight, dbias
    backward = (4 * b.S + b.M + b.P + 2 * b.R + 2 * partials) + (2 * partials + 2 * b.P)
    kept = b.S + b.M + 2 * b.R  # x, mask, mean, rstd
    found = both(full_size.count, each, dtype)
    assert found == [Counts(1, forward), Counts(3, forward + b.M + 2 * b.R + backward, kept)]


@interpreted
@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_our_add_rms_norm(dtype: torch.dtype) -> None:
    shape = (64, 1024)
    b, each = Bytes(shape, dtype), add_rms(shape)
    partials = partial_rows(each, dtype) * shape[-1] * 4
    forward = 4 * b.S + b.P  # x, residual, weight -> total, y
    backward = (4 * b.S + b.P + b.R + partials) + (
        partials + b.P
    )  # dy, dtotal, total, weight, rstd -> dx, partial sums
    found = both(full_size.count, each, dtype)
    assert found == [Counts(1, forward), Counts(3, forward + b.R + backward, b.S + b.R)]  # total, rstd


# A device of which these calls have many rows a multiprocessor, as the full ones have of an H200.
SMALL_DEVICE = H200._replace(multiprocessors=2, l2_bytes=H200.l2_bytes // 66)


@interpreted
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("each", "facts", "kernel"),
    [
        (after_relu((200, 1024)), SMALL_DEVICE, "row_norm_forward_kernel"),
        (workload((8, 20480), "rms_norm"), SMALL_DEVICE, "row_walk_forward_kernel"),
        (workload((8, 40960), "layer_norm"), SMALL_DEVICE._replace(l2_bytes=2**18), "row_moments_kernel"),
    ],
    ids=["whole rows", "walked rows", "shared rows"],
)
def test_a_slice_scales_to_what_the_whole_call_moves(
    each: Workload, facts: DeviceFacts, kernel: str, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "SMALL_CALL", 0)
    part = slices.count(each, BF16, direction, facts)
    assert part.slice.shape[0] < each.shape("full")[0] / 5 and part.launches[0].kernel == kernel
    scaled = full_size.count(each, BF16, direction, facts)
    monkeypatch.setattr(slices, "SMALL_CALL", 2**30)
    whole = slices.count(each, BF16, direction, facts)
    assert whole.slice.shape == each.shape("full")
    assert scaled.launches == len(whole.launches)
    moved = sum(sum(launch.moved(facts.multiprocessors, facts.l2_bytes).values()) for launch in whole.launches)
    assert scaled.moved_bytes == moved


# --- the table -----------------------------------------------------------------------------------------------------

ROWS = [
    CountedRow("a", "layer_norm", (8, 4), "bfloat16", "forward", Counts(1, 3 * 2**20), Counts(3, 7 * 2**20)),
    CountedRow(
        "a", "layer_norm", (8, 4), "bfloat16", "forward+backward", Counts(3, 2**23, 2**21), Counts(6, 2**24, 2**22)
    ),
]


def test_the_table_says_what_it_is_and_how_to_read_it() -> None:
    before, heading, table, after = counted.paragraphs(Run({}, [], ROWS))
    assert heading == "counted, not timed"
    assert before.endswith("at full (GPU) size in bfloat16; no GPU ran.")
    assert table.splitlines() == [
        "workload  shape  pass     launches o/e  moved MiB o/e  ratio  kept MiB o/e",
        "--------  -----  -------  ------------  -------------  -----  ------------",
        "a         8x4    fwd             1 / 3    3.00 / 7.00   0.43             -",
        "                 fwd+bwd         3 / 6    8.00 / 16.0   0.50   2.00 / 4.00",
    ]
    assert after.startswith("o/e: ours / torch eager") and max(map(len, (before, after))) <= 160


def test_counts_survive_being_written(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    written = Run({}, [], ROWS, "the second half")
    written.write(path)
    assert Run.read(path) == written


def test_without_triton_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counted, "HAS_TRITON", False)
    rows, gap = run.count_without_gpu(torch.device("cpu"), [WORKLOADS["layer_norm_256"]], False)
    (line,) = counted.paragraphs(Run({}, [], rows, gap))
    assert line.startswith("Not counted: ") and "triton" in line


def test_a_count_that_fails_is_said_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(cases: object) -> Iterator[list[CountedRow]]:
        yield ROWS
        raise RuntimeError("no interpreter\nand a long trace")

    monkeypatch.setattr(counted, "count", half)
    found = run.count_without_gpu(torch.device("cpu"), [WORKLOADS["layer_norm_256"]] * 2, False)
    assert found == (ROWS, "RuntimeError: no interpreter")


def test_nothing_is_counted_on_a_gpu() -> None:
    assert run.count_without_gpu(torch.device("cuda"), [WORKLOADS["layer_norm_256"]], True) == ([], "")
    assert text.ending(Run({}, [])) == []


def test_the_command_ends_with_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a command: its workers import its main module, and with it kernels, before the pool can tell them anything."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    options = ["--device=cpu", "--size=tiny", "--seconds=0.01", f"--output={tmp_path}", "--filter=rms_norm_512"]
    command = [sys.executable, "-m", "benchmarks.run", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    heading, _, _, forward, backward, _ = done.stdout.splitlines()[-6:]
    assert heading == "counted, not timed"
    assert forward.startswith("rms_norm_512  131072x512  fwd") and backward.split()[0] == "fwd+bwd"
    (data,) = tmp_path.glob("*.jsonl")
    assert [row.direction for row in Run.read(data).counted] == ["forward", "forward+backward"]
