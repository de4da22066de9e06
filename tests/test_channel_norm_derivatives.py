"""Derivatives, transforms and compilers of the group and instance norms that torch's functions compose."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as TF
from torch import func
from torch.autograd import gradcheck, gradgradcheck

from fused_ops import functional as F
from tests.calls import scalar
from tests.channel_norm_calls import FUNCTIONS, LAYOUTS, call, composed, gradients, tensors
from tests.norm_cases import DEVICE, normal

Tensor = torch.Tensor

pytestmark = [
    pytest.mark.one_in(8),
    pytest.mark.usefixtures("torch_backend"),
    # torch's own, as it first loads forward-mode differentiation or a compiler.
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]

every_function = pytest.mark.parametrize("function", FUNCTIONS)


# --- derivatives ---------------------------------------------------------------------------------------------------


@every_function
@pytest.mark.parametrize("activation", [None, "tanh", "gelu"])
@pytest.mark.parametrize("affine", [True, False])
def test_derivatives_up_to_the_third_are_those_of_finite_differences(function, activation, affine):
    """The third of torch's instance_norm are not (seen in torch 2.13)."""
    leaves = [leaf for leaf in tensors(2, 4, 3, affine=affine) if leaf is not None]
    run = call(function, 2, activation)
    assert gradcheck(run, leaves, fast_mode=True, check_batched_grad=True, check_forward_ad=True)
    assert gradgradcheck(run, leaves, fast_mode=True)

    def slopes(*leaves: Tensor) -> tuple[Tensor, ...]:
        return gradients(run(*leaves), list(leaves), create_graph=True)

    assert gradgradcheck(slopes, leaves, fast_mode=True)


@pytest.mark.parametrize("function", ["instance_norm", "add_instance_norm"])
def test_derivatives_by_running_statistics(function):
    statistics = {
        "running_mean": normal(4, dtype=torch.float64),
        "running_var": normal(4, dtype=torch.float64).square(),
    }
    run = call(function, activation="gelu", use_input_stats=False, **statistics)
    leaves = tensors(2, 4, 3)
    assert gradcheck(run, leaves, fast_mode=True, check_batched_grad=True, check_forward_ad=True)
    assert gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("create_graph", [False, True])
@every_function
def test_only_what_requires_a_gradient_has_one(function, create_graph):
    whole = tensors(2, 4, 3)
    expected = gradients(composed(function, 2, "gelu")(*whole), whole)
    for wanted in itertools.product((False, True), repeat=4):
        if not any(wanted):
            continue
        leaves = [leaf.detach().requires_grad_(need) for leaf, need in zip(whole, wanted, strict=True)]
        outputs = call(function, 2, "gelu")(*leaves)
        asked = [leaf for leaf in leaves if leaf.requires_grad]
        found = torch.autograd.grad(scalar(outputs), asked, create_graph=create_graph)
        of_those = [g for g, need in zip(expected, wanted, strict=True) if need]
        torch.testing.assert_close([g.detach() for g in found], of_those)


