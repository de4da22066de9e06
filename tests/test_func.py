"""torch.func and forward-mode differentiation, which run the composition: equal to those of torch.nn.functional."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import func

import fused_ops
from fused_ops import functional as F
from tests.calls import composed, fused, operands, scalar
from tests.every_norm import FUNCTIONS, small_case
from tests.norm_cases import DEVICE, TORCH_ACTIVATIONS, normal
from tests.row_norm_cases import RowCase, make_case

Tensor = torch.Tensor

# torch's own, as it first loads forward-mode differentiation.
pytestmark = [pytest.mark.one_in(8), pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")]

CASES = [
    small_case(function, dtype=torch.float64, residual=True, activation=activation)
    for function, activation in itertools.product(FUNCTIONS, (None, "relu", "gelu"))
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.function}-{case.activation}")
each_case_of_rows = pytest.mark.parametrize(
    "case", [case for case in CASES if isinstance(case, RowCase)], ids=lambda case: f"{case.function}-{case.activation}"
)


def detached(case) -> tuple[Tensor, ...]:
    return tuple(tensor.detach() for tensor in operands(case).values())


TRANSFORMS = {
    "grad": lambda call: func.grad(lambda *t: scalar(call(*t)), argnums=(0, 1, 2)),
    "grad of grad": lambda call: func.grad(lambda *t: scalar((func.grad(lambda *t: scalar(call(*t)))(*t),))),
    "vjp": lambda call: lambda *t: func.vjp(call, *t)[1](call(*t)),
    "jacrev": lambda call: func.jacrev(call, argnums=(0, 2)),
    "jacfwd": lambda call: func.jacfwd(call, argnums=(0, 2)),
    "hessian": lambda call: func.hessian(lambda *t: scalar(call(*t))),
    "jvp": lambda call: lambda *t: func.jvp(call, t, tuple(x.cos() for x in t)),
    "functionalize": lambda call: func.functionalize(call),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@each_case
def test_a_transform_gives_what_it_gives_of_torchs(case, transform, each_backend):
    ours, torchs = (TRANSFORMS[transform](call(case))(*detached(case)) for call in (fused, composed))
    torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("activation", TORCH_ACTIVATIONS)
def test_every_activation_is_transformed(activation, each_backend):
    case = make_case("layer_norm", 3, 5, dtype=torch.float64, residual=True, activation=activation)
    for transform in (TRANSFORMS["jvp"], TRANSFORMS["grad of grad"], jacobian_of_each_row):
        torch.testing.assert_close(transform(fused(case))(*detached(case)), transform(reference(case))(*detached(case)))


def jacobian_of_each_row(call):
    return func.vmap(func.jacrev(call, 0), (0, 0, None, None))


def reference(case):
    """torch's functions, but for hardsigmoid, whose gradient torch cannot differentiate."""
    if case.activation != "hardsigmoid":
        return composed(case)
    linear = composed(replace(case, activation=None))
    return lambda *t: tuple(torch.nn.functional.relu6(z + 3) / 6 for z in linear(*t))


@each_case_of_rows
def test_vmap_over_samples_is_the_batched_call(case, each_backend):
    many = make_case(case.function, 3, 4, 5, dtype=torch.float64, residual=True, activation=case.activation)
    in_dims = (0, 0, None, None)[: len(operands(many))]
    torch.testing.assert_close(func.vmap(fused(case), in_dims)(*detached(many)), fused(many)(*detached(many)))


@each_case
@pytest.mark.parametrize("shared", ["x", "residual"])
def test_vmap_over_one_of_x_and_residual(case, shared, each_backend):
    """What has no batch cannot be added to in place what has one."""
    tensors = dict(zip(operands(case), detached(case), strict=True))
    other = "residual" if shared == "x" else "x"
    batch = torch.stack([tensors[other], 2 * tensors[other], tensors[other].cos()])
    in_dims = tuple(0 if name == other else None for name in tensors)
    mapped = func.vmap(fused(case), in_dims)(*{**tensors, other: batch}.values())
    for i, sample in enumerate(batch):
        alone = fused(case)(*{**tensors, other: sample}.values())
        torch.testing.assert_close(tuple(output[i] for output in mapped), alone)


@each_case
def test_vmap_over_weights_is_an_ensemble(case, each_backend):
    members = [small_case(case.function, dtype=torch.float64, residual=True, seed=seed) for seed in (0, 10, 20)]
    stacked = [torch.stack(tensors) for tensors in zip(*(detached(member) for member in members), strict=True)]
    x, residual = stacked[0][0], stacked[1][0]
    in_dims = (None, None, *([0] * (len(stacked) - 2)))
    ensemble = func.vmap(fused(case), in_dims)(x, residual, *stacked[2:])
    for i in range(len(members)):
        alone = fused(case)(x, residual, *(tensor[i] for tensor in stacked[2:]))
        torch.testing.assert_close(tuple(output[i] for output in ensemble), alone)


def test_gradients_for_each_sample_of_a_module(each_backend):
    """As in differential privacy: vmap of grad of functional_call."""
    module = fused_ops.AddRMSNorm(5, activation="silu", device=DEVICE, dtype=torch.float64)
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    x, residual = normal(4, 5, dtype=torch.float64), normal(4, 5, dtype=torch.float64, seed=1)

    def loss(parameters: dict[str, Tensor], x: Tensor, residual: Tensor) -> Tensor:
        return scalar(func.functional_call(module, parameters, (x, residual)))

    for_each = func.vmap(func.grad(loss), (None, 0, 0))(parameters, x, residual)
    for i in range(len(x)):
        (alone,) = torch.autograd.grad(loss(dict(module.named_parameters()), x[i], residual[i]), module.parameters())
        torch.testing.assert_close(for_each["weight"][i], alone)


@each_case
def test_dual_numbers_without_torch_func(case, each_backend):
    def tangents(call) -> list[Tensor]:
        with forward_ad.dual_level():
            duals = (forward_ad.make_dual(tensor, tensor.cos()) for tensor in detached(case))
            return [forward_ad.unpack_dual(output).tangent for output in call(case)(*duals)]

    torch.testing.assert_close(tangents(fused), tangents(composed))


@each_case
def test_the_kernels_run_again_after_a_transform(case, triton_backend, family_calls):
    """A transform leaves nothing behind that would keep later calls from them."""
    TRANSFORMS["grad"](fused(case))(*detached(case))
    with forward_ad.dual_level():
        pass
    assert not family_calls
    fused(case)(*detached(case))
    assert family_calls


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_tensor_that_has_left_a_transform_is_normalized(requires_grad, each_backend):
    """It still wears the transform's wrapper, which torch's functions take off, and in which no kernel finds memory."""
    left = []

    def square(x):
        left.append(x * 2)
        return x.square().sum()

    x = torch.arange(16.0, device=DEVICE).view(2, 8)
    func.grad(square)(x)
    weight = torch.ones(8, device=DEVICE, requires_grad=requires_grad)
    y = F.layer_norm(left[0], (8,), weight)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(2 * x, (8,), weight))
