"""Faults that a reading of the channel family found, each by what it did."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as TF

from fused_ops import functional as F
from tests.norm_cases import DEVICE, normal

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels")

pytestmark = [pytest.mark.one_in(8), pytest.mark.usefixtures("triton_backend", "memory_checked")]

Tensor = torch.Tensor


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("outlier", [1e4, 3e4])
def test_an_outlier_in_a_corner_costs_the_others_nothing(outlier: float, channels_last: bool) -> None:
    """As it did where everything was taken as a difference from the first element of a group."""
    x = normal(1, 32, 64, 64)
    x[0, 0, 0, 0] = outlier
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    y = F.group_norm(x, 1, activation="tanh")
    expected = torch.tanh(TF.group_norm(x.double(), 1))
    assert (y - expected).abs().max() <= 4 * torch.finfo(torch.float32).eps / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dx_is_that_of_the_dz_it_is_made_of(dtype: torch.dtype) -> None:
    """Groups of two values have next to no dx, whatever dz is: as long as its means are those of the same dz."""
    sign = normal(4, 8, 1, 1).sign()
    x = torch.cat([sign, -sign], 3).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    weight, residual, dy = normal(8, dtype=dtype), normal(4, 8, 1, 2, dtype=dtype, seed=1), normal(4, 8, 1, 2, seed=2)
    y = F.group_norm(x, 8, weight, residual=residual.requires_grad_(), activation="silu")
    (dx,) = torch.autograd.grad(y, x, dy.to(dtype))
    assert dx.abs().max() < 1e-3


def test_a_sample_has_the_same_bits_however_far_the_next_one_is() -> None:
    x, residual = normal(5, 12, 7, 7), normal(1, 12, 7, 7, seed=1)
    apart = normal(5, 2, 12, 7, 7, seed=2)[:, 0]
    pairs = [
        (F.group_norm(x, 3, residual=residual.expand_as(x))[:1], F.group_norm(x[:1], 3, residual=residual)),
        (F.group_norm(apart, 3)[:1], F.group_norm(apart[:1], 3)),
        (F.group_norm(residual.expand_as(x), 3)[:1], F.group_norm(residual, 3)),
    ]
    for of_batch, alone in pairs:
        assert torch.equal(of_batch, alone)


def test_a_slice_of_a_channels_last_tensor_stays_channels_last() -> None:
    x = torch.randn(2, 16, 6, 6, device=DEVICE).to(memory_format=torch.channels_last)
    assert F.group_norm(x[:, :8], 2).stride() == (288, 1, 48, 8)
    assert F.group_norm(x[:, :, 1:5, 1:5], 2).stride() == (256, 1, 64, 16)


def test_a_view_that_torch_negates_as_it_reads() -> None:
    x, weight, dy = torch._neg_view(normal(2, 4, 5, 6)), torch._neg_view(normal(4)), normal(2, 4, 5, 6, seed=1)
    row, of_row = torch._neg_view(normal(3, 8)), torch._neg_view(normal(8))
    pairs = [
        (F.group_norm(x, 2, weight), TF.group_norm(x.clone(), 2, weight.clone())),
        (F.layer_norm(row, (8,), of_row), TF.layer_norm(row.clone(), (8,), of_row.clone())),
    ]
    leaf = normal(2, 4, 5, 6).requires_grad_()
    ours, torchs = (
        torch.autograd.grad(norm(leaf, 2), leaf, torch._neg_view(dy))[0] for norm in (F.group_norm, TF.group_norm)
    )
    pairs.append((ours, torchs))
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("function", "shape"), [("group_norm", (3, 33, 5, 7)), ("batch_norm", (3, 3, 17, 17)), ("switch_norm", (3, 3, 5))]
)
def test_dresidual_that_is_read_again_lies_without_gaps(function: str, shape: tuple[int, ...]) -> None:
    """As what was given need not: accesses as wide as gaps allow skipped a part of a sample."""
    samples, channels, *positions = shape
    size = channels * math.prod(positions)
    shares = torch.ones(3, dtype=torch.float64)
    own = {
        "group_norm": {"num_groups": 3},
        "batch_norm": {"running_mean": None, "running_var": None, "training": True},
        "switch_norm": {"running_mean": None, "running_var": None, "weight": None, "bias": None, "training": True}
        | {"mean_weight": shares, "var_weight": shares},
    }[function]

    def with_gaps(seed: int) -> Tensor:
        stride = -(-size // 4) * 4 + 4
        storage = torch.zeros(samples * stride, dtype=torch.float64, device=DEVICE)
        view = storage.as_strided(shape, (stride, *torch.empty(shape[1:]).stride()))
        return view.copy_(normal(*shape, dtype=torch.float64, seed=seed))

    x, residual, dy = map(with_gaps, range(3))
    found = []
    for given in ((x, residual, dy), (x.contiguous(), residual.contiguous(), dy.contiguous())):
        leaves = [tensor.detach().requires_grad_() for tensor in given[:2]]
        y = getattr(F, function)(leaves[0], residual=leaves[1], activation="relu", **own)
        found.append((y, *torch.autograd.grad(y, leaves, given[2])))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_the_gradient_of_a_float32_residual_is_float32_where_statistics_are_frozen() -> None:
    x, residual = normal(2, 4, 3, dtype=torch.float16), normal(2, 4, 3, seed=1).requires_grad_()
    mean, var = torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE)
    y, total = F.add_batch_norm(x, residual, mean, var, training=False)
    arrived = (torch.zeros_like(y), torch.full_like(total, 1e5))
    (dresidual,) = torch.autograd.grad((y, total), residual, arrived)
    assert torch.equal(dresidual, arrived[1])
