"""Switchable normalization as torch's functions compose it: its numbers, and what it leaves alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as TF

import fused_ops
from fused_ops import reference
from tests.channel_norm_calls import LAYOUTS, adds_first, channels_last, order
from tests.norm_cases import DEVICE, HALF, TORCH_ACTIVATIONS, normal, same_bits
from tests.switch_norm_calls import Leaves, call, composed, each_mode, every_function, gradients, statistics, tensors
from tests.tolerances import assert_within_budget

pytestmark = [pytest.mark.one_in(8), pytest.mark.usefixtures("torch_backend")]

SHAPES = [(5, 6), (2, 6, 4), (1, 6, 7), (3, 1, 4), (3, 6, 1), (2, 5, 3, 3), (2, 3, 2, 3, 2)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def arrays(leaves: Leaves) -> dict[str, Any]:
    return {name: leaf.detach().double().cpu().numpy() for name, leaf in leaves.items()}


# --- numbers -------------------------------------------------------------------------------------------------------


@each_mode
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@each_shape
@every_function
def test_values_and_gradients_are_the_references(function, shape, activation, affine, training):
    leaves, ours, before = tensors(*shape, affine=affine), statistics(shape[1]), statistics(shape[1])
    outputs = call(function, training, activation, ours, momentum=0.3)(**leaves)
    arrived = [normal(*shape, dtype=torch.float64, seed=20 + i) for i in range(len(outputs))]
    found = torch.autograd.grad(outputs, list(leaves.values()), arrived)

    before = tuple(t.cpu().numpy() for t in before)
    *expected, mean, var = call(function, training, activation, before, reference, momentum=0.3)(**arrays(leaves))
    backward = getattr(reference, f"{function}_backward")
    given = {"weight": None, "bias": None, "running_mean": before[0], "running_var": before[1]} | arrays(leaves)
    expected_gradients = backward(
        *(d.cpu().numpy() for d in arrived), training=training, activation=activation, **given
    )
    for actual, exact in zip((*outputs, *ours), (*expected, mean, var), strict=True):
        torch.testing.assert_close(actual.detach().cpu(), torch.as_tensor(exact), rtol=1e-11, atol=1e-11)
    for name, gradient in zip(leaves, found, strict=True):
        exact = torch.as_tensor(expected_gradients[f"d{name}"])
        torch.testing.assert_close(gradient.cpu(), exact, rtol=1e-10, atol=1e-10)


@each_mode
@pytest.mark.parametrize("activation", TORCH_ACTIVATIONS)
@every_function
def test_every_activation_is_torchs(function, activation, training):
    leaves = tensors(3, 6, 4)
    outputs, expected = (run(function, training, activation)(**leaves) for run in (call, composed))
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(gradients(outputs, leaves), gradients(expected, leaves))


@each_shape
@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
@every_function
def test_running_statistics_are_batch_norms(function, momentum, shape):
    ours, torchs, leaves = statistics(shape[1]), statistics(shape[1]), tensors(*shape)
    for _ in range(2):
        call(function, running=ours, momentum=momentum)(**leaves)
        total = leaves["x"] + leaves["residual"] if adds_first(function) else leaves["x"]
        TF.batch_norm(total.detach(), *torchs, training=True, momentum=momentum)
    torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12)
    call(function, training=False, running=ours)(**leaves)
    torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12)
    assert not any(tensor.requires_grad for tensor in ours)


TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@each_mode
@pytest.mark.parametrize("x_dtype", TYPES, ids=str)
@pytest.mark.parametrize("shares_dtype", TYPES, ids=str)
@every_function
def test_every_mixture_of_types_returns_xs(function, x_dtype, shares_dtype, training):
    whole = tensors(3, 6, 4)
    for weight_dtype, running_dtype in itertools.product((torch.bfloat16, torch.float32), TYPES):
        types = {"x": x_dtype, "residual": x_dtype, "weight": weight_dtype, "bias": torch.float32}
        leaves = {
            name: leaf.detach().to(types.get(name, shares_dtype)).requires_grad_() for name, leaf in whole.items()
        }
        ours, before = statistics(6, running_dtype), statistics(6, running_dtype)
        outputs = call(function, training, running=ours)(**leaves)
        assert {output.dtype for output in outputs} == {x_dtype}
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if x_dtype in HALF else {"rtol": 1e-4, "atol": 1e-5}
        expected = composed(function, training, running=before)(**{n: leaf.double() for n, leaf in leaves.items()})
        torch.testing.assert_close([output.double() for output in outputs], list(expected), **tolerance)
        found = gradients(outputs, leaves)
        assert [g.dtype for g in found] == [leaf.dtype for leaf in leaves.values()]
        assert {tensor.dtype for tensor in ours} == {running_dtype}


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_float32_residual_makes_a_float32_total(dtype):
    leaves = tensors(2, 6, 4, dtype=dtype) | {"residual": normal(2, 6, 4, seed=9).requires_grad_()}
    y, total = call("add_switch_norm")(**leaves)
    assert (y.dtype, total.dtype) == (dtype, torch.float32)
    assert torch.equal(total, leaves["residual"] + leaves["x"])
    assert [g.dtype for g in gradients((y, total), leaves)[:2]] == [dtype, torch.float32]


@each_mode
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(64, 32), (2, 8, 16, 16)], ids=str)
@pytest.mark.parametrize(
    ("mean", "deviation", "dtype"),
    [(0, 1.0, torch.float32), (1e4, 1e-2, torch.float32), (10, 1.0, torch.float16), (10, 1.0, torch.bfloat16)],
    ids=str,
)
def test_a_large_mean_costs_no_more_digits_than_torchs_own(mean, deviation, dtype, shape, layout, training):
    leaves = {name: leaf.detach() for name, leaf in tensors(*shape, dtype=dtype).items() if name != "residual"}
    leaves["x"] = LAYOUTS[layout]((mean + deviation * leaves["x"].double()).to(dtype))
    running = tuple(torch.full(shape[1:2], value, device=DEVICE) for value in (float(mean), deviation**2))
    dy = normal(*shape, dtype=dtype, seed=9)
    given = []
    for made, wide in ((call, False), (composed, False), (composed, True)):
        own = {name: (t.double() if wide else t).detach().requires_grad_() for name, t in leaves.items()}
        statistics = tuple(t.double() if wide else t.clone() for t in running)
        (y,) = made("switch_norm", training, running=statistics)(**own)
        given.append((y, *torch.autograd.grad(y, list(own.values()), dy.to(y.dtype))))
    for name, actual, of_torch, expected in zip(("y", *leaves), *given, strict=True):
        terms = {"y": 1, "x": 1, "weight": dy.numel() // shape[1], "bias": dy.numel() // shape[1]}.get(name, dy.numel())
        assert_within_budget(f"d{name}", actual, of_torch, expected.detach().numpy(force=True), terms)


@each_shape
def test_a_large_mean_keeps_the_digits_of_the_deviations(shape):
    """torch's composition rounds each mean, here to a twentieth of the deviation."""
    leaves = {name: leaf.detach() for name, leaf in tensors(*shape, dtype=torch.float32).items()}
    leaves["x"] = 1e4 + 1e-2 * leaves["x"]
    (y,) = call("switch_norm")(**leaves)
    (expected,) = composed("switch_norm")(**{name: leaf.double() for name, leaf in leaves.items()})
    torch.testing.assert_close(y, expected.float(), rtol=1e-5, atol=1e-5)