@every_function
@pytest.mark.parametrize("shape", [(0, 6, 4), (2, 0, 4), (2, 6, 0), (2, 6, 0, 3), (0, 6, 0)])
def test_empty_tensors_have_empty_or_zero_gradients(function, shape):
    leaves = tensors(*shape)
    outputs = call(function, 3, "gelu")(*leaves)
    assert [output.shape for output in outputs] == [torch.Size(shape)] * len(outputs)
    for leaf, gradient in zip(leaves, gradients(outputs, leaves), strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()


TRANSFORMS = {
    "grad": lambda run: func.grad(lambda *t: scalar(run(*t)), argnums=(0, 1, 2, 3)),
    "grad of grad": lambda run: func.grad(lambda *t: scalar((func.grad(lambda *t: scalar(run(*t)))(*t),))),
    "vjp": lambda run: lambda *t: func.vjp(run, *t)[1](run(*t)),
    "jacrev": lambda run: func.jacrev(run, argnums=(0, 2)),
    "jacfwd": lambda run: func.jacfwd(run, argnums=(0, 2)),
    "hessian": lambda run: func.hessian(lambda *t: scalar(run(*t))),
    "jvp": lambda run: lambda *t: func.jvp(run, t, tuple(x.cos() for x in t)),
    "functionalize": lambda run: func.functionalize(run),
    "vmap of grad": lambda run: (
        lambda x, residual, weight, bias: func.vmap(
            func.grad(lambda x, residual: scalar(run(x, residual, weight, bias)))
        )(torch.stack([x, x.cos()]), torch.stack([residual, 2 * residual]))
    ),
    "vmap over weights": lambda run: (
        lambda x, residual, weight, bias: func.vmap(run, (None, None, 0, 0))(
            x, residual, torch.stack([weight, 2 * weight]), torch.stack([bias, bias.cos()])
        )
    ),
    "vmap over residuals": lambda run: (
        lambda x, residual, weight, bias: func.vmap(run, (None, 0, None, None))(
            x, torch.stack([residual, residual.cos()]), weight, bias
        )
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@every_function
def test_a_transform_gives_what_it_gives_of_the_formula(function, activation, transform):
    leaves = [leaf.detach() for leaf in tensors(2, 4, 3)]
    runs = (made(function, 2, activation) for made in (call, composed))
    torch.testing.assert_close(*(TRANSFORMS[transform](run)(*leaves) for run in runs))


# --- autocast, compilers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["add_group_norm", "instance_norm"])
def test_a_compiled_function_is_one_graph_for_every_batch(function):
    torch._dynamo.reset()
    run = call(function, 2, "gelu")
    compiled = torch.compile(run, backend="aot_eager", dynamic=True, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (6, 7, 17):
            leaves = tensors(batch, 4, 5, 3)
            outputs, expected = compiled(*leaves), run(*leaves)
            torch.testing.assert_close(outputs, expected)
            torch.testing.assert_close(gradients(outputs, leaves), gradients(expected, leaves))
    torch._dynamo.reset()


@pytest.mark.parametrize("layout", ["channels_last", "reversed dims", "strided"])
@pytest.mark.parametrize("function", ["group_norm", "add_instance_norm"])
def test_a_compiled_function_keeps_the_layout(function, layout):
    torch._dynamo.reset()
    x, residual, weight, bias = (tensor.detach() for tensor in tensors(2, 4, 5, 3))
    x = LAYOUTS[layout](x)
    run = call(function, 2, "gelu")
    outputs = torch.compile(run, backend="aot_eager", fullgraph=True)(x, residual, weight, bias)
    expected = run(x, residual, weight, bias)
    torch.testing.assert_close(outputs, expected)
    assert [output.stride() for output in outputs] == [output.stride() for output in expected]
    torch._dynamo.reset()


def test_the_batch_may_be_declared_dynamic():
    torch._dynamo.reset()
    x = normal(4, 6, 5, 3).requires_grad_()
    torch._dynamo.mark_dynamic(x, 0, min=2, max=1 << 20)
    compiled = torch.compile(
        lambda x: F.group_norm(x, 3, activation="relu") + F.instance_norm(x), backend="aot_eager", fullgraph=True
    )
    compiled(x).sum().backward()
    torch._dynamo.reset()


@pytest.mark.skipif(DEVICE.type != "cuda", reason="autocast leaves norms alone on a CPU")
@every_function
def test_autocast_gives_the_types_that_it_gives_of_torchs(function):
    x, residual, weight, bias = (tensor.detach().half() for tensor in tensors(2, 6, 4))
    with torch.autocast("cuda", dtype=torch.float16):
        y, *total = call(function)(x, residual, weight, bias)
        expected = TF.group_norm(x, 3) if "group" in function else TF.instance_norm(x)
    assert y.dtype == expected.dtype
    assert all(t.dtype == torch.float16 for t in total)
