"""The traffic counter: hand arithmetic of small calls, and kernels that move too much, each caught by name."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed, so there is nothing to count")

import triton
import triton.language as tl

import fused_ops
from benchmarks.audit import allowances, slices
from benchmarks.audit.allowances import LEAST, Allowance, Schedule, allowance
from benchmarks.audit.calls import run, unfilled_case
from benchmarks.audit.counts import LaunchTraffic, TrafficCounter, size_of
from benchmarks.audit.rows import traffic_findings
from benchmarks.audit.watch import watch
from benchmarks.workloads import WORKLOADS, Shape
from tests.conftest import HAS_GPU
from tests.schedules import forget_schedules

pytestmark = pytest.mark.skipif(HAS_GPU, reason="a compiled kernel cannot be watched")

MIB = 2**20


def counted(name: str, shape: Shape, dtype: torch.dtype, direction: str) -> list[LaunchTraffic]:
    """The launches of a workload's call on an x of this shape."""
    workload, counter = WORKLOADS[name], TrafficCounter()
    case = workload.case_of(shape, lambda own_shape, *_: torch.zeros(own_shape, dtype=dtype))
    with fused_ops.use_backend("triton"), watch(counter):
        run(workload.ours(), case, direction)
    return counter.launches


def distinct(launch: LaunchTraffic) -> dict[str, tuple[int, int]]:
    """Bytes read and written, by tensor."""
    return {tensor.argument: (tensor.read, tensor.written) for tensor in launch.tensors}


# --- three small shapes, by hand -----------------------------------------------------------------------------------


def test_layer_norm_forward_by_hand() -> None:
    """bfloat16 [8, 1024]: S = 8 * 1024 * 2 = 16384 bytes; a weight is 2048. A row a tile makes eight programs, each of
    which asks for weight and bias."""
    (launch,) = counted("layer_norm_1024", (8, 1024), torch.bfloat16, "forward")
    assert (launch.kernel, launch.programs) == ("row_norm_forward_kernel", 8)
    assert distinct(launch) == {"X": (16384, 0), "Y": (0, 16384), "Weight": (2048, 0), "Bias": (2048, 0)}
    assert launch.distinct() == 2 * 16384 + 2 * 2048
    assert launch.asked() == 2 * 16384 + 8 * (2 * 2048)


def test_layer_norm_residual_relu_by_hand() -> None:
    """float32 [10, 1024]: S = 40960, a weight 4096, a statistic 10 * 4 = 40, the mask 10 * 1024 / 8 = 1280 bytes. Ten
    rows are ten tiles for ten programs, each of which writes a row of both partial sums: 10 * 4096 = 40960 each."""
    forward, backward, column_sum = counted("layer_norm_residual_relu", (10, 1024), torch.float32, "forward+backward")
    reads = {"X": 40960, "Residual": 40960, "Weight": 4096, "Bias": 4096}
    writes = {"Y": 40960, "Bits": 1280, "Mean": 40, "Rstd": 40}
    assert distinct(forward) == {**{k: (v, 0) for k, v in reads.items()}, **{k: (0, v) for k, v in writes.items()}}
    reads = {"DY": 40960, "X": 40960, "Bits": 1280, "Weight": 4096, "Mean": 40, "Rstd": 40}
    writes = {"DX": 40960, "DResidual": 40960, "PartialDWeight": 40960, "PartialDBias": 40960}
    assert distinct(backward) == {**{k: (v, 0) for k, v in reads.items()}, **{k: (0, v) for k, v in writes.items()}}
    reads, writes = {"PartialDWeight": 40960, "PartialDBias": 40960}, {"DWeight": 4096, "DBias": 4096}
    assert distinct(column_sum) == {**{k: (v, 0) for k, v in reads.items()}, **{k: (0, v) for k, v in writes.items()}}


def test_add_rms_norm_by_hand() -> None:
    """bfloat16 [6, 4096]: S = 49152, the weight 8192, rstd 6 * 4 = 24 bytes; a program a row backward."""
    forward, backward, column_sum = counted("llama3_8b_add_rms_norm", (6, 4096), torch.bfloat16, "forward+backward")
    assert forward.distinct() == 4 * 49152 + 8192 + 24
    assert backward.programs == 6
    assert backward.distinct() == 4 * 49152 + 8192 + 24 + 6 * 4096 * 4
    assert column_sum.distinct() == 6 * 4096 * 4 + 8192
    # Both ask for the weight once a row.
    assert forward.asked() == forward.distinct() + 5 * 8192
    assert backward.asked() == backward.distinct() + 5 * 8192


