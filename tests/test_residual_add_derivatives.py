"""Derivatives of residual_add in float64: first, second, by batches and transforms, and only those asked for."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import func
from torch.autograd import gradcheck, gradgradcheck

from fused_ops import Activation
from fused_ops import functional as F
from tests.calls import gradients, scalar
from tests.layouts import channels_last, spatial_dims_swapped
from tests.norm_cases import DEVICE, HALF, TORCH_ACTIVATIONS, short, with_fields
from tests.residual_add_cases import (
    EACH_KIND,
    OPERANDS,
    AddCase,
    blocks_of,
    check,
    composed,
    fused,
    make_case,
    operands,
    with_exact_sums,
    with_layout,
)
from tests.test_autograd import KINKS, MARGIN, PARAMETERS
from tests.tolerances import kernels_are_interpreted

Tensor = torch.Tensor

# torch's own, as it first loads forward-mode differentiation.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

ACTIVATIONS = [None, *(Activation(name, **PARAMETERS.get(name, {})) for name in TORCH_ACTIVATIONS)]
RATES: dict[str, dict[str, float]] = {
    "whole": {},
    "dropout": {"dropout_p": 0.3},
    "drop-path": {"drop_path_p": 0.3},
    "both": {"dropout_p": 0.3, "drop_path_p": 0.3},
}
DROPS = RATES["both"]
every_kind = pytest.mark.parametrize("activation", EACH_KIND)
each_scale = pytest.mark.parametrize("scale", [None, (4,), (3, 1)], ids=short)


def double_case(*shape: int, **fields: Any) -> AddCase:
    return make_case(*(shape or (3, 4)), dtype=torch.float64, **fields)


def case_beside_kinks(activation: Activation | None, **fields: Any) -> AddCase:
    """The first seed whose z lies on every side of every kink, and near none; deviations of 4 and more."""
    kinks = KINKS.get(activation.name, ()) if activation else ()
    for seed in itertools.count(step=10):
        case = double_case(6, 4, seed=seed, activation=activation, **fields)
        case = with_fields(case, residual=case.residual * 4)
        (z,) = composed(with_fields(case, activation=None))(*(tensor.detach() for tensor in operands(case).values()))
        if all((z - kink).abs().min() > MARGIN and (z < kink).any() and (z > kink).any() for kink in kinks):
            return case
    raise AssertionError("itertools.count ended")


@pytest.fixture(autouse=True)
def small_blocks() -> Iterator[None]:
    """Few elements take an interpreter less time than the empty places of a block do."""
    with contextlib.ExitStack() as stack:
        if kernels_are_interpreted():
            stack.enter_context(blocks_of(32))
        yield


# --- first and second ----------------------------------------------------------------------------------------------


@pytest.mark.one_in(12)
@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("scale", [None, (4,), (6, 1)], ids=short)
@pytest.mark.parametrize("activation", [None, Activation("relu"), Activation("gelu"), Activation("tanh")], ids=str)
def test_first_and_second_derivatives_are_those_of_finite_differences(activation, scale, rates, triton_backend):
    case = case_beside_kinks(activation, scale=scale, **RATES[rates])
    tensors = tuple(operands(case).values())
    assert gradcheck(fused(case), tensors, fast_mode=True)
    assert gradgradcheck(fused(case), tensors, fast_mode=True)


@pytest.mark.one_in(10)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: activation.name if activation else "None")
@pytest.mark.parametrize("scale", [None, (4,)], ids=short)
def test_first_and_second_derivatives_of_every_activation(activation, scale, each_backend):
    case = case_beside_kinks(activation, scale=scale)
    tensors = tuple(operands(case).values())
    assert gradcheck(fused(case), tensors, fast_mode=True)
    assert gradgradcheck(fused(case), tensors, fast_mode=True)


@pytest.mark.full
@pytest.mark.parametrize("rates", ["whole", "both"])
@every_kind
def test_every_entry_of_the_jacobians_is_that_of_finite_differences(activation, rates, triton_backend):
    case = case_beside_kinks(activation and Activation(activation), scale=(4,), **RATES[rates])
    assert gradcheck(fused(case), tuple(operands(case).values()), check_batched_grad=True)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("layout", [torch.clone, channels_last], ids=["contiguous", "channels_last"])
@every_kind
def test_second_derivatives_drop_what_the_first_dropped_in_any_layout(activation, layout, triton_backend):
    """The bits of a slope lie as y does, and the composition that is differentiated again reads them there."""
    case = with_layout(double_case(3, 4, 2, 3, activation=activation, scale=(4, 1, 1), **DROPS), layout)
    ours, torchs = (penalized(call(case), case.leaves()) for call in (fused, composed))
    torch.testing.assert_close(ours, torchs)


def penalized(call: Any, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The gradient of a gradient penalty."""
    loss = scalar(call(*tensors.values()))
    first = torch.autograd.grad(loss, list(tensors.values()), create_graph=True)
    penalty = sum(gradient.square().sum() for gradient in first)
    return torch.autograd.grad(loss + penalty, list(tensors.values()))


