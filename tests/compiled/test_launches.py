"""What the public calls launch on an sm_90 that is not there: how often, how wide, how many compilations, no spill."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from benchmarks.audit.binary import describe
from benchmarks.audit.inert import compiling_for
from benchmarks.audit.layouts import reduction_layouts
from benchmarks.audit.targets import DEVICE_OF, TARGETS
from fused_ops import functional as F
from fused_ops.kernels.launch import assume_device

MULTIPROCESSORS = 132  # of the device whose facts CPU tensors get


def forward_and_backward(rows: int, span: int, dtype: torch.dtype, call: Callable, offset: int = 0) -> None:
    """Runs `call(x, residual, weight, bias)` and its backward on tensors `offset` elements into their storage."""
    x, residual = (torch.zeros(rows * span + offset, dtype=dtype)[offset:].view(rows, span) for _ in range(2))
    weight, bias = (torch.zeros(span, dtype=dtype) for _ in range(2))
    outputs = call(*(tensor.requires_grad_() for tensor in (x, residual, weight, bias)))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [torch.zeros(rows, span, dtype=dtype) for _ in outputs])


def plain(x, residual, weight, bias):
    return F.layer_norm(x, weight.shape, weight, bias)


def after(x, residual, weight, bias):
    return F.layer_norm(x, weight.shape, weight, bias, residual=residual, activation="gelu")


def after_relu(x, residual, weight, bias):
    return F.layer_norm(x, weight.shape, weight, bias, residual=residual, activation="relu")


def added(x, residual, weight, bias):
    return F.add_rms_norm(x, residual, weight.shape, weight, activation="silu")


CALLS = {call.__name__: call for call in (plain, after, after_relu, added)}


@pytest.mark.parametrize("name", CALLS)
def test_whole_rows_take_one_launch_forward_and_two_backward(name, sm_90):
    forward_and_backward(512, 1024, torch.bfloat16, CALLS[name])
    assert [launch.kernel for launch in sm_90] == [
        "row_norm_forward_kernel",
        "row_norm_backward_kernel",
        "column_sum_kernel",
    ]


def test_no_sum_is_launched_where_no_parameter_gradient_is_asked_for(sm_90):
    x = torch.zeros(512, 1024, requires_grad=True)
    F.layer_norm(x, (1024,), torch.ones(1024), activation="gelu").sum().backward()
    assert [launch.kernel for launch in sm_90] == ["row_norm_forward_kernel", "row_norm_backward_kernel"]


def test_long_rows_are_shared_where_they_are_few_and_walked_where_they_are_many(sm_90):
    for rows in (4, MULTIPROCESSORS):
        F.layer_norm(torch.empty(rows, 40000, dtype=torch.bfloat16), (40000,))
    names = [launch.kernel for launch in sm_90]
    assert names == ["row_moments_kernel", "row_apply_kernel", "row_walk_forward_kernel"]


@pytest.mark.parametrize("span", [30000, 40000])
def test_what_chunks_are_merged_of_is_rounded_before_threads_exchange_it(span, sm_90):
    """A product that is contracted with a neighbour's sum has other bits where that neighbour is in another thread, and
    so where few rows are shared than where many are walked."""
    F.layer_norm(torch.empty(4, span), (span,))
    (apply,) = (launch for launch in sm_90 if launch.kernel == "row_apply_kernel")
    exchanged, contracted = set(), []
    for line in apply.compiled.asm["ptx"].splitlines():
        if found := re.search(r"shfl\.sync\.\S+\s+(%\w+)", line):
            exchanged.add(found[1])
        elif "fma.rn.f32" in line and exchanged & {*re.findall(r"%\w+", line)[1:]}:
            contracted.append(line)
    assert exchanged and not contracted


@pytest.mark.parametrize(("rows", "span"), [(16384, 256), (4096, 1024), (1024, 4096), (512, 8192), (4, 1 << 20)])
@pytest.mark.parametrize("name", ["plain", "after"])
def test_four_million_elements_fill_the_device(name, rows, span, sm_90):
    forward_and_backward(rows, span, torch.bfloat16, CALLS[name])
    for launch in sm_90:
        if launch.kernel != "column_sum_kernel":
            assert launch.programs >= MULTIPROCESSORS, f"{launch.kernel}: {launch.programs} programs"


@pytest.mark.one_in(4)
@pytest.mark.parametrize("span", [256, 1024, 4096, 8192, 16384, 65536])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", CALLS)
def test_nothing_spills_and_activations_move_sixteen_bytes_at_a_time(name, dtype, span, sm_90):
    forward_and_backward(8, span, dtype, CALLS[name])
    for found in (describe(launch, TARGETS["sm_90"]) for launch in sm_90):
        assert found.spilled_bytes == 0, f"{found.kernel} spills"
        if found.kernel != "column_sum_kernel":
            assert max(found.widths) == 16, f"{found.kernel}: {found.widths}"


def test_row_counts_and_parameters_compile_nothing_anew(sm_90):
    for rows in (1, 2, 16, 17, 48, 4096):
        for slope in (0.01, 0.2, 1.0):
            activation = torch.nn.LeakyReLU(slope)
            x = torch.zeros(rows, 1024, requires_grad=True)
            weight = torch.ones(1024, requires_grad=True)
            F.layer_norm(x, (1024,), weight, eps=1e-5 * slope, activation=activation).sum().backward()
    compiled = {launch.kernel: set() for launch in sm_90}
    for launch in sm_90:
        compiled[launch.kernel].add(launch.compiled.hash)
    assert {name: len(hashes) for name, hashes in compiled.items()} == dict.fromkeys(compiled, 1)


def test_what_is_remembered_depends_on_alignment_and_type(sm_90):
    """Aligned, unaligned, aligned again, another type: each gets a kernel of its own, and the first comes back."""
    for dtype, offset in ((torch.float32, 0), (torch.float32, 1), (torch.float32, 0), (torch.bfloat16, 0)):
        forward_and_backward(8, 1024, dtype, plain, offset)
    aligned, unaligned, again, half = (
        launch.compiled for launch in sm_90 if launch.kernel == "row_norm_forward_kernel"
    )
    assert aligned is again
    assert len({aligned.hash, unaligned.hash, half.hash}) == 3


# An A100's 163 KB, and what the smaller devices of its generation and the next have.
@pytest.mark.parametrize("shared_kib", [163, 99])
@pytest.mark.parametrize("span", [4096, 5120, 6144, 8192, 20480])
@pytest.mark.parametrize(("dtype", "residual_dtype"), [("float32", "float32"), ("bfloat16", "float32")])
def test_tiles_that_are_loaded_ahead_fit_the_shared_memory(dtype, residual_dtype, span, shared_kib):
    """Spans between powers of two have the tile of the next, and a total has the residual's type."""
    target = TARGETS["sm_80"]
    facts = DEVICE_OF[target.name].facts._replace(shared_bytes=shared_kib << 10)
    x, residual = (torch.empty(256, span, dtype=getattr(torch, each)) for each in (dtype, residual_dtype))
    weight = torch.empty(span, dtype=x.dtype)
    with compiling_for(target) as launches, assume_device(facts):
        for requires_grad in (False, True):
            for tensor in (x, residual, weight):
                tensor.requires_grad_(requires_grad)
            outputs = F.add_rms_norm(x, residual, (span,), weight, activation="silu")
        torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
    assert {launch.compiled.metadata.shared <= facts.shared_bytes for launch in launches} == {True}


@pytest.mark.parametrize("span", [20000, 20001, 40000, 40001, 40004])
@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_walked_and_shared_rows_are_reduced_in_one_layout(dtype, parameters, span, sm_90):
    weight = None if parameters is None else torch.empty(span, dtype=parameters)
    layouts = []
    for rows in (4, MULTIPROCESSORS):
        sm_90.clear()
        F.layer_norm(torch.empty(rows, span, dtype=dtype), (span,), weight, activation="gelu")
        layouts.append(reduction_layouts(sm_90))
    assert layouts[0] == layouts[1], f"shared, and {sm_90[0].kernel}"
