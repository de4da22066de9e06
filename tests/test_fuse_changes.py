"""What became of a fused model since: hooks, parts and children that changed, and calls that nobody traced."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fused_ops import fuse, fusion_report
from tests.fused_models import BlockOfParts, PreNorm, made
from tests.norm_cases import DEVICE, normal

Tensor = torch.Tensor

pytestmark = [pytest.mark.one_in(8), pytest.mark.usefixtures("each_backend")]


def test_a_hook_sees_what_it_saw_whenever_it_comes() -> None:
    model, x = made("Sequential")
    expected = copy.deepcopy(model).eval()[:2](x)
    fuse(model).eval()
    seen: list[Tensor] = []
    model[1].register_forward_hook(lambda module, args, y: seen.append(y))
    model(x)
    torch.testing.assert_close(seen, [expected])


@pytest.mark.parametrize("part", ["layer", "layer.1", "layer.1.norm"])
def test_a_hook_on_a_part_sees_what_it_saw(part: str) -> None:
    torch.manual_seed(0)
    model, x = BlockOfParts().to(DEVICE), normal(2, 4, 5, 5)
    seen: list[Tensor] = []
    for fused in (False, True):
        if fused:
            fuse(model)
        handle = model.get_submodule(part).register_forward_hook(lambda module, args, out: seen.append(out.clone()))
        model.eval()(x)
        handle.remove()
    torch.testing.assert_close(*seen)


def test_a_part_that_changed_since_runs_as_it_is() -> None:
    torch.manual_seed(0)
    model, x = BlockOfParts().to(DEVICE), normal(2, 4, 5, 5)
    expected = copy.deepcopy(model)
    fuse(model)
    for each in (model, expected):
        each.layer[1] = nn.Tanh()
    torch.testing.assert_close(model(x), expected(x))
    for each in (model, expected):
        each.layer[1] = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False).to(DEVICE).requires_grad_(False), nn.Identity())
        nn.init.ones_(each.layer[1][0].weight)
    torch.testing.assert_close(model(x), expected(x))


class GoesThroughItsTail(nn.Module):
    """A forward that goes by whether a child is a container, or is there."""

    def __init__(self) -> None:
        super().__init__()
        self.lead, self.norm, self.relu = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()
        self.tail: Any = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.lead(x)))
        if isinstance(self.tail, nn.Sequential):
            for layer in self.tail:
                x = layer(x) + 1
            return x
        return x if self.tail is None else self.tail(x)


def test_a_child_that_became_a_container_or_none_is_seen() -> None:
    torch.manual_seed(0)
    model, x = GoesThroughItsTail().to(DEVICE).eval(), normal(2, 4, 5, 5)
    original = copy.deepcopy(model)
    fuse(model)
    for tail in (nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()).to(DEVICE), None, nn.Sequential().to(DEVICE)):
        model.tail = original.tail = tail
        torch.testing.assert_close(model(x), original(x))
    assert any(entry.pattern == "norm+relu" for entry in fusion_report(model))


def test_other_calls_than_those_that_were_traced_run_as_they_did() -> None:
    """An option, another layer, a layer more, and a sum that broadcasts."""
    model, x = PreNorm().to(DEVICE), normal(2, 3, 8)
    original, mask = copy.deepcopy(model), normal(2, 3, 8, seed=3)
    fuse(model)
    torch.testing.assert_close(model(x, mask), original(x, mask))
    torch.testing.assert_close(model(x, mask=None), original(x))
    for each in (model, original):
        each.mix = nn.Identity()
    torch.testing.assert_close(model(x), original(x))
    layers, x = made("Sequential")
    fuse(layers).eval()
    shorter = layers[:2](x)
    layers.append(nn.Tanh())
    torch.testing.assert_close(layers(x), torch.tanh(layers[:5](x)))
    torch.testing.assert_close(shorter, layers[1](layers[0](x)))


class GoesThroughAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layers = nn.LayerNorm(8), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return torch.relu(self.norm(x))


def test_a_list_may_grow_and_shrink() -> None:
    torch.manual_seed(0)
    model, x = GoesThroughAList().to(DEVICE), normal(3, 8)
    original = copy.deepcopy(model)
    fuse(model)
    for each in (model, original):
        each.layers.append(copy.deepcopy(each.layers[0]))
    torch.testing.assert_close(model(x), original(x))
    for each in (model, original):
        del each.layers[1:]
    torch.testing.assert_close(model(x), original(x))
