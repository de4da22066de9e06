"""How many instructions kernels issue on an sm_90 that is not there: where that is what bounds them, and not memory."""

from __future__ import annotations

import pytest
import torch
import triton

from benchmarks.audit.binary import CompiledLaunch, describe
from benchmarks.audit.inert import Launch
from benchmarks.audit.targets import DEVICE_OF, TARGETS
from fused_ops import functional as F
from fused_ops.kernels.activations import ACTIVATIONS

ELEMENTS_A_THREAD = 32  # of a row of 1024 in one warp
# Counted with Triton 3.7. To 3.6 a maximum is no instruction of its own.
SLACK = 4 if triton.__version__ < "3.7" else 0.5
MOST_OF_ACTIVATION = {
    "relu": 2, "relu6": 4, "leaky_relu": 3, "elu": 16, "selu": 16, "gelu": 20, "gelu_tanh": 16, "silu": 11,
    "sigmoid": 10, "tanh": 28, "mish": 17, "hardswish": 6, "hardsigmoid": 7, "softplus": 26,
}  # fmt: skip


def described(launches: list[Launch], kernel: str) -> CompiledLaunch:
    """The only launch of a kernel."""
    (launch,) = (launch for launch in launches if launch.kernel == kernel)
    return describe(launch, TARGETS["sm_90"])


def issued(launches: list[Launch], kernel: str) -> int:
    """Instructions of all warps, each loop taken once."""
    launch = described(launches, kernel)
    return launch.programs * launch.warps * (launch.code.instructions + launch.code.loop_instructions)


def backward_of_rows(span: int, dtype: torch.dtype, launches: list[Launch]) -> int:
    """Instructions of a trip of the loop over tiles, in which a thread has eight elements."""
    launches.clear()
    x, weight, bias = (torch.zeros(*rows, span, dtype=dtype, requires_grad=True) for rows in ((4096,), (), ()))
    F.layer_norm(x, (span,), weight, bias).backward(torch.zeros_like(x))
    return described(launches, "row_norm_backward_kernel").code.loop_instructions


@pytest.mark.parametrize("span", [64, 128, 256, 512])
def test_rows_that_a_warp_holds_are_summed_in_it(span, sm_90):
    """Spread over four warps, several rows at a time, they took up to 2.4 times as many."""
    assert backward_of_rows(span, torch.bfloat16, sm_90) <= 1.1 * backward_of_rows(1024, torch.bfloat16, sm_90)


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name is not None])
def test_an_activation_takes_few_instructions_an_element(name, sm_90):
    """exp and a division as Triton has them take 5 and 8, erf 28."""
    F.layer_norm(torch.empty(64, 1024, dtype=torch.bfloat16), (1024,))
    F.layer_norm(torch.empty(64, 1024, dtype=torch.bfloat16), (1024,), activation=name)
    without, with_it = (describe(launch, TARGETS["sm_90"]).code.instructions for launch in sm_90)
    assert (with_it - without) / ELEMENTS_A_THREAD <= MOST_OF_ACTIVATION[name] + SLACK


@pytest.mark.parametrize("channels", [256, 320, 1280])
def test_merging_few_partial_results_takes_next_to_nothing(channels, sm_90):
    """A program for each group, with room for a thousand, took a quarter as many as the pass over x."""
    x = torch.zeros(16, channels, 56, 56, dtype=torch.bfloat16, requires_grad=True)
    F.group_norm(x, 32, activation="relu").backward(torch.zeros_like(x))

    assert issued(sm_90, "combine_moments_kernel") < 0.05 * issued(sm_90, "channel_apply_kernel")
    assert issued(sm_90, "combine_gradients_kernel") < 0.05 * issued(sm_90, "channel_gradient_apply_kernel")


def test_merging_the_planes_of_a_switchable_norm_takes_little(sm_90):
    """Of two pieces a plane, with room for sixteen, it took four times as many instructions as the pass over x."""
    x = torch.zeros(32, 1024, 14, 14, dtype=torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_()
    weights = [torch.zeros(3, requires_grad=True) for _ in range(2)]
    F.switch_norm(x, None, None, None, None, *weights, training=True).backward(torch.empty_like(x))
    assert issued(sm_90, "combine_switch_moments_kernel") < 2 * issued(sm_90, "channel_moments_kernel")
    assert issued(sm_90, "combine_switch_gradients_kernel") < issued(sm_90, "channel_gradient_sums_kernel")


def test_a_residual_add_without_a_scale_divides_nothing_of_64_bits(sm_90):
    """Its backward is half as long without."""
    x, residual = (torch.zeros(64, 1024, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    F.residual_add(x, residual, activation="relu").backward(torch.zeros_like(x))
    assert described(sm_90, "residual_add_backward_kernel").code.instructions <= 180


@pytest.mark.parametrize("span", [768, 1024])
def test_column_sums_have_enough_in_flight(span, sm_90):
    """Rows of partial sums are hundreds, and a program waits for each tile of them."""
    x, weight = (torch.zeros(*rows, span, dtype=torch.bfloat16, requires_grad=True) for rows in ((8192,), ()))
    F.rms_norm(x, (span,), weight).backward(torch.zeros_like(x))
    launch = described(sm_90, "column_sum_kernel")
    multiprocessors = DEVICE_OF["sm_90"].facts.multiprocessors
    assert min(launch.programs, multiprocessors) * launch.bytes_in_flight(multiprocessors) >= 2**19


def test_many_partial_results_of_few_channels_are_merged_by_many_programs(sm_90):
    """Eight channels a program took three times as long, by the estimate."""
    x = torch.empty(64, 64, 56, 56, dtype=torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_()
    F.batch_norm(x, None, None, training=True).backward(torch.empty_like(x))
    for kernel in ("combine_moments_kernel", "combine_gradients_kernel"):
        assert described(sm_90, kernel).programs >= 32


def of_planes(norm: str, side: int, dtype: torch.dtype, launches: list[Launch]) -> tuple[list[CompiledLaunch], float]:
    """The launches on planes of side x side, and the instructions of all warps for each element of their tiles."""
    launches.clear()
    x = torch.zeros(16, 512, side, side, dtype=dtype, requires_grad=True)
    groups = 512 if norm == "instance_norm" else 16
    F.group_norm(x, groups, activation="relu").backward(torch.zeros_like(x))
    of_x = [describe(launch, TARGETS["sm_90"]) for launch in launches if launch.kernel.startswith("channel_norm_")]
    issued = sum(launch.programs * launch.warps * launch.code.instructions for launch in of_x)
    return of_x, issued / (16 * 512 * triton.next_power_of_2(side * side) / 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("side", [7, 13, 14])
@pytest.mark.parametrize("norm", ["group_norm", "instance_norm"])
def test_a_thread_has_elements_of_few_short_planes(norm, side, dtype, sm_90):
    """Laid out so that threads fill a plane first, they had one element each of up to 32 planes, and a sum, statistics
    and an address for each: 13 x 13 took three times as many instructions and 255 registers."""
    launches, issued = of_planes(norm, side, dtype, sm_90)
    _, of_aligned = of_planes(norm, 16, dtype, sm_90)
    assert issued <= 1.7 * of_aligned
    assert max(launch.registers for launch in launches) <= 128


def test_runs_of_a_half_warp_keep_the_width_of_accesses(sm_90):
    """14 x 14 elements of 16 bits are a multiple of 8 bytes."""
    for launch in of_planes("group_norm", 14, torch.bfloat16, sm_90)[0]:
        assert 8 in launch.widths and not {2} & {*launch.widths}
