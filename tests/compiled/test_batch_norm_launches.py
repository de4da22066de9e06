"""What batch norm and switchable norm launch on an sm_90 that is not there: how often, how many compilations."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from benchmarks.audit import sweep
from benchmarks.audit.binary import describe
from benchmarks.audit.sweep_calls import BatchCall, Kind, SwitchCall
from benchmarks.audit.targets import TARGETS
from fused_ops import functional as F
from tests.compiled.test_channel_norm_launches import PIECES, compilations

WHOLE = ["batch_norm_forward_kernel", "batch_norm_backward_kernel"]
GIVEN = ["channel_apply_kernel", "channel_gradient_sums_kernel", "combine_gradients_kernel"]
MIXED = [kernel.replace("combine", "combine_switch") for kernel in PIECES]


def zeros(shape: tuple[int, ...], channels_last: bool = False) -> torch.Tensor:
    samples, channels, *positions = shape
    if not channels_last:
        return torch.zeros(shape, dtype=torch.bfloat16)
    return torch.zeros(samples, *positions, channels, dtype=torch.bfloat16).movedim(-1, 1)


def forward_and_backward(
    function: str, shape: tuple[int, ...], channels_last: bool = False, training: bool = True, **keywords: Any
) -> None:
    """Runs the function and its backward on tensors of zeros, everything learning."""
    x, residual = (zeros(shape, channels_last).requires_grad_() for _ in range(2))
    mean, var, weight, bias = (torch.zeros(shape[1]) for _ in range(4))
    leaves = [x, residual, weight.requires_grad_(), bias.requires_grad_()]
    if "switch" in function:
        shares = {f"{kind}_weight": torch.zeros(3, requires_grad=True) for kind in ("mean", "var")}
        keywords |= shares
        leaves += shares.values()
    keywords = {"residual": residual, "weight": weight, "bias": bias, "training": training, **keywords}
    y = getattr(F, function)(x, running_mean=mean, running_var=var, **keywords)
    torch.autograd.grad(y, leaves, torch.zeros_like(y))


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("function", "shape", "channels_last", "training", "expected"),
    [
        ("batch_norm", (16, 64, 7, 7), False, True, WHOLE),
        ("batch_norm", (8, 64, 7, 7), True, True, WHOLE),
        ("batch_norm", (8, 64), False, True, WHOLE),
        ("batch_norm", (64, 64, 14, 14), False, True, PIECES),
        ("batch_norm", (4, 32, 32, 32), False, True, PIECES),
        ("batch_norm", (4, 32, 32, 32), True, True, PIECES),
        ("batch_norm", (16, 64, 7, 7), False, False, GIVEN),
        ("batch_norm", (4, 32, 32, 32), True, False, GIVEN),
        ("switch_norm", (4, 32, 32, 32), False, True, MIXED),
        ("switch_norm", (4, 32, 8, 8), True, False, MIXED),
    ],
)
def test_channels_that_fit_take_one_launch_each_way(function, shape, channels_last, training, expected, sm_90):
    forward_and_backward(function, shape, channels_last, training, activation="relu")
    assert [launch.kernel for launch in sm_90] == expected
    assert not any(describe(launch, TARGETS["sm_90"]).spilled_bytes for launch in sm_90)


@pytest.mark.parametrize(
    "call",
    [
        BatchCall(Kind(torch.bfloat16, "tanh", "after"), "float32", (32, 64, 7, 7), False, True),
        BatchCall(Kind(torch.bfloat16, "softplus", "none"), "float32", (31, 64, 7, 7), False, True),
        BatchCall(Kind(torch.float32, "gelu_tanh", "none"), "float32", (31, 64, 7, 7), False, True),
        SwitchCall(Kind(torch.bfloat16, "gelu", "before", True), "float32", (4, 64, 7, 7), False, True),
    ],
    ids=str,
)
def test_what_takes_most_registers_spills_nothing(call):
    assert sweep.spills([call], "sm_90") == []


@pytest.mark.parametrize("function", ["batch_norm", "switch_norm"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_pieces_compile_once_for_every_batch(function, channels_last, sm_90):
    for samples in (12, 13, 16, 65):
        forward_and_backward(function, (samples, 32, 20, 20), channels_last, activation="silu")
    assert set(compilations(sm_90).values()) == {1}


def test_whole_channels_compile_once_for_each_power_of_two_of_rows_and_once_for_those_between(sm_90):
    for samples in (5, 6, 7, 8, 9, 11, 16):
        forward_and_backward("batch_norm", (samples, 64, 7, 7), activation="silu")
    assert compilations(sm_90) == Counter(dict.fromkeys(WHOLE, 4))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("function", ["layer_norm", "group_norm", "batch_norm"])
def test_a_bias_may_learn_alone(function, training, sm_90):
    """None in a tuple that a jit function returns does not compile, though it is interpreted."""
    x, bias = torch.zeros(4, 64, 16, 16), torch.zeros(16 if function == "layer_norm" else 64, requires_grad=True)
    own = {
        "layer_norm": ((16,), None),
        "group_norm": (8, None),
        "batch_norm": (torch.zeros(64), torch.ones(64), None),
    }[function]
    keywords = {"training": training} if function == "batch_norm" else {}
    y = getattr(F, function)(x, *own, bias, **keywords)
    torch.autograd.grad(y, bias, torch.zeros_like(y))
    assert sm_90
