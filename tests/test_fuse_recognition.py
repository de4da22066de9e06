"""What a class of somebody else is taken for goes by what it computes, down to a number that stands in its forward."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor, nn

import fused_ops
from fused_ops import fuse, fusion_report
from tests.norm_cases import DEVICE, normal


class RootMeanSquare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class AlmostRMSNorm(RootMeanSquare):
    def forward(self, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-6) * self.weight


class MeanAndVariance(RootMeanSquare):
    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        return (x - mean) / torch.sqrt(var + 1e-12) * self.weight


class StandardizedWeight(nn.Conv2d):
    """As BiT's authors write it."""

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        return TF.conv2d(x, (self.weight - mean) / torch.sqrt(var + 1e-10), self.bias, self.stride, self.padding)


class PaddedBefore(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(TF.pad(x, (1, 0, 1, 0)))


def convolution(cls: type[nn.Conv2d]) -> nn.Module:
    return cls(3, 4, 3)


@pytest.mark.parametrize(
    ("make", "patterns"),
    [
        (RootMeanSquare, ["norm"]),
        (AlmostRMSNorm, [None]),
        (MeanAndVariance, ["norm"]),
        (lambda: convolution(StandardizedWeight), ["weight_standardize"]),
        (lambda: convolution(PaddedBefore), []),
    ],
    ids=["rms", "almost rms", "layer", "standardized", "padded"],
)
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_what_a_class_computes_is_seen(make: Any, patterns: list[str | None], scale: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make().double())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= scale
    x = scale * torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = copy.deepcopy(model)(x)
    report = fusion_report(fuse(model))
    assert [entry.pattern if entry.fused else None for entry in report] == patterns
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=0)


class Causal(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(TF.pad(x, (2, 0)))


class Asserting(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[0] == 7
        return super().forward(x)


def weight_normed() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.utils.weight_norm(Causal(3, 4, 3))
    layer(torch.ones(1, 3, 5))  # its weight is then no leaf, and cannot be copied
    return layer


def of_integers() -> nn.Module:
    layer = PaddedBefore(3, 4, 3)
    layer.weight = nn.Parameter(torch.ones(4, 3, 3, 3, dtype=torch.int8), requires_grad=False)
    return layer


def without_weight() -> nn.Module:
    layer = PaddedBefore(3, 4, 3)
    del layer.weight
    return layer


@pytest.mark.parametrize("make", [weight_normed, of_integers, without_weight, lambda: convolution(Asserting)])
def test_a_convolution_that_cannot_be_tried_is_left(make: Any) -> None:
    model = nn.Sequential(make())
    assert fuse(model) is model and fusion_report(model) == []


# --- what is checked on an example ---------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [2, 3])
def test_what_disagrees_together_alone_is_undone_too(together: int) -> None:
    """Each of the norms agrees by itself; so many of them do not."""

    class Counts(nn.Sequential):
        """Adds 1 where too many of its norms are ours."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            ours = sum(isinstance(norm, fused_ops.LayerNorm) for norm in self)
            return super().forward(x) + float(ours >= together)

    model, x = Counts(*(nn.LayerNorm(8) for _ in range(6))).to(DEVICE), normal(3, 8)
    expected = copy.deepcopy(model)(x)
    fuse(model, (x,))
    assert sum(entry.fused for entry in fusion_report(model)) == together - 1
    assert all("outputs differ" in entry.reason for entry in fusion_report(model) if not entry.fused)
    torch.testing.assert_close(model(x), expected)


def test_a_model_that_never_does_the_same_has_nothing_to_undo() -> None:
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Counting.calls += 1
            return super().forward(x) + Counting.calls

    assert not fusion_report(fuse(Counting(8, 8).to(DEVICE), (normal(3, 8),)))