@each_mode
@pytest.mark.parametrize("shape", [(4, 6), (3, 6, 4)], ids=str)
@every_function
def test_nan_and_infinity_stay_in_their_sample_and_channel(function, shape, training):
    leaves = {name: leaf.detach() for name, leaf in tensors(*shape).items()}
    leaves["x"][0, 0], leaves["x"][1, 5] = torch.nan, torch.inf
    ours, torchs = statistics(6), statistics(6)
    y = call(function, training, running=ours)(**leaves)[0]
    expected = composed(function, training)(**leaves)[0]
    assert y.isnan().any() and y.isfinite().any()
    torch.testing.assert_close(y, expected, equal_nan=True)
    total = leaves["x"] + leaves["residual"] if adds_first(function) else leaves["x"]
    TF.batch_norm(total, *torchs, training=training)
    torch.testing.assert_close(ours, torchs, equal_nan=True)


@each_mode
@pytest.mark.parametrize("shape", [(0, 6), (0, 6, 4), (2, 0, 4), (2, 6, 0), (2, 6, 0, 3), (0, 6, 0)], ids=str)
@every_function
def test_empty_tensors_have_empty_or_zero_gradients(function, shape, training):
    leaves, running, before = tensors(*shape), statistics(shape[1]), statistics(shape[1])
    outputs = call(function, training, "gelu", running)(**leaves)
    assert [output.shape for output in outputs] == [torch.Size(shape)] * len(outputs)
    for leaf, gradient in zip(leaves.values(), gradients(outputs, leaves), strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()
    assert all(map(torch.equal, running, before))


# --- layouts, and what is left alone -------------------------------------------------------------------------------


@each_mode
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 4), (2, 6, 3, 4), (2, 3, 2, 3, 2), (2, 1, 3, 4)], ids=str)
@every_function
def test_the_layout_in_is_the_layout_out(function, layout, shape, training):
    leaves = {name: leaf.detach() for name, leaf in tensors(*shape).items()}
    x = LAYOUTS[layout](leaves["x"])
    expected = call(function, training)(**leaves | {"x": x.contiguous()})
    before, residual = x.clone(), leaves["residual"]
    for other in (residual, channels_last(residual)):
        for needs in (False, True):
            own = leaves | {"x": x.detach().requires_grad_(needs), "residual": other}
            outputs = call(function, training, "relu")(**own)
            torch.testing.assert_close(outputs[0], expected[0].relu())
            if needs:
                dx = gradients(outputs, {"x": own["x"]})[0]
                assert dx.shape == x.shape and dx.isfinite().all()
            if adds_first(function) and 0 in x.stride():
                continue  # whose order of dims is the residual's to decide
            for output in outputs:
                assert order(output) == order(torch.empty_like(x)), (output.stride(), x.stride())
    assert same_bits(x, before)


