"""fuse(model): what is found, what is left, that a fused model computes and keeps what the original did, and back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as TF

import fused_ops
from fused_ops import fuse, fusion_report, unfuse
from tests.fused_models import (
    MODELS,
    BlockOfParts,
    ConvNorm,
    OnePlusNorm,
    every_model,
    made,
)
from tests.norm_cases import DEVICE, normal

Tensor = torch.Tensor

pytestmark = [pytest.mark.one_in(8), pytest.mark.usefixtures("each_backend")]


def trained(model: nn.Module, x: Tensor) -> list[Tensor]:
    """All that two steps of training leave behind, and what the model then returns."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.manual_seed(1)
    left = []
    for _ in range(2):
        optimizer.zero_grad()
        y = model.train()(x)
        (y * torch.linspace(0, 7, y.numel(), device=y.device).cos().view_as(y)).sum().backward()
        left += [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
    return [*left, *(buffer.clone() for buffer in model.buffers()), model.eval()(x).detach(), torch.rand(3)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, original in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, original, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("with_example", [False, True])
@every_model
def test_a_fused_model_trains_as_the_original(name: str, with_example: bool) -> None:
    model, x = made(name)
    original, parameters = copy.deepcopy(model), [id(p) for p in model.parameters()]
    numbers = torch.get_rng_state()
    assert fuse(model, (x,) if with_example else None) is model
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(p.grad is None for p in model.parameters())
    assert [(entry.name, entry.pattern) for entry in fusion_report(model)] == MODELS[name][2]
    assert all(entry.fused and not entry.reason for entry in fusion_report(model))
    assert [id(p) for p in model.parameters()] == parameters
    state = original.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert_equal(trained(model, x), trained(original, x))


@every_model
def test_unfuse_restores_every_class_and_bit(name: str) -> None:
    model, x = made(name)
    original = copy.deepcopy(model)
    unfuse(fuse(model, (x,)))
    assert [type(module) for module in model.modules()] == [type(module) for module in original.modules()]
    assert [vars(module).keys() for module in model.modules()] == [vars(m).keys() for m in original.modules()]
    assert torch.equal(model.eval()(x), original.eval()(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@every_model
def test_a_copy_is_fused_and_depends_on_nothing(name: str, duplicate: Any) -> None:
    model, x = made(name)
    expected = fuse(model).eval()(x).detach()
    copied = duplicate(model)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    assert torch.equal(copied.eval()(x), expected)
    assert list(fusion_report(copied)) == list(fusion_report(model))
    assert not any(isinstance(module, fused_ops.fusion.sites.Replaced) for module in unfuse(copied).modules())


# --- what is left ----------------------------------------------------------------------------------------------------


def test_what_is_no_norm_by_its_result_is_left_and_says_so() -> None:
    model = fuse(nn.Sequential(OnePlusNorm(), nn.SiLU()).to(DEVICE))
    (entry,) = fusion_report(model)
    assert not entry.fused and "OnePlusNorm computes something else" in entry.reason


def test_a_model_that_was_not_fused_says_so() -> None:
    (entry,) = fusion_report(nn.Sequential(nn.LayerNorm(8)))
    assert (entry.name, entry.fused, entry.reason) == ("0", False, "fuse was not called")


class UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return TF.relu(y) * y


class Written(nn.Module):
    """The norm's input, between the norm and the add."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.relu = nn.LayerNorm(8), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        y = self.norm(x.clone())
        return y + self.relu(x)


@pytest.mark.parametrize("cls", [UsedTwice, Written])
def test_a_value_that_somebody_else_uses_is_left(cls: type[nn.Module]) -> None:
    model, x = cls().to(DEVICE), normal(3, 8)
    expected = copy.deepcopy(model)(x)
    assert [entry.pattern for entry in fusion_report(fuse(model))] == ["norm"]
    torch.testing.assert_close(model(x), expected)


class GoesByTheClass(ConvNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[0] if isinstance(x, tuple) else x)


def test_a_part_that_goes_by_what_it_is_given_stays_a_part() -> None:
    torch.manual_seed(0)
    model = BlockOfParts()
    model.layer[1] = GoesByTheClass(nn.Identity())
    patterns = [entry.pattern for entry in fusion_report(fuse(model.to(DEVICE)))]
    assert patterns == ["norm+relu", "norm"]  # and an add in place onto what it may have been given is left


class ChangesWhatItKeeps(nn.Module):
    """`+=` on what has another name, too, and on a number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = kept = self.conv(x)
        channels = before = x.shape[1]
        channels *= 2
        out += x
        out *= channels
        return torch.relu(self.norm(out)), kept, out + before


def test_what_changes_in_place_changes_for_all_its_names() -> None:
    torch.manual_seed(0)
    model, x = ChangesWhatItKeeps().to(DEVICE), normal(2, 4, 5, 5)
    expected = model(x)
    assert [entry.pattern for entry in fusion_report(fuse(model))] == ["norm+relu"]
    torch.testing.assert_close(model(x), expected)


class KeepsTwice(ChangesWhatItKeeps):
    """Adds in place onto the result of an add in place, and of a module that hands on what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        out = kept = self.conv(x)
        out += x
        out += x
        before = self.conv(x)
        after = self.drop(before)
        after += x
        return torch.relu(out), kept, self.norm(after), before


def test_an_add_onto_another_name_is_left() -> None:
    torch.manual_seed(0)
    model, x = KeepsTwice().to(DEVICE).eval(), normal(2, 4, 5, 5)
    expected = model(x)
    torch.testing.assert_close(fuse(model)(x), expected)


class AddsWithin(nn.Module):
    """A part with everything: its own norm and activation, its own sum, and a norm at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.last = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        return self.last(self.conv(torch.relu(self.conv(y) + y)))


@pytest.mark.parametrize("activates", [True, False])
def test_what_is_within_a_part_is_reported_once(activates: bool) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.conv = AddsWithin(), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.part(x)
            return torch.relu(y) if activates else self.conv(y)

    torch.manual_seed(0)
    model, x = Outer().to(DEVICE).eval(), normal(2, 4, 5, 5)
    expected = model(x)
    report = [(entry.name, entry.pattern) for entry in fusion_report(fuse(model))]
    last = "norm+relu" if activates else "norm"
    assert report == [("part.first", "norm+relu"), ("part.last", last), ("part", "add+relu")]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


class PartByKeyword(ConvNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(input=self.norm(self.conv(x)))


class Called(ConvNorm):
    calls = 0

    def __call__(self, *args: Any) -> Any:
        type(self).calls += 1
        return super().__call__(*args)


def test_a_part_with_a_call_of_its_own_is_called() -> None:
    for part in (PartByKeyword, Called):
        torch.manual_seed(0)
        model, x = BlockOfParts(), normal(2, 4, 5, 5)
        model.layer = part(nn.Identity())
        model.to(DEVICE)
        expected = model.eval()(x)
        before = Called.calls
        torch.testing.assert_close(fuse(model)(x), expected)
        assert part is PartByKeyword or Called.calls > before


def test_a_part_whose_class_cannot_be_pickled_costs_nothing_else() -> None:
    class Local(ConvNorm):
        pass

    class Adds(BlockOfParts):
        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.layer(x) + x)

    model = Adds()
    model.layer = nn.Sequential(Local(nn.Identity()))
    assert [entry.pattern for entry in fusion_report(fuse(model.to(DEVICE)))] == ["norm", "add+relu"]


class Broadcasts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.position = nn.Parameter(torch.rand(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        return TF.relu(self.norm(x + self.position) + self.position)


def test_a_sum_that_broadcasts_is_torchs() -> None:
    model, x = Broadcasts().to(DEVICE), normal(2, 3, 8)
    expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(fuse(model)(x), expected)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"torch\.nn\.Module, but is a list"):
        fuse([nn.LayerNorm(8)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tuple of positional or a dict of keyword arguments, but is a Tensor"):
        fuse(nn.LayerNorm(8), torch.ones(2, 8))


def test_what_disagrees_on_the_example_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a norm that is made to return something else, and of no other."""
    wrong = fused_ops.RMSNorm._run_fused
    monkeypatch.setattr(fused_ops.RMSNorm, "_run_fused", lambda *args: wrong(*args) + 1)
    model, x = nn.Sequential(nn.LayerNorm(8), nn.RMSNorm(8)).to(DEVICE), normal(3, 8)
    expected = copy.deepcopy(model)(x)
    fuse(model, (x,))
    assert [entry.fused for entry in fusion_report(model)] == [True, False]
    assert "outputs differ" in fusion_report(model)[1].reason
    torch.testing.assert_close(model(x), expected)
