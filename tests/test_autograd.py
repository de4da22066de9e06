"""Derivatives of every function in float64, in both backends: first, second, third, and by batches."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fused_ops import Activation
from tests.calls import composed, fused, gradients, operands, scalar
from tests.every_norm import PLACES, add_functions, functions, small_case
from tests.norm_cases import DEVICE, OPERANDS, TORCH_ACTIVATIONS, Case
from tests.row_norm_cases import FUNCTIONS as ROW_FUNCTIONS
from tests.row_norm_cases import make_case

pytestmark = pytest.mark.one_in(8)

Tensor = torch.Tensor

make_double_case = functools.partial(make_case, dtype=torch.float64)
small_double_case = functools.partial(small_case, dtype=torch.float64)

# Parameters other than the defaults, and small enough that a few elements reach both sides.
PARAMETERS = {
    "leaky_relu": {"negative_slope": 0.3},
    "elu": {"alpha": 1.7},
    "softplus": {"beta": 1.5, "threshold": 3.0},
}
ACTIVATIONS = [None, *(Activation(name, **PARAMETERS.get(name, {})) for name in TORCH_ACTIVATIONS)]
EACH_KIND = (None, Activation("relu"), Activation("gelu"))

# Where the value, the slope or the slope's slope jumps, so that a finite difference across it means nothing.
KINKS = {
    "relu": (0.0,),
    "relu6": (0.0, 6.0),
    "leaky_relu": (0.0,),
    "elu": (0.0,),
    "selu": (0.0,),
    "hardswish": (-3.0, 3.0),
    "hardsigmoid": (-3.0, 3.0),
    "softplus": (2.0,),
}
# gradcheck moves an operand by 1e-6, which moves z by far less than this.
MARGIN = 1e-2

# RMSNorm is the same kernels with a flag off, a norm alone the same with a pointer less: one activation of each kind,
# and the others in the long sweep. So are most of the channel norms, whose kernels take an interpreter long: their
# second derivatives are compositions, alike but for the statistics.
QUICK_CHANNEL_NORMS = [
    ("group_norm", True, Activation("relu")),
    ("instance_norm", True, Activation("gelu")),
    ("add_instance_norm", True, None),
    ("add_group_norm", True, Activation("gelu")),
]


def is_quick(function: str, residual: bool, activation: Activation | None) -> bool:
    if function not in ROW_FUNCTIONS:
        return (function, residual, activation) in QUICK_CHANNEL_NORMS
    return activation in EACH_KIND or ("layer" in function and residual)


CHECKED = [
    pytest.param(
        function,
        residual,
        activation,
        id=f"{function}-{'residual' if residual else 'alone'}-{activation.name if activation else None}",
        marks=[] if is_quick(function, residual, activation) else pytest.mark.full,
    )
    for (function, residual), activation in itertools.product(PLACES, ACTIVATIONS)
]


def case_beside_kinks(function: str, residual: bool, activation: Activation | None) -> Case:
    """The first seed whose z lies on every side of every kink, and near none; weights and biases of deviation 4."""
    kinks = KINKS.get(activation.name, ()) if activation else ()
    for seed in itertools.count():
        case = small_double_case(function, 3, 4, residual=residual, activation=activation, seed=10 * seed)
        for parameter in filter(lambda tensor: tensor is not None, (case.weight, case.bias)):
            parameter.mul_(4)
        z = composed(replace(case, activation=None))(*operands(case).values())[0].detach()
        if all((z - kink).abs().min() > MARGIN and (z < kink).any() and (z > kink).any() for kink in kinks):
            return case
    raise AssertionError("itertools.count ended")


@pytest.mark.one_in(8)
@pytest.mark.parametrize(("function", "residual", "activation"), CHECKED)
def test_first_and_second_derivatives_are_those_of_finite_differences(function, residual, activation, each_backend):
    case = case_beside_kinks(function, residual, activation)
    tensors = tuple(operands(case).values())
    assert gradcheck(fused(case), tensors, fast_mode=True)
    assert gradgradcheck(fused(case), tensors, fast_mode=True)


@functions("instance_norm")
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_batched_gradients_are_those_one_by_one(function, activation, each_backend):
    """What torch.autograd.functional.jacobian(vectorize=True) and is_grads_batched ask for."""
    case = small_double_case(function, residual=True, activation=activation)
    assert gradcheck(fused(case), tuple(operands(case).values()), fast_mode=True, check_batched_grad=True)


@pytest.mark.full
@functions()
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_every_entry_of_the_jacobians_is_that_of_finite_differences(function, activation, each_backend):
    case = case_beside_kinks(function, True, Activation(activation))
    tensors = tuple(operands(case).values())
    assert gradcheck(fused(case), tensors)
    assert gradgradcheck(fused(case), tensors)


@functions("add_instance_norm")
def test_third_derivatives_are_those_of_finite_differences(function, triton_backend):
    """In the torch backend they are torch's own, and those of its layer_norm are wrong (seen in torch 2.13)."""
    case = small_double_case(function, 2, 3, residual=True, activation="silu")
    tensors = operands(case)

    def slopes(*tensors: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(scalar(fused(case)(*tensors)), tensors, create_graph=True)

    assert gradgradcheck(slopes, tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("function", ROW_FUNCTIONS)
@pytest.mark.parametrize("activation", [None, "relu", "mish"])
def test_the_gradient_of_a_gradient_penalty_is_torchs(function, activation, each_backend):
    case = make_double_case(function, 2, 3, 4, dims=2, residual=True, activation=activation)

    def penalized(call, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        loss = scalar(call(*tensors.values()))
        first = torch.autograd.grad(loss, list(tensors.values()), create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        return torch.autograd.grad(loss + penalty, list(tensors.values()))

    ours, torchs = (penalized(call(case), operands(case)) for call in (fused, composed))
    torch.testing.assert_close(ours, torchs)


@pytest.mark.one_in(2)
@functions("add_instance_norm")
@pytest.mark.parametrize("activation", [None, "leaky_relu", "gelu"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_every_choice_of_what_requires_a_gradient(function, activation, create_graph, each_backend):
    whole = small_double_case(function, residual=True, activation=activation)
    given = tuple(whole.leaves())
    expected = gradients(composed(whole), operands(whole))
    for count in range(len(given)):
        for frozen in itertools.combinations(given, count):
            case = replace(whole, frozen=frozen)
            tensors = operands(case)
            outputs = fused(case)(*tensors.values())
            torchs = composed(case)(*tensors.values())
            assert [output.requires_grad for output in outputs] == [output.requires_grad for output in torchs]
            wanted = [name for name in given if name not in frozen]
            found = torch.autograd.grad(scalar(outputs), [tensors[name] for name in wanted], create_graph=create_graph)
            for name, gradient in zip(wanted, found, strict=True):
                torch.testing.assert_close(gradient.detach(), expected[name], msg=lambda m, n=name: f"d{n}: {m}")


@functions("instance_norm", "add_group_norm")
def test_nothing_is_computed_that_is_not_asked_for(function, triton_backend, family_calls):
    """A gradient that nobody requires is neither allocated nor computed, and one that is at hand launches nothing."""
    for activation in (None, "relu", "gelu"):
        whole = small_double_case(function, residual=True, activation=activation)
        for wanted in whole.leaves():
            family_calls.clear()
            case = replace(whole, frozen=tuple(name for name in OPERANDS if name != wanted))
            gradients(fused(case), operands(case))
            launched = [call.result for call in family_calls if call.direction == "backward"]
            if wanted == "residual" and not case.adds_first and activation is None:
                assert not launched, "dresidual is dy"
                continue
            (computed,) = launched
            # Where the residual is added first its gradient is x's, and goes by that name.
            one = "x" if case.adds_first and wanted == "residual" else wanted
            computed = {name: gradient is not None for name, gradient in computed._asdict().items()}
            assert computed == {f"d{name}": name == one for name in OPERANDS}, (activation, wanted)


@add_functions("add_instance_norm", "add_group_norm")
def test_the_gradient_of_an_unused_output_is_not_made_up(function, triton_backend, family_calls):
    """No zeros are allocated, added or read for it, and where total alone was used its gradient is handed on."""
    case = small_double_case(function, activation="gelu")

    tensors = operands(case)
    y, _ = fused(case)(*tensors.values())
    torch.autograd.grad(y.sum(), list(tensors.values()))
    assert [(call.direction, call.args[1] is None) for call in family_calls[1:]] == [("backward", True)]

    _, total = fused(case)(*tensors.values())
    family_calls.clear()
    arriving = torch.ones_like(total)
    found = torch.autograd.grad(total, list(tensors.values()), arriving, allow_unused=True)
    assert not family_calls
    assert [gradient is None for gradient in found] == [name in ("weight", "bias") for name in tensors]
    assert found[0].data_ptr() == found[1].data_ptr() == arriving.data_ptr()


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("function", ROW_FUNCTIONS)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_one_tensor_in_two_places_gets_both_gradients(function, activation, dims, each_backend):
    case = make_double_case(function, *(3, 4, 5)[-dims - 1 :], dims=dims, residual=True, activation=activation)

    def twice(call):
        def function(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            tensors = {"x": x, "residual": x, "weight": weight, "bias": weight}
            return call(case)(*(tensors[name] for name in case.leaves()))

        return function

    tensors = {name: tensor for name, tensor in operands(case).items() if name in ("x", "weight")}
    torch.testing.assert_close(gradients(twice(fused), tensors), gradients(twice(composed), tensors))
    assert gradgradcheck(twice(fused), tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_gradients_pass_through_a_residual_stream(activation, each_backend):
    """Two blocks of a pre-norm Transformer: the total of one is the residual of the next."""
    case = make_double_case("add_layer_norm", 3, 6, activation=activation)

    def stream(call):
        def function(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
            y, total = call(case)(x, residual, weight, bias)
            y, total = call(case)(y.tanh(), total, weight, bias)
            return call(case)(y.tanh(), total, weight, bias)

        return function

    tensors = operands(case)
    torch.testing.assert_close(gradients(stream(fused), tensors), gradients(stream(composed), tensors))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize(("shape", "dims"), [((0, 4), 1), ((2, 0, 3, 4), 2), ((3, 0), 1), ((0, 0), 1)])
@pytest.mark.parametrize("function", ROW_FUNCTIONS)
def test_empty_tensors_have_empty_or_zero_gradients(function, shape, dims, activation, create_graph, each_backend):
    case = make_double_case(function, *shape, dims=dims, residual=True, activation=activation)
    tensors = operands(case)
    outputs = fused(case)(*tensors.values())
    assert [output.shape for output in outputs] == [torch.Size(shape)] * len(outputs)
    found = torch.autograd.grad(scalar(outputs), list(tensors.values()), create_graph=create_graph)
    for tensor, gradient in zip(tensors.values(), found, strict=True):
        assert gradient.shape == tensor.shape and not gradient.any()


@add_functions("add_instance_norm")
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_create_graph_changes_no_gradient_of_mixed_types(function, half, triton_backend):
    case = small_case(function, 4, 6, dtype=half, parameters=torch.float32, activation="silu")
    case = replace(case, residual=case.residual.float())
    tensors = operands(case)
    loss = scalar(fused(case)(*tensors.values()))
    plain, differentiable = (
        torch.autograd.grad(loss, list(tensors.values()), retain_graph=True, create_graph=create_graph)
        for create_graph in (False, True)
    )
    assert [g.dtype for g in differentiable] == [g.dtype for g in plain] == [t.dtype for t in tensors.values()]
    torch.testing.assert_close([gradient.detach() for gradient in differentiable], list(plain))


def test_vmap_over_the_backward_of_a_call_outside_it(each_backend):
    case = make_double_case("add_layer_norm", 2, 4, activation="gelu")
    tensors = operands(case)

    def rows_of_the_jacobian(call) -> Tensor:
        y, _ = call(case)(*tensors.values())
        basis = torch.eye(y.numel(), dtype=y.dtype, device=DEVICE).view(-1, *y.shape)
        return torch.vmap(lambda dy: torch.autograd.grad(y, tensors["x"], dy)[0])(basis)

    torch.testing.assert_close(rows_of_the_jacobian(fused), rows_of_the_jacobian(composed))
