"""Derivatives, transforms and compilers of batch norm, with the running statistics that move meanwhile."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import func
from torch.autograd import gradcheck, gradgradcheck

from fused_ops import functional as F
from tests.batch_norm_calls import call, composed, each_mode, every_function, statistics
from tests.calls import scalar
from tests.channel_norm_calls import LAYOUTS, gradients, tensors
from tests.norm_cases import DEVICE, normal

Tensor = torch.Tensor

# torch's own, as it first loads forward-mode differentiation or a compiler.
pytestmark = [pytest.mark.one_in(8), pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")]


@pytest.mark.one_in(6)
@each_mode
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", [None, "tanh"])
@pytest.mark.parametrize(
    "parameters", ["both", "bias", *(pytest.param(some, marks=pytest.mark.full) for some in ("weight", "neither"))]
)
@every_function
def test_derivatives_up_to_the_third_are_those_of_finite_differences(
    function, activation, parameters, layout, training, each_backend
):
    """The third of torch's batch_norm are not, in training, and without a weight but a bias the second fail (seen in
    torch 2.13)."""
    x, residual, weight, bias = tensors(2, 3, 3)
    x = LAYOUTS[layout](x.detach()).requires_grad_()
    names = [("x", x), ("residual", residual)]
    names += [("weight", weight)] * (parameters in ("both", "weight")) + [("bias", bias)] * (
        parameters in ("both", "bias")
    )
    leaves = [tensor for _, tensor in names]

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        found = dict(zip([name for name, _ in names], given, strict=True))
        return call(function, training, activation)(*(found.get(name) for name in ("x", "residual", "weight", "bias")))

    assert gradcheck(run, leaves, fast_mode=True, check_batched_grad=True, check_forward_ad=True)
    assert gradgradcheck(run, leaves, fast_mode=True)

    def slopes(*given: Tensor) -> tuple[Tensor, ...]:
        return gradients(run(*given), list(given), create_graph=True)

    assert gradgradcheck(slopes, leaves, fast_mode=True)


@each_mode
@pytest.mark.parametrize("create_graph", [False, True])
@every_function
def test_only_what_requires_a_gradient_has_one(function, create_graph, training, each_backend):
    whole = tensors(2, 4, 3)
    expected = gradients(composed(function, training, "gelu")(*whole), whole)
    for wanted in itertools.product((False, True), repeat=4):
        if not any(wanted):
            continue
        leaves = [leaf.detach().requires_grad_(need) for leaf, need in zip(whole, wanted, strict=True)]
        outputs = call(function, training, "gelu")(*leaves)
        asked = [leaf for leaf in leaves if leaf.requires_grad]
        found = torch.autograd.grad(scalar(outputs), asked, create_graph=create_graph)
        of_those = [g for g, need in zip(expected, wanted, strict=True) if need]
        torch.testing.assert_close([g.detach() for g in found], of_those)


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda run: func.grad(lambda *t: scalar(run(*t)), argnums=(0, 1, 2, 3)),
    "grad of grad": lambda run: func.grad(lambda *t: scalar((func.grad(lambda *t: scalar(run(*t)))(*t),))),
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
}


@each_mode
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("activation", [None, "gelu"])
@every_function
def test_a_transform_gives_what_it_gives_of_the_formula(function, activation, transform, training, each_backend):
    leaves = [leaf.detach() for leaf in tensors(2, 4, 3)]
    running = None if training else statistics(4)
    runs = (made(function, training, activation, running) for made in (call, composed))
    torch.testing.assert_close(*(TRANSFORMS[transform](run)(*leaves) for run in runs))


@pytest.mark.parametrize("transform", ["grad", "jvp", "hessian"])
def test_running_statistics_move_under_a_transform_as_torchs(transform, each_backend):
    leaves = [leaf.detach() for leaf in tensors(2, 4, 3)]
    moved = []
    for norm in (F.batch_norm, TF.batch_norm):
        running = statistics(4)

        def run(x: Tensor, *_: Tensor, norm: Any = norm, running: Any = running) -> tuple[Tensor]:
            return (norm(x, *running, training=True),)

        TRANSFORMS[transform](run)(*leaves)
        moved.append(running)
    torch.testing.assert_close(*moved)


def test_running_statistics_of_each_member_of_a_vmap(each_backend):
    x = normal(2, 3, 4, 5, dtype=torch.float64)
    shared, *each = statistics(4), *(tuple(torch.stack([t, 2 * t]) for t in statistics(4)) for _ in range(2))
    for norm, running in zip((F.batch_norm, TF.batch_norm), each, strict=True):
        func.vmap(functools.partial(norm, training=True))(x, *running)
        with pytest.raises(RuntimeError, match="track_running_stats"):  # which of them should the one follow?
            func.vmap(lambda x, norm=norm: norm(x, *shared, training=True))(x)
    torch.testing.assert_close(*each)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_function
def test_they_are_updated_by_a_compiled_function(function, dtype, each_backend):
    torch._dynamo.reset()
    run = functools.partial(call, function, True, "relu")
    compiled = torch.compile(lambda x, r, *s: run(running=s)(x, r), backend="aot_eager", fullgraph=True)
    ours, eager = statistics(4, torch.float32), statistics(4, torch.float32)
    for seed in range(2):
        leaves = tensors(2, 4, 5, dtype=dtype, seed=seed)[:2]
        results = [(out, gradients(out, leaves)) for out in (compiled(*leaves, *ours), run(running=eager)(*leaves))]
        torch.testing.assert_close(*results)
    torch.testing.assert_close(ours, eager)
    torch._dynamo.reset()


@pytest.mark.skipif(not torch.amp.autocast_mode.is_autocast_available(DEVICE.type), reason="no autocast here")
@each_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_function
def test_autocast_leaves_it_alone_as_it_leaves_torchs(function, dtype, training, each_backend):
    leaves = tensors(2, 4, 3, dtype=dtype)
    running = statistics(4, torch.float32), statistics(4, torch.float32)
    expected = call(function, training, running=running[0])(*leaves)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        outputs = call(function, training, running=running[1])(*leaves)
        of_torch = TF.batch_norm(leaves[0], *statistics(4, torch.float32), training=training)
    assert {output.dtype for output in outputs} == {of_torch.dtype} == {dtype}
    torch.testing.assert_close((outputs, running[1]), (expected, running[0]), rtol=0, atol=0)


def test_a_meta_tensor_has_a_meta_result(each_backend):
    x, mean, var = (torch.empty(shape, device="meta") for shape in ((2, 4, 3, 3), (4,), (4,)))
    x = x.to(memory_format=torch.channels_last)
    for training in (True, False):
        y, total = F.add_batch_norm(x, x, mean, var, training=training, activation="relu")
        for output in (y, total):
            assert output.is_meta and output.shape == x.shape and output.stride() == x.stride()


@pytest.mark.one_in(1)
@pytest.mark.usefixtures("each_backend")
def test_what_has_left_a_transform_learns():
    left = []
    func.grad(lambda x: (left.append(2 * x), x.sum())[1])(normal(4, 3, 5))
    (x,) = left
    assert torch._C._functorch.is_functorch_wrapped_tensor(x)
    found = []
    for of in (x, x.clone().detach()):
        weight, bias = (normal(3, seed=seed).requires_grad_() for seed in (1, 2))
        y = F.batch_norm(of, None, None, weight, bias, training=True, activation="gelu")
        found.append((y, *torch.autograd.grad(y.sum(), (weight, bias))))
    torch.testing.assert_close(*found)
