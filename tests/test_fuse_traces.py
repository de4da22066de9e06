"""Forwards that no graph stands for: fused or not, the model computes what it did, and holds what it held."""

from __future__ import annotations

import builtins
import collections
import copy
import threading
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import fused_ops
from fused_ops import fuse, fusion_report
from fused_ops.fusion.check import Results, difference
from tests.norm_cases import DEVICE, normal

Tensor = torch.Tensor

pytestmark = [pytest.mark.one_in(8), pytest.mark.usefixtures("each_backend")]


class Forward(nn.Module):
    """A norm and an activation, and what somebody does beside them."""

    def __init__(self, then: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.then = then
        self.seen: list[Any] = []
        self.cache: dict[str, Any] = {}
        self.queue: collections.deque[Any] = collections.deque()

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self, x, torch.relu(self.norm(x)))


def appended(module: Any, x: Tensor, y: Tensor) -> Tensor:
    module.seen.append(y)
    return y * len(module.seen)


def told_to_a_child(module: Any, x: Tensor, y: Tensor) -> Tensor:
    module.norm.last = x
    return y


def queued(module: Any, x: Tensor, y: Tensor) -> Tensor:
    module.queue.append(y)
    return y * len(module.queue)


def cached(module: Any, x: Tensor, y: Tensor) -> Tensor:
    if "scale" not in module.cache:
        module.cache["scale"] = x.detach().abs().mean()
    return y * module.cache["scale"]


def caught(module: Any, x: Tensor, y: Tensor) -> Tensor:
    try:
        return y * float(x.detach().max())
    except Exception:
        return y


def with_data_set(module: Any, x: Tensor, y: Tensor) -> Tensor:
    y = y * 1
    y.data = y.data * 2
    return y


def by_derivative(module: Any, x: Tensor, y: Tensor) -> Tensor:
    x = x.detach()
    x.requires_grad = True
    with torch.enable_grad():
        energy = module.norm(x).square().sum()
    return y + torch.autograd.grad(energy, x)[0]


an_instance = builtins.isinstance


def autocasts() -> bool:
    return not torch.is_autocast_enabled("cpu")


WAYS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "appends": appended,
    "caches": cached,
    "catches": caught,
    "tells a child": told_to_a_child,
    "queues": queued,
    "sets data": with_data_set,
    "sets requires_grad": by_derivative,
    "is_tensor": lambda module, x, y: 2 * y if torch.is_tensor(x) else y,
    "hasattr": lambda module, x, y: 2 * y if hasattr(x, "tensors") else y,
    "getattr": lambda module, x, y: 2 * y if getattr(x, "flag", None) is None else y,
    "hash": lambda module, x, y: 2 * y if x.dtype in {torch.float32} else y,
    "text": lambda module, x, y: 2 * y if str(x.dtype) == "torch.float32" else y,
    "format": lambda module, x, y: 2 * y if f"{x.device.type}" == DEVICE else y,
    "grad_fn": lambda module, x, y: 2 * y if x.grad_fn is None else y,
    "isinstance": lambda module, x, y: 2 * y if isinstance(x, Tensor) and torch.is_tensor(y.detach()) else y,
    "isinstance by another name": lambda module, x, y: 2 * y if an_instance(x, Tensor) else y,
    "isinstance in C": lambda module, x, y: 2 * y if all(map(isinstance, (x,), (Tensor,))) else y,
    "autocast in a helper": lambda module, x, y: 2 * y if autocasts() else y,
    "callable": lambda module, x, y: 2 * y if callable(y) else y,
    "hasattr of a result": lambda module, x, y: y.logits if hasattr(y, "logits") else y,
    "class": lambda module, x, y: 2 * y if x.__class__ is Tensor else y,
    "length": lambda module, x, y: y * len(x),
}


@pytest.mark.parametrize("name", WAYS)
def test_what_a_graph_cannot_stand_for_is_left(name: str) -> None:
    torch.manual_seed(0)
    model, x = Forward(WAYS[name]).to(DEVICE), normal(3, 8)
    fused = fuse(copy.deepcopy(model))
    assert not fused.seen and not fused.cache and not fused.queue and not hasattr(fused.norm, "last")
    for _ in range(2):
        torch.testing.assert_close(fused(x), model(x))
    assert len(fused.seen) == len(model.seen) and all(isinstance(each, Tensor) for each in fused.seen)


class OfAShape(nn.Module):
    """As timm's positional encodings: torch's zeros reads the memory of what says that it is a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, shape: tuple[int, ...]) -> Tensor:
        return torch.relu(self.norm(torch.zeros(shape).to(self.norm.weight)))


def test_a_parameter_that_is_no_tensor_does_no_harm() -> None:
    model = OfAShape().to(DEVICE)
    expected = model((3, 8))
    torch.testing.assert_close(fuse(model)((3, 8)), expected)


class TypeOrMode(nn.Module):
    """What only the code of a forward shows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(x))
        return h if type(x) is nn.Parameter else 2 * h


