"""What group and instance norm launch on an sm_90 that is not there: how often, how wide, how many compilations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
import torch

from benchmarks.audit.binary import describe
from benchmarks.audit.inert import Launch
from benchmarks.audit.targets import TARGETS
from fused_ops import functional as F

RESIDENT = ["channel_norm_forward_kernel", "channel_norm_backward_kernel", "column_sum_kernel"]
PIECES = [
    "channel_moments_kernel",
    "combine_moments_kernel",
    "channel_apply_kernel",
    "channel_gradient_sums_kernel",
    "combine_gradients_kernel",
    "channel_gradient_apply_kernel",
]


def forward_and_backward(
    shape: tuple[int, ...],
    groups: int,
    dtype: torch.dtype = torch.bfloat16,
    channels_last: bool = False,
    activation: str | None = "silu",
) -> None:
    """Runs group_norm and its backward on tensors of zeros."""
    samples, channels, *positions = shape
    x = torch.zeros(shape, dtype=dtype)
    if channels_last:
        x = torch.zeros(samples, *positions, channels, dtype=dtype).movedim(-1, 1)
    weight, bias = (torch.zeros(channels, dtype=dtype, requires_grad=True) for _ in range(2))
    y = F.group_norm(x.requires_grad_(), groups, weight, bias, activation=activation)
    torch.autograd.backward(y, torch.zeros_like(x))


def compilations(launches: Iterable[Launch]) -> Counter[str]:
    """How many different binaries there are of each kernel."""
    return Counter(kernel for kernel, _ in {(launch.kernel, launch.compiled.hash) for launch in launches})


@pytest.mark.parametrize(
    ("shape", "groups", "channels_last", "expected"),
    [
        ((2, 64, 8, 8), 8, False, RESIDENT),
        ((2, 64, 7, 7), 64, False, RESIDENT),
        ((2, 32, 64, 64), 4, False, PIECES),
        ((2, 64, 16, 16), 8, True, PIECES),
        ((2, 16, 8, 64, 64), 16, False, PIECES),
    ],
)
def test_groups_that_fit_take_one_launch_and_two_and_others_three_each_way(
    shape, groups, channels_last, expected, sm_90
):
    forward_and_backward(shape, groups, channels_last=channels_last)
    assert [launch.kernel for launch in sm_90] == expected


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("positions", [(7, 7), (8, 8), (64, 64)], ids=str)
def test_nothing_compiles_anew_for_another_batch(positions, channels_last, sm_90):
    for samples in (1, 2, 3, 16, 65):
        forward_and_backward((samples, 32, *positions), 8, channels_last=channels_last)
    assert set(compilations(sm_90).values()) == {1}


@pytest.mark.parametrize(("channels_last", "kinds"), [(False, 3), (True, 3)])
def test_long_planes_compile_once_for_each_power_of_two(channels_last, kinds, sm_90):
    """1024, up to 2048 and up to 4096; all multiples of 16 bytes."""
    for height in (32, 40, 48, 56, 64, 88, 96, 120, 128):
        forward_and_backward((2, 32, height, 32), 4, channels_last=channels_last)
    assert max(compilations(sm_90).values()) <= kinds


@pytest.mark.parametrize(("plane", "widest"), [(7, 2), (14, 8)])
@pytest.mark.parametrize("groups", [8, 64])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_planes_between_16_byte_boundaries_are_moved_as_wide_as_they_begin(plane, widest, groups, activation, sm_90):
    forward_and_backward((4, 64, plane, plane), groups, activation=activation)
    for launch in sm_90[:2]:
        described = describe(launch, TARGETS["sm_90"])
        assert described.spilled_bytes == 0
        assert described.share_at(widest) >= 0.6, f"{launch.kernel}: {described.widths}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_channels_last_is_read_16_bytes_at_a_time_and_ahead(dtype, sm_90):
    forward_and_backward((4, 320, 64, 64), 32, dtype, channels_last=True)
    for launch in sm_90:
        if launch.kernel.startswith("channel_"):
            described = describe(launch, TARGETS["sm_90"])
            assert described.spilled_bytes == 0 and described.copies > 0
            assert described.wide_share > 0.7, f"{launch.kernel}: {described.widths}"