@pytest.mark.parametrize("rates", ["whole", pytest.param("both", marks=pytest.mark.full)])
def test_third_derivatives_are_those_of_finite_differences(rates, triton_backend):
    case = double_case(2, 3, scale=(3,), activation="silu", **RATES[rates])

    def slopes(*tensors: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(scalar(fused(case)(*tensors)), tensors, create_graph=True)

    assert gradgradcheck(slopes, tuple(operands(case).values()), fast_mode=True)


@pytest.mark.one_in(8)
@pytest.mark.parametrize("rates", ["whole", "both"])
@each_scale
@every_kind
@pytest.mark.parametrize("dtype", HALF, ids=short)
@pytest.mark.parametrize("wide", [False, True])
def test_create_graph_changes_no_gradient(wide, dtype, activation, scale, rates, triton_backend):
    """Of mixed types, too, for which the composition stands in place of the kernel."""
    fields = {"residual_dtype": torch.float32, "scale_dtype": torch.float32} if wide else {}
    case = with_exact_sums(make_case(3, 4, dtype=dtype, scale=scale, activation=activation, **fields, **RATES[rates]))
    tensors = operands(case)
    loss = scalar(fused(case)(*tensors.values()))
    plain, differentiable = (
        torch.autograd.grad(loss, list(tensors.values()), retain_graph=True, create_graph=create_graph)
        for create_graph in (False, True)
    )
    assert [g.dtype for g in differentiable] == [g.dtype for g in plain] == [t.dtype for t in tensors.values()]
    torch.testing.assert_close([gradient.detach() for gradient in differentiable], list(plain))


# --- only what is asked for ----------------------------------------------------------------------------------------


@pytest.mark.one_in(5)
@pytest.mark.usefixtures("memory_checked")
@pytest.mark.parametrize("rates", ["whole", "both"])
@each_scale
@pytest.mark.parametrize("activation", [None, "leaky_relu", "gelu"])
def test_every_choice_of_gradients(activation, scale, rates, triton_backend):
    """`check` also holds that a frozen operand gets None."""
    whole = with_exact_sums(make_case(3, 4, dtype=torch.float16, scale=scale, activation=activation, **RATES[rates]))
    names = tuple(whole.leaves())
    for count in range(len(names) + 1):
        for frozen in itertools.combinations(names, count):
            check(with_fields(whole, frozen=frozen))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("rates", ["whole", "both"])
@each_scale
@every_kind
def test_nothing_is_computed_that_is_not_asked_for(activation, scale, rates, triton_backend, monkeypatch):
    """A gradient that nobody requires is neither allocated nor computed, and one that is at hand launches nothing."""
    autograd = pytest.importorskip("fused_ops.residual_autograd", reason="Triton is not installed")
    original, computed = autograd.residual_add_backward, []

    def noted(*arguments: Any) -> Any:
        found = original(*arguments)
        computed.append({name for name, gradient in found._asdict().items() if gradient is not None})
        return found

    monkeypatch.setattr(autograd, "residual_add_backward", noted)
    whole = double_case(activation=activation, scale=scale, **RATES[rates])
    names = tuple(whole.leaves())
    for count in range(1, len(names) + 1):
        for wanted in itertools.combinations(names, count):
            computed.clear()
            case = with_fields(whole, frozen=tuple(name for name in OPERANDS if name not in wanted))
            gradients(fused(case), operands(case))
            expected = {f"d{name}" for name in wanted}
            x_is_z = scale is None and rates == "whole"
            if activation is None:
                expected -= {"dresidual"} | ({"dx"} if x_is_z else set())  # they are dy
            elif x_is_z and {"x", "residual"} <= set(wanted):
                expected -= {"dresidual"}  # it is dx
            assert computed == ([expected] if expected else []), wanted


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_a_graph_of_gradients_has_only_those_asked_for(activation, triton_backend, monkeypatch):
    """With create_graph, too; and what was dropped is drawn again only for who depends on it."""
    autograd = pytest.importorskip("fused_ops.residual_autograd", reason="Triton is not installed")
    original, draw, found, drawn = autograd._composed, autograd.drop_factor, [], []

    def noted(*arguments: Any) -> Any:
        found.append(original(*arguments))
        return found[-1]

    monkeypatch.setattr(autograd, "_composed", noted)
    monkeypatch.setattr(autograd, "drop_factor", lambda *given: drawn.append(given) or draw(*given))
    whole = double_case(activation=activation, scale=(4,), **DROPS)
    for wanted in itertools.chain.from_iterable(itertools.combinations(OPERANDS, count) for count in (1, 2, 3)):
        found.clear(), drawn.clear()
        tensors = operands(with_fields(whole, frozen=tuple(name for name in OPERANDS if name not in wanted)))
        (y,) = fused(whole)(*tensors.values())
        torch.autograd.grad(scalar((y,)), [tensors[name] for name in wanted], create_graph=True)
        (computed,) = found
        assert {name for name, gradient in computed._asdict().items() if gradient is not None} == {
            f"d{name}" for name in wanted
        }
        assert len(drawn) == (activation == "gelu" or wanted != ("residual",)), wanted


WALKS = {
    "once": lambda y, residual, dy: torch.autograd.grad(y, residual, dy),
    "create_graph": lambda y, residual, dy: torch.autograd.grad(y, residual, dy, create_graph=True),
    "batched": lambda y, residual, dy: torch.autograd.grad(y, residual, dy[None], is_grads_batched=True)[0],
    "vmap": lambda y, residual, dy: torch.vmap(lambda dy: torch.autograd.grad(y, residual, dy)[0])(dy[None]),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("rates", ["whole", "both"])
@pytest.mark.parametrize("layout", [torch.clone, channels_last, spatial_dims_swapped], ids=lambda way: way.__name__)
@pytest.mark.parametrize("scale", [(4, 1, 1), (3, 4, 1, 1)], ids=short)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_scale_may_change_where_the_residual_alone_learns(activation, scale, layout, rates, walk, each_backend):
    """Its values are not kept; its shape is, by which kernels know how the bits of a slope lie."""
    case = double_case(3, 4, 2, 3, activation=activation, scale=scale, frozen=("x", "scale"), **RATES[rates])
    case = with_layout(case, layout)
    (expected,) = torch.autograd.grad(composed(case)(*(leaves := operands(case)).values()), leaves["residual"], case.dy)
    tensors = operands(case)
    (y,) = fused(case)(*tensors.values())
    tensors["scale"].mul_(2)
    (found,) = WALKS[walk](y, tensors["residual"], case.dy)
    torch.testing.assert_close(found.reshape(expected.shape), expected)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_scale_may_change_where_an_op_has_run(activation, triton_backend):
    ops = pytest.importorskip("fused_ops.residual_ops", reason="Triton is not installed")
    x, residual, scale = operands(double_case(scale=(4,), frozen=("x", "scale"))).values()
    expected = torch.ones_like(x) if activation is None else (residual + scale * x > 0).to(x)
    tensors = (x, residual, scale, None)
    y = ops.plan(*tensors[:3], ops.ResidualAdd(activation=activation))(*tensors)
    scale.mul_(-2)
    assert torch.equal(torch.autograd.grad(y.sum(), residual)[0], expected)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("rates", ["whole", "both"])
@every_kind
def test_no_gradient_is_made_up(activation, rates, create_graph, each_backend):
    """y requires a gradient where torch's would, and every subset gets the gradients that all get."""
    whole = double_case(activation=activation, scale=(4,), **RATES[rates])
    expected = gradients(composed(whole), operands(whole))
    for frozen in itertools.chain.from_iterable(itertools.combinations(OPERANDS, count) for count in range(4)):
        tensors = operands(with_fields(whole, frozen=frozen))
        (y,) = fused(whole)(*tensors.values())
        assert y.requires_grad == (len(frozen) < 3)
        if y.requires_grad:
            wanted = {name: tensor for name, tensor in tensors.items() if name not in frozen}
            found = torch.autograd.grad(scalar((y,)), list(wanted.values()), create_graph=create_graph)
            torch.testing.assert_close([g.detach() for g in found], [expected[name] for name in wanted])


@pytest.mark.one_in(4)
@pytest.mark.parametrize("rates", ["whole", "both"])
@every_kind
def test_one_tensor_in_every_place_gets_every_gradient(activation, rates, each_backend):
    case = double_case(activation=activation, scale=(3, 4), **RATES[rates])

    def thrice(call: Any) -> Any:
        return lambda x: call(x, x, x)

    tensors = {"x": case.x.clone().requires_grad_()}
    ours, torchs = (gradients(thrice(call(case)), tensors) for call in (fused, composed))
    torch.testing.assert_close(ours, torchs)
    if each_backend == "triton" or rates == "whole":
        assert gradgradcheck(thrice(fused(case)), tuple(tensors.values()), fast_mode=True)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("create_graph", [False, True])
@every_kind
@pytest.mark.parametrize("shape", [(0,), (0, 4), (2, 0)])
def test_empty_tensors_have_empty_or_zero_gradients(shape, activation, create_graph, each_backend):
    tensors = operands(double_case(*shape, scale=(1,), activation=activation))
    call = fused(double_case(*shape, scale=(1,), activation=activation, **DROPS))
    found = torch.autograd.grad(scalar(call(*tensors.values())), list(tensors.values()), create_graph=create_graph)
    for tensor, gradient in zip(tensors.values(), found, strict=True):
        assert gradient.shape == tensor.shape and not gradient.any()


# --- by batches, and torch.func ------------------------------------------------------------------------------------


def rows_of_the_jacobian(call: Any, case: AddCase, vectorized: str) -> list[Tensor]:
    tensors = list(operands(case).values())
    (y,) = call(*tensors)
    basis = torch.eye(y.numel(), dtype=y.dtype, device=DEVICE).view(-1, *y.shape)
    if vectorized == "is_grads_batched":
        return list(torch.autograd.grad(y, tensors, basis, is_grads_batched=True))
    return list(torch.vmap(lambda dy: torch.autograd.grad(y, tensors, dy))(basis))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("vectorized", ["is_grads_batched", "vmap"])
@pytest.mark.parametrize("rates", ["whole", "both"])
@each_scale
@every_kind
def test_gradients_by_batches_are_those_one_by_one(activation, scale, rates, vectorized, each_backend):
    case = double_case(activation=activation, scale=scale, **RATES[rates])
    ours, torchs = (rows_of_the_jacobian(call(case), case, vectorized) for call in (fused, composed))
    torch.testing.assert_close(ours, torchs)


TRANSFORMS = {
    "grad": lambda call: func.grad(lambda *t: scalar(call(*t)), argnums=(0, 1, 2)),
    "grad of grad": lambda call: func.grad(lambda *t: scalar((func.grad(lambda *t: scalar(call(*t)))(*t),))),
    "vmap": lambda call: func.vmap(call, (0, 0, None)),
    "vmap of grad": lambda call: func.vmap(func.grad(lambda *t: scalar(call(*t)), argnums=(0, 2)), (0, 0, None)),
    "jacfwd": lambda call: func.jacfwd(call, argnums=(0, 2)),
    "jvp": lambda call: lambda *t: func.jvp(call, t, tuple(x.cos() for x in t)),
    "functionalize": lambda call: func.functionalize(call),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@every_kind
def test_a_transform_gives_what_it_gives_of_torchs(activation, transform, each_backend):
    case = double_case(activation=activation, scale=(4,))
    tensors = [tensor.detach() for tensor in operands(case).values()]
    ours, torchs = (TRANSFORMS[transform](call(case))(*tensors) for call in (fused, composed))
    torch.testing.assert_close(ours, torchs)


def test_dual_numbers_without_torch_func(each_backend):
    case = double_case(activation="gelu", scale=(4,))

    def tangent(call: Any) -> Tensor:
        with forward_ad.dual_level():
            duals = (forward_ad.make_dual(tensor.detach(), tensor.detach().cos()) for tensor in operands(case).values())
            return forward_ad.unpack_dual(call(case)(*duals)[0]).tangent

    torch.testing.assert_close(tangent(fused), tangent(composed))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_drops_as_it_is_told(randomness, each_backend):
    """Under a transform the composition runs, whose randomness torch knows how to batch."""
    ones, zeros = torch.ones(3, 400, device=DEVICE), torch.zeros(3, 400, device=DEVICE)
    call = func.vmap(lambda x, r: F.residual_add(x, r, dropout_p=0.5), randomness=randomness)
    torch.manual_seed(0)
    y = call(ones, zeros)
    assert torch.equal(y.unique(), torch.tensor([0.0, 2.0], device=DEVICE))
    assert torch.equal(y[0], y[1]) == (randomness == "same")


def test_grad_of_a_call_that_drops(each_backend):
    x = torch.ones(400, device=DEVICE)

    def total(x: Tensor) -> Tensor:
        return F.residual_add(x, torch.zeros_like(x), dropout_p=0.5).sum()

    torch.manual_seed(0)
    dx, value = func.grad_and_value(total)(x)
    assert torch.equal(dx.unique(), torch.tensor([0.0, 2.0], device=DEVICE)) and dx.sum() == value
