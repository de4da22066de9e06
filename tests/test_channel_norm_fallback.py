"""Group and Instance normalization as torch's functions compose them: its numbers, and right where its own are not."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as TF

from fused_ops import functional as F
from tests.calls import recorded, scalar
from tests.channel_norm_calls import (
    FUNCTIONS,
    LAYOUTS,
    adds_first,
    call,
    channels_last,
    composed,
    gradients,
    order,
    tensors,
)
from tests.norm_cases import DEVICE, HALF, TORCH_ACTIVATIONS, normal, same_bits
from tests.tolerances import assert_within_budget

Tensor = torch.Tensor

pytestmark = [pytest.mark.one_in(8), pytest.mark.usefixtures("torch_backend")]

every_function = pytest.mark.parametrize("function", FUNCTIONS)


def fresh_statistics(channels: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """running_mean and running_var as a module starts with them."""
    return torch.zeros(channels, dtype=dtype, device=DEVICE), torch.ones(channels, dtype=dtype, device=DEVICE)


# --- numbers -------------------------------------------------------------------------------------------------------

SHAPES = [(2, 6, 4), (1, 30, 49), (2, 6, 7, 7), (1, 6, 5, 3), (2, 3, 2, 3, 4), (3, 6, 1, 2), (2, 30, 1, 9)]
FLAT = [(2, 6), (5, 30), (1, 6)]  # group norm alone takes planes of one element


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize(
    ("function", "shape"),
    [(f, shape) for f in FUNCTIONS for shape in (*SHAPES, *(FLAT if "group" in f else []))],
)
def test_values_and_gradients_are_those_of_the_formula(function, shape, activation, affine):
    groups = 3
    if shape[:2] == (1, 6) and len(shape) == 2:
        groups = 2
    ours, formula = tensors(*shape, affine=affine), tensors(*shape, affine=affine)
    outputs, expected = call(function, groups, activation)(*ours), composed(function, groups, activation)(*formula)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(gradients(outputs, ours), gradients(expected, formula))


@pytest.mark.parametrize("groups", [1, 2, 5, 15, 30])
def test_group_norm_is_torchs(groups):
    x, _, weight, bias = tensors(2, 30, 7, 7)
    expected = TF.group_norm(x, groups, weight, bias, 0.5)
    torch.testing.assert_close(F.group_norm(x, groups, weight, bias, 0.5), expected)


def test_instance_norm_is_torchs():
    x, _, weight, bias = tensors(2, 6, 7, 7)
    torch.testing.assert_close(
        F.instance_norm(x, None, None, weight, bias, eps=0.5), TF.instance_norm(x, None, None, weight, bias, eps=0.5)
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("mean", "dtype"), [(1e1, torch.float32), (1e4, torch.float32), (10, torch.float16), (10, torch.bfloat16)]
)
@pytest.mark.parametrize("function", ["group_norm", "instance_norm"])
def test_a_large_mean_costs_no_more_digits_than_torchs_own(function, mean, dtype, layout):
    """In channels_last torch's group_norm takes E[x^2] - E[x]^2 on a CPU, and is off by thousands at a mean of 1e4."""
    x, residual, weight, bias = tensors(2, 8, 16, 16, dtype=dtype)
    moved = (x.detach() + mean).contiguous(memory_format=layout).requires_grad_()
    wide = moved.detach().double().requires_grad_(), *(t.detach().double().requires_grad_() for t in (weight, bias))
    eager = moved.detach().contiguous().requires_grad_(), *(t.detach().requires_grad_() for t in (weight, bias))
    torchs = functools.partial(TF.group_norm, num_groups=2) if function == "group_norm" else TF.instance_norm
    given = []
    for leaves, norm in (
        ((moved, weight, bias), lambda x, w, b: call(function, 2)(x, None, w, b)[0]),
        (eager, lambda x, w, b: torchs(x, weight=w, bias=b)),
        (wide, lambda x, w, b: composed(function, 2)(x, None, w, b)[0]),
    ):
        y = norm(*leaves)
        given.append((y, *torch.autograd.grad(y, leaves, residual.detach().to(y.dtype))))
    for name, actual, of_torch, expected in zip(("y", "dx", "dweight", "dbias"), *given, strict=True):
        terms = 512 if name in ("dweight", "dbias") else 1
        assert_within_budget(f"{function} {name}", actual, of_torch, expected.detach().numpy(force=True), terms)


