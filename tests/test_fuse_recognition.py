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


# --- what only a gradient, a buffer, or another number of dims shows ------------------------------------------------


class DetachedMoments(RootMeanSquare):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6).detach() * self.weight


class BiasedRunningVariance(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
            self.running_mean.lerp_(mean.detach(), 0.1)
            self.running_var.lerp_(var.detach(), 0.1)
        return TF.batch_norm(x, None if self.training else self.running_mean, self.running_var, self.weight,
                             self.bias, self.training, 0.0, self.eps)  # fmt: skip


class RemembersItsMean(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        self.last_mean = x.mean((0, 2, 3))
        return super().forward(x)


@pytest.mark.parametrize("make", [DetachedMoments, lambda: BiasedRunningVariance(3), lambda: RemembersItsMean(3)])
def test_a_norm_of_another_gradient_or_other_buffers_is_left(make: Any) -> None:
    model = nn.Sequential(make())
    before = type(model[0])
    fuse(model)
    assert type(model[0]) is before


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.relu(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


class WithSlopeOfItsOwn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return StraightThrough.apply(x)


class WithoutSlope(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x).detach()


@pytest.mark.parametrize("activation", [WithSlopeOfItsOwn, WithoutSlope])
def test_an_activation_of_another_slope_is_left(activation: type[nn.Module]) -> None:
    (entry,) = fusion_report(fuse(nn.Sequential(nn.LayerNorm(8), activation())))
    assert entry.pattern == "norm"


class OnePlusWeight(RootMeanSquare):
    """Gemma's, or T5's, by a flag that is nobody's business."""

    def __init__(self, plus: bool, as_buffer: bool) -> None:
        super().__init__()
        self._plus = plus
        if as_buffer:
            del self._plus
            self.register_buffer("_plus", torch.tensor(plus))

    def forward(self, x: Tensor) -> Tensor:
        weight = 1 + self.weight if self._plus else self.weight
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


@pytest.mark.parametrize("as_buffer", [False, True])
def test_norms_that_differ_by_a_private_flag_are_tried_each(as_buffer: bool) -> None:
    model = nn.Sequential(OnePlusWeight(False, as_buffer), OnePlusWeight(True, as_buffer))
    x = torch.randn(3, 8)
    expected = model(x)
    torch.testing.assert_close(fuse(model)(x), expected)
    assert [entry.name for entry in fusion_report(model)] == ["0"]


class OverChannelsOfImages(MeanAndVariance):
    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)
        return super().forward(x)


def test_a_norm_is_ours_for_as_many_dims_as_it_agreed_on() -> None:
    model = nn.Sequential(OverChannelsOfImages())
    inputs = [torch.randn(3, 8), torch.randn(2, 3, 8), torch.randn(2, 8, 3, 8), torch.randn(2, 2, 2, 3, 8)]
    expected = [model(x) for x in inputs]
    (entry,) = fusion_report(fuse(model))
    assert entry.fused
    torch.testing.assert_close([model(x) for x in inputs], expected)


class WithAMethodOfItsOwn(RootMeanSquare):
    """As Meta's Llama, whose method has the name that a mixin of ours might have."""

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x.float()).type_as(x) * self.weight


def test_methods_of_a_norm_are_its_own_where_its_forward_runs() -> None:
    model = nn.Sequential(WithAMethodOfItsOwn())
    x = torch.randn(2, 3, 8).bfloat16()
    expected = model(x)
    (entry,) = fusion_report(fuse(model))
    assert entry.fused
    torch.testing.assert_close(model(x), expected)


class ScaledStandardizedWeight(nn.Conv2d):
    """As of NFNets: what its constructor takes and hands on is what ours does, too."""

    def __init__(self, *sizes: int, eps: float = 1e-6, gamma: float = 1.0) -> None:
        super().__init__(*sizes)
        self.eps, self.gamma = eps, gamma

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        weight = self.gamma * (self.weight - mean) * torch.rsqrt(var + self.eps)
        return self._conv_forward(x, weight, self.bias)


@pytest.mark.parametrize("gamma", [1.0, 1.7])
def test_a_constructor_may_take_what_ours_does(gamma: float) -> None:
    model, x = nn.Sequential(ScaledStandardizedWeight(3, 4, 3, gamma=gamma)), torch.randn(2, 3, 8, 8)
    expected = model(x)
    (entry,) = fusion_report(fuse(model))
    assert entry.fused == (gamma == 1.0)
    torch.testing.assert_close(model(x), expected)