@each_mode
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("needs", [False, True])
@every_function
def test_no_argument_is_changed(function, activation, needs, training):
    for dtype, shape in itertools.product((torch.float32, torch.float64), ((3, 4), (2, 4, 1), (2, 4, 3, 3))):
        leaves = {name: leaf.detach().requires_grad_(needs) for name, leaf in tensors(*shape, dtype=dtype).items()}
        before = {name: leaf.clone() for name, leaf in leaves.items()}
        call(function, training, activation, statistics(4, dtype))(**leaves)
        assert all(same_bits(leaf, before[name]) for name, leaf in leaves.items())


@pytest.mark.parametrize("point", ["norm", "finish"])
@every_function
def test_a_call_that_fails_moves_nothing(function, point, monkeypatch):
    def fails(*arguments: Any) -> None:
        raise RuntimeError("out of memory")

    place = (fused_ops.switch_fallback, "_laid_out_as") if point == "norm" else (fused_ops.fallback, "plan_finish")
    monkeypatch.setattr(*place, fails)
    running, before = statistics(4), statistics(4)
    with pytest.raises(RuntimeError, match="out of memory"):
        call(function, running=running, activation="relu")(**tensors(2, 4, 3))
    assert all(map(torch.equal, running, before))


@each_mode
def test_a_backward_comes_after_they_have_moved_on(training):
    """With their values at the time of the forward; they are no part of a graph that could be broken."""
    leaves, running, found = tensors(3, 4, 5), statistics(4), []
    del leaves["residual"]
    for moves in (False, True):
        outputs = call("switch_norm", training, running=running)(**leaves)
        if moves:
            call("switch_norm", running=running)(**leaves | {"x": leaves["x"].detach() + 1})
        found.append(gradients(outputs, leaves))
        if training:
            running = statistics(4)
    torch.testing.assert_close(*found, rtol=0, atol=0)