# How channels_last comes about: the usual ways beside its own.
IMAGES = {
    "channels_last": lambda n: channels_last(normal(n, 8, 5, 7)),
    "channels_last_3d": lambda n: channels_last(normal(n, 8, 3, 4, 5)),
    "one of a batch": lambda n: channels_last(normal(n + 1, 8, 5, 7))[1][None],
    "from rows of pixels": lambda n: normal(5, 7, 8).permute(2, 0, 1)[None],
    "expanded": lambda n: channels_last(normal(1, 8, 5, 7)).expand(n, -1, -1, -1),
    "a sequence": lambda n: normal(n, 6, 8).transpose(1, 2).unsqueeze(3),
    "a transposed image": lambda n: channels_last(normal(n, 8, 5, 7)).transpose(2, 3),
}


@pytest.mark.one_in(1)
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("layout", IMAGES)
def test_group_norm_of_channels_last_however_it_comes_about(layout, samples):
    x = IMAGES[layout](samples).requires_grad_()
    weight, bias = normal(16, seed=1)[::2].requires_grad_(), normal(1, seed=2).expand(8).requires_grad_()
    found = []
    for leaves, function in (
        ((x, weight, bias), F.group_norm),
        ([leaf.detach().double().contiguous().requires_grad_() for leaf in (x, weight, bias)], TF.group_norm),
    ):
        y = function(leaves[0], 2, *leaves[1:])
        found.append((y.double(), *(gradient.double() for gradient in torch.autograd.grad(y.square().sum(), leaves))))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert found[0][0].shape == x.shape