# --- a second walk -------------------------------------------------------------------------------------------------


@triton.jit
def reads_twice_kernel(X_ptr, Y_ptr, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """One row a program, in blocks: their sum, then all of them again."""
    row = tl.program_id(0) * SPAN + tl.arange(0, BLOCK)
    total = 0.0
    for first in range(0, SPAN, BLOCK):
        total += tl.sum(tl.load(X_ptr + row + first), axis=0)
    for first in range(0, SPAN, BLOCK):
        tl.store(Y_ptr + row + first, tl.load(X_ptr + row + first) - total)


@triton.jit
def reads_once_kernel(X_ptr, Y_ptr, SPAN: tl.constexpr):
    """The same with the row in registers."""
    row = tl.program_id(0) * SPAN + tl.arange(0, SPAN)
    x = tl.load(X_ptr + row)
    tl.store(Y_ptr + row, x - tl.sum(x, axis=0))


def watched(kernel, *constants: int, rows: int = 8, span: int = 256) -> LaunchTraffic:
    counter = TrafficCounter()
    with watch(counter):
        kernel[(rows,)](torch.zeros(rows, span), torch.empty(rows, span), span, *constants)
    return counter.launches[0]


def found(launch: LaunchTraffic, l2_bytes: int, passes: int = 2, resident_programs: int = 4) -> list[str]:
    """What exceeds an allowance of so many passes over [8, 256] floats, S = 8192 bytes."""
    moved: dict = {}
    for argument, count in launch.moved(resident_programs, l2_bytes).items():
        moved[size_of(argument)] = moved.get(size_of(argument), 0) + count
    allowed = Allowance({"activation": passes * 8192.0}, launches=1)
    return [finding.what for finding in allowances.of_call("here", 256, [launch], moved, allowed)]


def test_a_kernel_that_reads_its_input_twice_is_caught() -> None:
    """Four programs at once read again 4 * 1024 bytes, which half of an L2 of 8192 just holds, and of 8190 does not."""
    launch = watched(reads_twice_kernel, 64)
    assert [(t.argument, t.read, t.again, t.again_footprint) for t in launch.tensors if t.read] == [
        ("X", 8192, 8192, 1024)
    ]
    assert found(launch, l2_bytes=8192) == []
    assert found(launch, l2_bytes=8190) == ["moves too many bytes (activation)"]
    assert found(watched(reads_once_kernel), l2_bytes=0) == []


def test_a_kernel_that_asks_too_often_is_caught() -> None:
    """Three walks and a store ask for 4 S where 2 S are distinct, which is just allowed; five ask for 6 S."""

    def asking(times: int) -> list[str]:
        once = watched(reads_once_kernel)
        x, y = once.tensors
        return found(dataclasses.replace(once, tensors=(dataclasses.replace(x, asked_read=times * 8192), y)), 2**30)

    assert asking(3) == []
    assert asking(5) == ["asks for too many bytes"]


def test_a_launch_too_many_is_caught() -> None:
    launch = watched(reads_once_kernel)
    allowed = Allowance({"activation": 1e9}, launches=1)
    (finding,) = allowances.of_call("layer_norm_256 forward", 256, [launch] * 2, {}, allowed)
    assert str(finding) == "layer_norm_256 forward: reads_once_kernel: too many launches: 2, allowed 1"


# --- allowances and slices -----------------------------------------------------------------------------------------


def test_the_least_of_a_call_by_hand() -> None:
    """bfloat16 [4, 1024] with residual and gelu: S = 8192; two parameters of 2048 bytes are read twice and their
    gradients written; mean and rstd of 4 * 4 bytes each are written and read."""
    workload = WORKLOADS["layer_norm_residual_gelu"]
    case = unfilled_case(workload, (4, 1024), torch.bfloat16, "meta")
    assert allowance(workload, case, "forward", LEAST) == Allowance(
        {"activation": 3 * 8192, "mask": 0, "parameter": 4096, "partial": 0, "statistics": 0}, launches=1
    )
    assert allowance(workload, case, "forward+backward", LEAST) == Allowance(
        {"activation": 8 * 8192, "mask": 0, "parameter": 3 * 4096, "partial": 0, "statistics": 4 * 16}, launches=3
    )
    shared = Schedule(forward_chunks=8, backward_chunks=8, partial_rows=32)
    assert allowance(workload, case, "forward+backward", shared) == Allowance(
        {
            "activation": 11 * 8192,  # 4 S and 7 S
            "mask": 0,
            "parameter": 4 * 4096,  # the backward reads them once more
            "partial": 2 * 2 * 32 * 1024 * 4,  # dweight's and dbias's, written and read
            "statistics": 6 * 16 + 2 * (8 * 2 * 4 * 2),  # read by one launch more; two sums a chunk, written and read
        },
        launches=5,
    )


def test_a_slice_is_a_multiprocessors_share_of_the_rows() -> None:
    part = slices.slice_of(WORKLOADS["layer_norm_1024"])
    assert part.shape == (65536 // 132 // 8, 1024)
    assert part.facts.l2_bytes == (50 << 20) // 132
    whole = slices.slice_of(WORKLOADS["gpt2_decode_add_layer_norm"])
    assert (whole.shape, whole.multiprocessors) == ((8, 1, 768), 1)


def test_a_slice_of_images_has_few_channels_and_groups_as_large_as_the_full_calls() -> None:
    for name, channels, groups in (
        ("sd_unet_320_group_norm", 40, 4),
        ("sd_unet_320_group_norm_channels_last", 40, 4),
        ("resnet50_256x56_batch_norm_residual", 8, 1),
        ("cyclegan_256_instance_norm", 8, 1),
        ("resnet50_1024x14_switch_norm_residual_channels_last", 1024, 1),  # of which a layer norm has all
    ):
        part = slices.slice_of(WORKLOADS[name])
        assert (part.shape[1], part.workload.groups, part.multiprocessors) == (channels, groups, 1)


def test_a_slice_grows_to_the_full_call() -> None:
    """[65536, 1024] in bfloat16: S = 128 MiB. Weight and bias do not grow; each of 528 programs asks for them, and
    writes two rows of partial sums, 4 KiB each."""
    counted = slices.count(WORKLOADS["layer_norm_1024"], torch.bfloat16, "forward+backward")
    S, weight, statistic = 128 * MIB, 2048, 4 * 65536
    assert counted.full_moved(0, 4) == pytest.approx(2 * S + 2 * weight + 2 * statistic)
    assert counted.full_moved(1, 4) == pytest.approx(3 * S + weight + 2 * statistic + 528 * 2 * 4096)
    partials = 3 * S + 2 * statistic + 528 * 2 * 4096
    assert counted.full_asked(1) == pytest.approx(partials + 528 * weight)
    # The L1 of each multiprocessor gets a weight once, if that fits it.
    assert counted.full_asked_of_l2(1, 132, weight) == pytest.approx(partials + 132 * weight)
    assert counted.full_asked_of_l2(1, 132, weight - 1) == counted.full_asked(1)
    assert counted.full_asked_of_l2(1, 1000, weight) == counted.full_asked(1)


@pytest.mark.parametrize(
    ("name", "direction"), [("layer_norm_4096", "forward+backward"), ("layer_norm_65536", "forward")]
)
def test_rows_that_are_shared_without_need_are_caught(
    name: str, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 4096 fit on chip, and those of 65536 are walked within the L2; shared they move more than they may."""
    from fused_ops.kernels.row_norm import backward, forward

    with monkeypatch.context() as patched:
        patched.setattr(forward, "row_forward_config", lambda *sizes: None)
        patched.setattr(backward, "row_backward_config", lambda *sizes: None)
        patched.setattr(forward, "walks_rows", lambda *sizes: False)
        forget_schedules()
        counted = slices.count(WORKLOADS[name], torch.bfloat16, direction)
    forget_schedules()
    found = {each.what for each in traffic_findings([1] * len(counted.launches), counted, torch.bfloat16, name)}
    assert {"too many launches", "moves too many bytes (activation)"} <= found


# A whole row, with a residual and a mask, a stream, a walked and a shared row: `make audit` has them all.
FEW = [
    "layer_norm_1024",
    "layer_norm_residual_relu",
    "llama3_8b_add_rms_norm",
    "add_rms_norm_32768",
    "layer_norm_65536",
]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("name", FEW)
def test_row_norms_move_what_they_are_allowed(name: str, direction: str) -> None:
    counted = slices.count(WORKLOADS[name], torch.bfloat16, direction)
    resident = [1] * len(counted.launches)  # matters where a row is walked, which takes all warps of a multiprocessor
    assert traffic_findings(resident, counted, torch.bfloat16, name) == []
