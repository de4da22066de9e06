"""Calls of late: found by torch's guard of tensors where that tells what it should, and otherwise all the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fused_ops
from fused_ops import functional as F
from fused_ops import known, recent
from tests.conftest import DEVICE

Tensor = torch.Tensor

C = 8


def rows(**options: Any) -> Tensor:
    return torch.randn(4, C, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_(**options)


def calls_of(place: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows with every call of a function."""
    calls: list[Any] = []
    original = getattr(place, name)

    def noted(*given: Any) -> Any:
        calls.append(given)
        return original(*given)

    monkeypatch.setattr(place, name, noted)
    return calls


class Guards:
    """In the place of torch's: of tensors that it takes for like any others, or for like none."""

    def __init__(self, *tensors: Tensor, **dims: None) -> None:
        pass

    def check(self, *tensors: Tensor) -> bool:
        raise NotImplementedError


class Trusting(Guards):
    def check(self, *tensors: Tensor) -> bool:
        return True


class Wary(Guards):
    def check(self, *tensors: Tensor) -> bool:
        return False


def test_torchs_guard_tells_what_it_should():
    assert recent._guards is not None, "this torch has another: see fused_ops/recent.py"


def test_the_trial_does_not_depend_on_the_default_type():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert recent._tells(recent._guards)
    finally:
        torch.set_default_dtype(default)


@pytest.mark.parametrize("guards", [Trusting, Wary, Guards, None])
def test_a_guard_that_tells_something_else_is_not_used(guards):
    assert not recent._tells(guards)


def test_without_a_guard_calls_are_known_all_the_same(monkeypatch, each_backend):
    monkeypatch.setattr(recent, "_guards", None)
    known.forget()
    F.layer_norm(rows(), C, activation="gelu").square().sum().backward()
    (call,) = known._decisions._by_key.values()
    F.layer_norm(rows(), C, activation="gelu").square().sum().backward()
    assert [*known._decisions._by_key.values()] == [call] and not known._decisions._of_late
    assert F.layer_norm(rows().double(), C, activation="gelu").dtype == torch.float64


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("place", ["residual", "scale"])
def test_a_nested_tensor_is_refused_after_a_dense_one(place, each_backend):
    """torch's guard would end the process."""
    x, tensors = rows(), {"residual": rows(), "scale": torch.ones(4, C, device=DEVICE)}
    nested = torch.nested.nested_tensor([torch.randn(2, C), torch.randn(3, C)], device=DEVICE)
    F.residual_add(x, **tensors)
    with pytest.raises(RuntimeError):
        F.residual_add(x, **{**tensors, place: nested})


def test_calls_of_one_shape_are_all_found(monkeypatch, each_backend):
    def calls() -> list[Tensor]:
        dense, learning, turned = rows(requires_grad=False), rows(), rows(requires_grad=False).t().contiguous().t()
        return [F.layer_norm(x, C, activation="silu") for x in (dense, learning, turned, dense.double())]

    first = calls()
    monkeypatch.setattr(known, "signature", None)
    monkeypatch.setattr(known, "_rows", None)
    assert all(map(torch.equal, first, calls()))


def test_a_backward_is_planned_once(monkeypatch, triton_backend):
    from fused_ops import planned

    decided = calls_of(planned.Plan, "_plan", monkeypatch)
    for samples in (4, 4, 3):
        x = rows().detach()[:samples].requires_grad_()
        F.layer_norm(x, C, activation="gelu").square().sum().backward()
    assert len(decided) == 1
    y = F.layer_norm(rows(), C, activation="gelu")
    y.backward(torch.ones(C, 4, device=DEVICE).t())
    assert len(decided) == 2


def test_a_plan_keeps_no_more_backwards_than_it_may(triton_backend):
    from fused_ops import planned

    for gap in range(planned.MOST_BACKWARDS + 2):
        y = F.layer_norm(rows(), C, activation="gelu")
        node: Any = y.grad_fn
        kept = node.plan._backwards
        y.backward(torch.ones(4, C + 1 + gap, device=DEVICE)[:, :C])
        (alike,) = kept._of_late.values()
        assert len(kept._by_key) <= planned.MOST_BACKWARDS and len(alike) <= recent.MOST_ALIKE


@pytest.mark.parametrize("x", [None, [1.0], 3])
def test_what_is_no_tensor_gets_its_own_error_alone(x, each_backend):
    for call in (lambda: F.layer_norm(x, C), lambda: F.residual_add(x, rows())):
        with pytest.raises(TypeError) as raised:
            call()
        assert raised.value.__context__ is None


def test_a_default_device_hides_nothing(each_backend):
    with torch.device(DEVICE):
        known.forget()
        F.layer_norm(rows(), C)
        assert len(known._decisions._by_key) == 1


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_residual_adds_are_planned_once(dropout_p, monkeypatch, triton_backend):
    from fused_ops import residual_autograd

    planned = calls_of(residual_autograd, "plan", monkeypatch)
    for _ in range(2):
        x, residual = rows(), rows()
        F.residual_add(x, residual, dropout_p=dropout_p).sum().backward()
        assert torch.equal(residual.grad, torch.ones_like(residual))
    with fused_ops.use_backend("torch"):
        F.residual_add(rows(), rows(), dropout_p=dropout_p)
    assert len(planned) == 1