@pytest.mark.one_in(1)
@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU torch makes a copy, as the composition does")
@pytest.mark.parametrize(
    ("shape", "deviation", "mean", "torchs"),
    [
        ((2, 8, 5, 7), 1.0, 1.0, True),
        ((2, 8, 3, 4, 5), 1.0, 1.0, True),
        ((2, 8, 5, 7), 1.0, 1e3, False),
        ((2, 8, 5, 7), 1e17, 1e19, False),  # squares overflow, and leave an rstd of 0
        ((1, 4, 128, 128), 1.0, 1.0, False),
    ],
    ids=str,
)
def test_channels_last_takes_torchs_own_pass_but_where_it_is_inexact(shape, deviation, mean, torchs):
    x, _, weight, bias = (tensor.detach() for tensor in tensors(*shape, dtype=torch.float32))
    x[-1, 2:4] = x[-1, 2:4] * deviation + mean  # of one group of one sample
    x = channels_last(x)
    groups = shape[1] // 2
    y, expected = F.group_norm(x, groups, weight, bias), TF.group_norm(x, groups, weight, bias)
    assert torch.equal(y, expected) == torchs
    wide = TF.group_norm(x.double(), groups, weight.double(), bias.double())
    torch.testing.assert_close(y.double(), wide, rtol=1e-5, atol=5e-4)  # of a mean of a thousand deviations
    assert y.stride() == x.stride()


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "weight bias", "x weight", "x bias"])
@pytest.mark.parametrize("learns", [False, True])
def test_some_gradients_of_channels_last(wanted, learns):
    """With those of weight or bias alone torch's own pass ends the process."""
    x, _, weight, bias = (tensor.detach() for tensor in tensors(2, 8, 5, 7))
    leaves = {"x": x, "weight": weight, "bias": bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(learns or name in wanted.split())
    inputs = [leaves[name] for name in wanted.split()]
    dy, found = normal(2, 8, 5, 7, dtype=x.dtype, seed=5), []
    for of_x in (lambda x: x, channels_last):
        y = F.group_norm(of_x(x), 2, weight, bias, activation="silu")
        first = torch.autograd.grad(y, inputs, dy, create_graph=True)
        again = torch.autograd.grad(sum(each.square().sum() for each in first), inputs, allow_unused=True)
        y = F.group_norm(of_x(x), 2, weight, bias, activation="silu")
        found.append((torch.autograd.grad(y, inputs, dy), first, [each for each in again if each is not None]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("samples_dim", [0, 1])
def test_group_norm_of_samples_under_vmap(samples_dim):
    x, weight, bias = normal(2, 3, 8, 4, 4), normal(8, seed=1), normal(8, seed=2)
    for given in (x, x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)):
        y = torch.func.vmap(lambda a: F.group_norm(a, 2, weight, bias), in_dims=samples_dim)(given)
        batches = given.movedim(samples_dim, 0)
        torch.testing.assert_close(y, torch.stack([TF.group_norm(a, 2, weight, bias) for a in batches]))


@every_function
@pytest.mark.parametrize("x_dtype", [*HALF, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, None], ids=str)
@pytest.mark.parametrize("bias_dtype", [torch.bfloat16, torch.float32, None], ids=str)
def test_every_mixture_of_types_returns_xs(function, x_dtype, weight_dtype, bias_dtype):
    x, residual, *_ = tensors(2, 6, 4, dtype=x_dtype)
    weight, bias = (
        None if dtype is None else normal(6, dtype=dtype, seed=seed).requires_grad_()
        for seed, dtype in enumerate((weight_dtype, bias_dtype))
    )
    leaves = [x, residual, weight, bias]
    outputs = call(function)(*leaves)
    assert {output.dtype for output in outputs} == {x_dtype}
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if x_dtype in HALF else {}
    torch.testing.assert_close(outputs, composed(function)(*leaves), **tolerance)
    given = [leaf for leaf in leaves if leaf is not None]
    assert [g.dtype for g in gradients(outputs, leaves)] == [leaf.dtype for leaf in given]


@pytest.mark.parametrize("function", ["add_group_norm", "add_instance_norm"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_float32_residual_makes_a_float32_total(function, dtype):
    x, _, weight, bias = tensors(2, 6, 4, dtype=dtype)
    residual = normal(2, 6, 4, seed=9).requires_grad_()
    y, total = call(function)(x, residual, weight, bias)
    assert (y.dtype, total.dtype) == (dtype, torch.float32) and torch.equal(total, residual + x)
    dx, dresidual = torch.autograd.grad(scalar((y, total)), (x, residual))
    assert (dx.dtype, dresidual.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize("activation", TORCH_ACTIVATIONS)
def test_every_activation_is_torchs(activation):
    leaves = tensors(2, 6, 4)
    for function in ("instance_norm", "add_group_norm"):
        expected = composed(function, activation=activation)(*leaves)
        torch.testing.assert_close(call(function, activation=activation)(*leaves), expected)


@every_function
def test_nan_and_infinity_stay_in_their_group(function):
    x, residual, weight, bias = (tensor.detach() for tensor in tensors(2, 6, 4))
    x[0, 0, 0], x[1, 5, 0] = torch.nan, torch.inf
    y, expected = (run(function)(x, residual, weight, bias)[0] for run in (call, composed))
    assert y.isnan().any() and y.isfinite().any()
    torch.testing.assert_close(y, expected, equal_nan=True)


# --- layouts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "stored"), [*((f, False) for f in FUNCTIONS), ("instance_norm", True), ("add_instance_norm", True)]
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 4), (2, 6, 3, 4), (2, 6, 2, 3, 4), (1, 6, 3, 4), (2, 1, 3, 4), (2, 6, 1, 4)])
def test_the_layout_in_is_the_layout_out(function, stored, layout, shape):
    statistics: dict[str, Any] = {}
    if stored:
        running = zip(("running_mean", "running_var"), fresh_statistics(shape[1]), strict=True)
        statistics = dict(running, use_input_stats=False)
    x, residual, weight, bias = (tensor.detach() for tensor in tensors(*shape))
    groups = min(3, shape[1])
    x = LAYOUTS[layout](x)
    expected = call(function, groups, **statistics)(x.contiguous(), residual, weight, bias)
    before = x.clone()
    for other in (residual, LAYOUTS[layout](residual), channels_last(residual)):
        for needs in (False, True):
            leaf = x.detach().requires_grad_(needs)
            outputs = call(function, groups, "relu", **statistics)(leaf, other, weight, bias)
            if other is residual:
                torch.testing.assert_close(outputs[0], expected[0].relu())
            if adds_first(function) and 0 in x.stride():
                continue  # whose order of dims is the residual's to decide
            for output in outputs:
                assert order(output) == order(torch.empty_like(x)), (output.stride(), x.stride())
    assert same_bits(x, before)


DY_LAYOUTS = ("contiguous", "channels_last", "strided", "expanded over samples", "expanded over space")


@pytest.mark.parametrize("function", ["group_norm", "instance_norm"])
@pytest.mark.parametrize("dy_layout", DY_LAYOUTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("shape", [(1, 4, 9), (1, 4, 5, 6), (2, 4, 5, 6), (1, 4, 3, 5, 6), (2, 4, 3, 5, 6)])
def test_dy_may_have_another_layout(function, shape, layout, dy_layout):
    """With a batch of one and a dy in channels_last or channels_last_3d, torch's own instance_norm gives a dx that is
    off by 4 on normal data (seen in torch 2.13, on a CPU)."""
    x, dy, weight, bias = (tensor.detach() for tensor in tensors(*shape))
    leaves = [LAYOUTS[layout](x).requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    dy = LAYOUTS[dy_layout](dy)
    found, expected = (
        torch.autograd.grad(run(function, 2)(leaves[0], None, *leaves[1:])[0], leaves, dy) for run in (call, composed)
    )
    torch.testing.assert_close(found, expected)


@every_function
@pytest.mark.parametrize("activation", [None, "relu", "silu", "softplus"])
@pytest.mark.parametrize("needs", [False, True])
def test_no_argument_is_changed(function, activation, needs):
    """y is finished in place, and must be no other tensor's memory: not where types, layouts and copies are trivial."""
    for dtype, shape in itertools.product((torch.float32, torch.float64), ((1, 4, 2), (2, 4, 3, 3))):
        given = [tensor.detach().requires_grad_(needs) for tensor in tensors(*shape, dtype=dtype)]
        before = [tensor.clone() for tensor in given]
        statistics = fresh_statistics(4, dtype)
        call(function, 2, activation)(*given)
        if "instance" in function:
            stored = dict(zip(("running_mean", "running_var"), statistics, strict=True), use_input_stats=False)
            call(function, activation=activation, **stored)(*given)
            assert not statistics[0].any() and (statistics[1] == 1).all()
        assert all(same_bits(tensor, copy) for tensor, copy in zip(given, before, strict=True))


# --- running statistics --------------------------------------------------------------------------------------------

every_instance = pytest.mark.parametrize("function", ["instance_norm", "add_instance_norm"])


@every_instance
@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_running_statistics_are_torchs(function, momentum, layout):
    ours, torchs = ((normal(4, dtype=torch.float64), normal(4, dtype=torch.float64).square()) for _ in range(2))
    for seed in range(3):
        x, residual, *_ = (tensor.detach() for tensor in tensors(3, 4, 5, 2, seed=seed))
        keywords = {"momentum": momentum, "running_mean": ours[0], "running_var": ours[1]}
        y, *_ = call(function, **keywords)(LAYOUTS[layout](x), residual if adds_first(function) else None)
        expected = TF.instance_norm(residual + x if adds_first(function) else x, *torchs, momentum=momentum)
        torch.testing.assert_close((y, *ours), (expected, *torchs), rtol=1e-12, atol=1e-12)
        stored = call(function, use_input_stats=False, **keywords)(x, residual if adds_first(function) else None)[0]
        expected = TF.instance_norm(residual + x if adds_first(function) else x, *torchs, use_input_stats=False)
        torch.testing.assert_close((stored, *ours), (expected, *torchs), rtol=1e-12, atol=1e-12)


@every_instance
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_running_statistics_keep_their_type_and_have_no_history(function, x_dtype, dtype):
    mean, var = fresh_statistics(4, dtype)
    x, residual, weight, bias = tensors(2, 4, 8, dtype=x_dtype)
    run = call(function, running_mean=mean, running_var=var, activation="relu")
    outputs = run(x, residual, weight, bias)
    assert mean.dtype == var.dtype == dtype and not mean.requires_grad
    total = (outputs[1] if adds_first(function) else x).detach().double()
    expected = (total.mean((0, 2)) * 0.1, 0.9 + total.var(2).mean(0) * 0.1)
    torch.testing.assert_close((mean, var), tuple(t.to(dtype) for t in expected))
    scalar(outputs).backward()
    run = call(function, running_mean=mean, running_var=var, use_input_stats=False)
    assert {output.dtype for output in run(x, residual, weight, bias)} == {x_dtype}


@every_instance
def test_running_statistics_change_only_when_the_call_succeeds(function, monkeypatch):
    x, residual, weight, bias = tensors(2, 4, 3)
    mean, var = fresh_statistics(4)
    keywords = {"running_mean": mean, "running_var": var}
    for changes in ({"residual": x[:1]}, {"activation": "swish"}, {"weight": weight[:2]}, {"momentum": None}):
        with pytest.raises((ValueError, TypeError)):
            getattr(F, function)(x, **{"residual": residual, **keywords, **changes})

    def fails(*args: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "group_norm", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            call(function, **keywords)(x, residual, weight, bias)
    assert not mean.any() and (var == 1).all()


@every_instance
def test_an_empty_batch_leaves_running_statistics(function):
    """torch's own become NaN."""
    mean, var = fresh_statistics(4)
    for shape in ((0, 4, 3), (2, 4, 0)):
        x, residual, *_ = tensors(*shape)
        call(function, running_mean=mean, running_var=var)(x, residual)
    assert not mean.any() and (var == 1).all()


@pytest.mark.parametrize("affine", [True, False])
def test_a_large_running_mean_does_not_cancel(affine):
    mean, var = torch.full((4,), 1e4, device=DEVICE), torch.full((4,), 1e-4, device=DEVICE)
    x = 1e4 + normal(2, 4, 64) * 1e-2
    weight, bias = (normal(4, seed=5), normal(4, seed=6)) if affine else (None, None)
    given = (mean, var, weight, bias)
    expected = TF.instance_norm(x.double(), *(None if t is None else t.double() for t in given), use_input_stats=False)
    torch.testing.assert_close(
        F.instance_norm(x, *given, use_input_stats=False).double(), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_by_running_statistics_no_more_is_kept_than_by_torch(dtype: torch.dtype, affine: bool) -> None:
    x = normal(2, 6, 8, 8, dtype=dtype).requires_grad_()
    parameters = [normal(6).requires_grad_(), normal(6, seed=1).requires_grad_()] if affine else [None, None]
    running = normal(6, seed=2), normal(6, seed=3).square()
    kept = []
    for function in (F.instance_norm, TF.instance_norm):
        with recorded() as tensors_kept:
            _y = function(x, *running, *parameters, use_input_stats=False)
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors_kept}
        kept.append(sum(storage.nbytes() for storage in storages.values()))
    assert kept[0] <= kept[1]
    assert affine or kept[0] < x.untyped_storage().nbytes()  # without a weight to learn x is not needed