def test_a_forward_may_go_by_an_exact_type() -> None:
    model, x = TypeOrMode().to(DEVICE), normal(3, 8)
    fused = fuse(copy.deepcopy(model))
    torch.testing.assert_close(fused(x), model(x))
    torch.testing.assert_close(fused(nn.Parameter(x)), model(nn.Parameter(x)))


def test_numpys_random_numbers_are_drawn_in_each_call() -> None:
    model = Forward(lambda module, x, y: y * float(numpy.random.rand())).to(DEVICE)
    before = numpy.random.get_state()[1].copy()
    fuse(model)
    numpy.testing.assert_array_equal(before, numpy.random.get_state()[1])
    x = normal(3, 8)
    assert not torch.equal(model(x), model(x))


def test_an_example_leaves_what_modules_hold_as_it_was() -> None:
    model, x = Forward(appended).to(DEVICE), normal(3, 8)
    fuse(model, (x,))
    assert model.seen == []


class BuiltWhenCalled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.projection: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.projection is None:
            self.projection = nn.Linear(8, 8).to(x)
        return torch.relu(self.norm(self.projection(x)))


def test_what_a_model_built_for_an_example_stays() -> None:
    model, x = BuiltWhenCalled().to(DEVICE), normal(3, 8)
    fuse(model, (x,))
    projection = model.projection
    model(x)
    assert model.projection is projection is not None


def test_a_tensor_in_place_of_a_number_runs_what_the_model_was() -> None:
    model, x = Forward(lambda module, x, y: y * module.scale).to(DEVICE), normal(3, 8)
    model.scale = 1.0
    fuse(model)
    model.scale = torch.full((8,), 2.0, device=DEVICE)
    torch.testing.assert_close(model(x), 2 * torch.relu(nn.functional.layer_norm(x, (8,))))


@pytest.mark.parametrize("edge", [-float("inf"), float("nan")])
def test_a_difference_beside_what_is_not_finite_is_seen(edge: float) -> None:
    original, other = torch.tensor([edge, 1.0, 2.0]), torch.tensor([edge, 100.0, 2.0])
    assert difference(Results([original], [], []), Results([original], [], [])) == ""
    assert difference(Results([other], [], []), Results([original], [], [])) != ""


# --- modules that cannot be copied, tried or are not ready ---------------------------------------------------------


class WithALock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x)


class WithoutText(nn.Module):
    """A norm that holds what has no text."""

    class Silent:
        def __repr__(self) -> str:
            raise RuntimeError

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.silent = self.Silent()

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight


@pytest.mark.parametrize("part", [WithALock, WithoutText])
def test_a_part_that_cannot_be_looked_into_hinders_nothing(part: type[nn.Module]) -> None:
    model, x = nn.Sequential(nn.LayerNorm(8), part()).to(DEVICE), normal(3, 8)
    expected = model(x)
    torch.testing.assert_close(fuse(model)(x), expected)


def test_parameters_that_do_not_know_their_size_are_left() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.LazyConv1d(4, 1), nn.LayerNorm(8)).to(DEVICE)
    assert [entry.fused for entry in fusion_report(fuse(model))] == [True]


def test_a_default_device_does_not_hinder_recognition() -> None:
    class Rms(WithoutText):
        def __init__(self) -> None:
            super().__init__()
            del self.silent

    model = nn.Sequential(Rms())
    with torch.device("meta"):
        (entry,) = fusion_report(fuse(model))
    assert entry.fused


# --- activations that change -----------------------------------------------------------------------------------------


def test_settings_of_an_activation_may_change() -> None:
    model, x = nn.Sequential(nn.LayerNorm(8), nn.LeakyReLU(0.1)).to(DEVICE), normal(3, 8)
    fused = fuse(copy.deepcopy(model))
    for each in (model, fused):
        each[1].negative_slope = 0.9
    torch.testing.assert_close(fused(x), model(x))
    for each in (model, fused):
        each[1].forward = lambda x: x * 10
    torch.testing.assert_close(fused(x), model(x))


def test_an_activation_of_our_own_may_change() -> None:
    model, x = nn.Sequential(fused_ops.LayerNorm(8, activation="relu")).to(DEVICE), normal(3, 8)
    fuse(model)
    model[0].activation = None
    torch.testing.assert_close(model(x), nn.functional.layer_norm(x, (8,)))


def test_a_slice_of_a_fused_model_can_be_fused_and_unfused() -> None:
    model, x = fuse(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU()).to(DEVICE)), normal(3, 8)
    expected = model[:2](x)
    torch.testing.assert_close(fused_ops.unfuse(model[:2])(x), expected)
