"""Derivatives, transforms and compilers of switchable norm, and what it keeps for them."""

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
from tests.calls import recorded, scalar
from tests.channel_norm_calls import LAYOUTS
from tests.norm_cases import DEVICE, normal
from tests.switch_norm_calls import call, composed, each_mode, every_function, gradients, statistics, tensors

Tensor = torch.Tensor

pytestmark = [
    pytest.mark.one_in(8),
    pytest.mark.usefixtures("torch_backend"),
    # torch's own, as it first loads forward-mode differentiation or a compiler.
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]


@each_mode
@pytest.mark.parametrize(("activation", "affine"), [("tanh", True), (None, False)])
@pytest.mark.parametrize(
    ("shape", "layout"), [((3, 4), "contiguous"), ((2, 3, 3), "contiguous"), ((2, 3, 3), "channels_last")], ids=str
)
@every_function
def test_derivatives_up_to_the_third_are_those_of_finite_differences(
    function, shape, layout, activation, affine, training
):
    leaves = tensors(*shape, affine=affine)
    leaves["x"] = LAYOUTS[layout](leaves["x"].detach()).requires_grad_()
    running = (None, None) if training else statistics(shape[1])

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        return call(function, training, activation, running)(**dict(zip(leaves, given, strict=True)))

    given = list(leaves.values())
    assert gradcheck(run, given, fast_mode=True, check_batched_grad=True, check_forward_ad=True)
    assert gradgradcheck(run, given, fast_mode=True)

    def slopes(*given: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(scalar(run(*given)), given, create_graph=True)

    assert gradgradcheck(slopes, given, fast_mode=True)


@each_mode
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 3)], ids=str)
@every_function
def test_only_what_requires_a_gradient_has_one(function, shape, create_graph, training):
    whole = tensors(*shape)
    expected = gradients(composed(function, training, "gelu")(**whole), whole)
    for wanted in itertools.product((False, True), repeat=len(whole)):
        if not any(wanted):
            continue
        leaves = {
            name: leaf.detach().requires_grad_(need) for (name, leaf), need in zip(whole.items(), wanted, strict=True)
        }
        outputs = call(function, training, "gelu")(**leaves)
        asked = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        found = gradients(outputs, asked, create_graph=create_graph)
        of_those = [gradient for gradient, need in zip(expected, wanted, strict=True) if need]
        torch.testing.assert_close([gradient.detach() for gradient in found], of_those)


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda run: func.grad(lambda *t: scalar(run(*t)), argnums=tuple(range(6))),
    "grad of grad": lambda run: func.grad(lambda *t: scalar((func.grad(lambda *t: scalar(run(*t)))(*t),))),
    "jacrev": lambda run: func.jacrev(run, argnums=(0, 4)),
    "jacfwd": lambda run: func.jacfwd(run, argnums=(0, 5)),
    "hessian": lambda run: func.hessian(lambda *t: scalar(run(*t))),
    "jvp": lambda run: lambda *t: func.jvp(run, t, tuple(x.cos() for x in t)),
    "functionalize": lambda run: func.functionalize(run),
    "vmap of grad": lambda run: (
        lambda x, *others: func.vmap(func.grad(lambda x: scalar(run(x, *others))))(torch.stack([x, x.cos()]))
    ),
    "vmap over parameters": lambda run: (
        lambda x, residual, *others: func.vmap(run, (None, None, 0, 0, 0, 0))(
            x, residual, *(torch.stack([tensor, tensor.cos()]) for tensor in others)
        )
    ),
}


@each_mode
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 3)], ids=str)
@every_function
def test_a_transform_gives_what_it_gives_of_the_formula(function, shape, transform, training):
    leaves = {name: leaf.detach() for name, leaf in tensors(*shape).items()}
    running, results = (None, None) if training else statistics(4), []
    for made in (call, composed):
        norm = made(function, training, "gelu", running)

        def run(*given: Tensor, norm: Any = norm) -> tuple[Tensor, ...]:
            return norm(**dict(zip(leaves, given, strict=True)))

        results.append(TRANSFORMS[transform](run)(*leaves.values()))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("transform", ["grad", "jvp", "hessian"])
def test_running_statistics_move_under_a_transform_as_batch_norms(transform):
    leaves = {name: leaf.detach() for name, leaf in tensors(2, 4, 3).items()}
    ours, torchs = statistics(4), statistics(4)

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        return call("switch_norm", running=ours)(**dict(zip(leaves, given, strict=True)))

    TRANSFORMS[transform](run)(*leaves.values())
    TRANSFORMS[transform](lambda x, *_: (TF.batch_norm(x, *torchs, training=True),))(*leaves.values())
    torch.testing.assert_close(ours, torchs)


def test_running_statistics_of_each_member_of_a_vmap():
    x, shares = normal(2, 3, 4, 5, dtype=torch.float64), normal(3, dtype=torch.float64)
    ours, torchs = (tuple(torch.stack([t, 2 * t]) for t in statistics(4)) for _ in range(2))

    def run(x: Tensor, *running: Tensor) -> Tensor:
        return F.switch_norm(x, *running, None, None, shares, shares, training=True)

    func.vmap(run)(x, *ours)
    func.vmap(functools.partial(TF.batch_norm, training=True))(x, *torchs)
    torch.testing.assert_close(ours, torchs)
    shared = statistics(4)
    with pytest.raises(RuntimeError, match="track_running_stats"):  # which of them should the one follow?
        func.vmap(lambda x: run(x, *shared))(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_function
def test_a_compiled_function_is_the_function(function, dtype):
    torch._dynamo.reset()
    names = list(tensors(2, 4, 5))

    def run(mean: Tensor, var: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        return call(function, True, "relu", (mean, var))(**dict(zip(names, given, strict=True)))

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    ours, eager = statistics(4, torch.float32), statistics(4, torch.float32)
    for _ in range(2):
        leaves, results = tensors(2, 4, 5, dtype=dtype), []
        for one, running in ((compiled, ours), (run, eager)):
            outputs = one(*running, *leaves.values())
            results.append((outputs, gradients(outputs, leaves)))
        loose = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(*results, **loose)
    torch.testing.assert_close(ours, eager)
    torch._dynamo.reset()


@pytest.mark.skipif(not torch.amp.autocast_mode.is_autocast_available(DEVICE.type), reason="no autocast here")
@each_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_function
def test_autocast_leaves_it_alone_as_it_leaves_batch_norm(function, dtype, training):
    leaves = tensors(2, 4, 3, dtype=dtype)
    running = statistics(4, torch.float32), statistics(4, torch.float32)
    expected = call(function, training, running=running[0])(**leaves)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        outputs = call(function, training, running=running[1])(**leaves)
    assert {output.dtype for output in outputs} == {dtype}
    torch.testing.assert_close((outputs, running[1]), (expected, running[0]), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(4, 6), (2, 6, 3, 3)], ids=str)
def test_a_meta_tensor_has_a_meta_result(shape):
    leaves = {name: leaf.detach().to("meta") for name, leaf in tensors(*shape).items()}
    if len(shape) == 4:
        leaves["x"] = leaves["x"].to(memory_format=torch.channels_last)
    running = tuple(tensor.to("meta") for tensor in statistics(6))
    for training in (True, False):
        for output in call("add_switch_norm", training, "relu", running)(**leaves):
            assert output.is_meta and output.shape == shape and output.stride() == leaves["x"].stride()


# --- what is kept --------------------------------------------------------------------------------------------------


def kept_bytes(run: Callable[[], Any], leaves: dict[str, Tensor]) -> int:
    """But for parameters, which live in any case."""
    with recorded() as kept:
        _outputs = run()
    living = {leaf.data_ptr() for name, leaf in leaves.items() if name not in ("x", "residual")}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in kept}
    return sum(storage.nbytes() for address, storage in storages.items() if address not in living)


@each_mode
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("shape", [(4, 6), (2, 6, 1), (2, 6, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_function
def test_no_more_is_kept_than_by_torchs_composition(function, dtype, shape, activation, affine, training):
    leaves, running = tensors(*shape, dtype=dtype, affine=affine), statistics(6, torch.float32)
    ours, torchs = (
        kept_bytes(functools.partial(made(function, training, activation, running), **leaves), leaves)
        for made in (call, composed)
    )
    assert 0 < ours <= torchs


@each_mode
def test_x_and_three_numbers_a_plane_are_kept(training):
    leaves = {name: leaf for name, leaf in tensors(2, 6, 8, 8, dtype=torch.float32).items() if name != "residual"}
    running = statistics(6, torch.float32)
    kept = kept_bytes(lambda: call("switch_norm", training, running=running)(**leaves), leaves)
    assert kept == 4 * (2 * 6 * 8 * 8 + 3 * 2 * 6 + (0 if training else 2 * 6))


@each_mode
def test_x_is_kept_only_for_who_needs_it(training):
    leaves = {name: leaf.detach() for name, leaf in tensors(2, 6, 8, 8).items() if name != "residual"}
    leaves["bias"].requires_grad_()
    assert kept_bytes(lambda: call("switch_norm", training)(**leaves), leaves) == 0
