"""Running statistics of batch norm as torch's functions compose it: what moves them, and what is normalized by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch.fx.experimental.proxy_tensor import make_fx

import fused_ops
from fused_ops import functional as F
from tests.batch_norm_calls import call, each_mode, every_function, statistics
from tests.channel_norm_calls import tensors
from tests.norm_cases import DEVICE, normal

Tensor = torch.Tensor


in_torch = pytest.mark.usefixtures("torch_backend")


# --- running statistics --------------------------------------------------------------------------------------------


@every_function
@pytest.mark.parametrize("point", ["norm", "finish"])
def test_running_statistics_change_only_when_the_call_succeeds(function, point, monkeypatch, torch_backend):
    x, residual, weight, bias = tensors(2, 4, 3)
    running, before = statistics(4), statistics(4)

    def fails(*args: Any) -> None:
        raise RuntimeError("out of memory")

    patched = {
        "norm": (torch, "batch_norm", fails),
        "finish": (fused_ops.fallback, "plan_finish", fails),
    }
    monkeypatch.setattr(*patched[point])
    with pytest.raises(RuntimeError, match="out of memory"):
        call(function, running=running, activation="relu")(x, residual, weight, bias)
    assert all(map(torch.equal, running, before))


@pytest.mark.usefixtures("torch_backend")
def test_a_checkpoint_moves_them_once():
    """It runs forward again in backward, and ends that from within as soon as it has what was saved."""
    norms = [fused_ops.BatchNorm2d(4, momentum=None, activation="relu").to(DEVICE) for _ in range(2)]
    for step in range(3):
        x = normal(3, 4, 2, 2, seed=step).requires_grad_()
        for norm, run in zip(norms, (lambda f, x: f(x), checkpointed), strict=True):
            run(norm, x).square().sum().backward()
    for found, expected in zip(norms[1].buffers(), norms[0].buffers(), strict=True):
        assert torch.equal(found, expected)


def checkpointed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)


@pytest.mark.usefixtures("torch_backend")
def test_they_stay_where_what_is_saved_is_refused():
    """By a hook, in the second call of its kind."""
    running, x = statistics(4), normal(3, 4, 2).requires_grad_()
    F.batch_norm(x, *running, training=True, activation="relu")
    before = [tensor.clone() for tensor in running]

    def refuse(tensor: Tensor) -> Tensor:
        raise RuntimeError("refused")

    with (
        torch.autograd.graph.saved_tensors_hooks(refuse, lambda tensor: tensor),
        pytest.raises(RuntimeError, match="refused"),
    ):
        F.batch_norm(x, *running, training=True, activation="relu")
    assert all(map(torch.equal, running, before))


@each_mode
def test_a_backward_comes_after_they_have_moved_on(training, each_backend):
    """With their values at the time of the forward, as torch's; they are no part of a graph that could be broken."""
    x, _, weight, bias = tensors(3, 4, 5)
    running, found = statistics(4), []
    for moves in (False, True):
        y = F.batch_norm(x, *running, weight, bias, training)
        if moves:
            F.batch_norm(x.detach() + 1, *running, training=True, activation="relu")
        found.append(torch.autograd.grad(y, (x, weight, bias), normal(3, 4, 5, dtype=torch.float64, seed=3)))
        if training:
            running = statistics(4)
    torch.testing.assert_close(*found, rtol=0, atol=0)


# --- torch's own pass by running statistics ------------------------------------------------------------------------


def by_running_statistics(x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Ours, and torch's, which folds the mean into a shift."""
    with torch.no_grad():
        return F.batch_norm(x, mean, var), TF.batch_norm(x, mean, var)


@in_torch
def test_torchs_pass_is_taken_while_no_mean_is_large():
    """Whether it is follows the running statistics wherever they are moved, by hand or by training."""
    x = normal(6, 4, 5, seed=1)
    mean, var = torch.ones(4, device=DEVICE), torch.ones(4, device=DEVICE)
    for far, move in (
        (False, lambda: None),
        (True, lambda: mean.fill_(1000.0)),
        (False, lambda: mean.fill_(1.0)),
        (True, lambda: F.batch_norm(x + 1000, mean, var, training=True, momentum=1.0)),
    ):
        move()
        input = x + mean.view(-1, 1)
        ours, torchs = by_running_statistics(input, mean, var)
        _, exact = by_running_statistics(input.double(), mean.double(), var.double())
        if far:
            assert 8 * (ours - exact).abs().max() < (torchs - exact).abs().max() or DEVICE.type != "cpu"
        else:
            assert torch.equal(ours, torchs) or DEVICE.type != "cpu"


@in_torch
@pytest.mark.parametrize("far", [False, True])
def test_it_is_traced_and_run_in_inference_mode(far: bool):
    mean, var = torch.full((4,), 99.0 if far else 0.5, device=DEVICE), torch.ones(4, device=DEVICE)
    x = normal(6, 4, 5)
    expected = F.batch_norm(x, mean, var)
    with torch.no_grad():
        for mode in ("real", "fake", "symbolic"):
            traced = make_fx(lambda x: F.batch_norm(x, mean, var), tracing_mode=mode, _allow_non_fake_inputs=True)(x)
            torch.testing.assert_close(traced(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(F.batch_norm(x, mean.clone(), var.clone()), expected)


@in_torch
@pytest.mark.parametrize("far", [False, True])
def test_gradients_by_running_statistics_are_the_formulas(far: bool):
    """Alone, in a batch of gradients, and when they are differentiated again."""
    x, weight, bias = (tensor.requires_grad_() for tensor in (normal(6, 4, 5), normal(4, seed=2), normal(4, seed=3)))
    mean, var = torch.full((4,), 99.0 if far else 0.5, device=DEVICE), torch.full((4,), 2.0, device=DEVICE)
    leaves = (x, weight, bias)
    y = F.batch_norm(x, mean, var, weight, bias)
    expected = (x - mean[:, None]) * torch.rsqrt(var + 1e-5)[:, None] * weight[:, None] + bias[:, None]
    dys = normal(3, 6, 4, 5, seed=4)
    for dy, batched in ((dys[0], False), (dys, True)):
        found, wanted = (
            torch.autograd.grad(out, leaves, dy, retain_graph=True, is_grads_batched=batched) for out in (y, expected)
        )
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    found, wanted = (
        torch.autograd.grad(
            torch.autograd.grad(out, leaves, dys[0], create_graph=True)[0].square().sum(), weight, retain_graph=True
        )
        for out in (y, expected)
    )
    torch.testing.assert_close(found, wanted)


class Plain(torch.Tensor):
    """A subclass that changes nothing, but is not ours to look into."""


@in_torch
def test_a_subclass_learns_twice_before_it_goes_backward():
    """torch keeps for backward the running statistics that it moves, which are then not to move again."""
    x, weight = normal(6, 4, 5).as_subclass(Plain).requires_grad_(), normal(4, seed=2).requires_grad_()
    running, of_torch = ((torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE)) for _ in range(2))
    ours = [F.batch_norm(x, *running, weight, training=True) for _ in range(2)]
    torchs = [TF.batch_norm(x, *of_torch, weight, training=True) for _ in range(2)]
    for y, expected in zip(ours, torchs, strict=True):
        found, wanted = (
            torch.autograd.grad(out, (x, weight), torch.ones_like(y) + y.detach()) for out in (y, expected)
        )
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(running, of_torch)


@in_torch
@each_mode
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (2, 4, 3, 3)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "parameter", [lambda w: w.repeat_interleave(2)[::2], lambda w: w[:1].expand(4)], ids=["gaps", "one"]
)
def test_a_weight_may_have_any_stride(parameter, channels_last, shape, training):
    x, dy = normal(*shape, seed=1), normal(*shape, seed=2)
    if channels_last and len(shape) == 4:
        x, dy = (tensor.to(memory_format=torch.channels_last) for tensor in (x, dy))
    found = []
    for arranged in (parameter, lambda w: parameter(w).contiguous()):
        weight, leaf = arranged(normal(4, seed=3)).detach().requires_grad_(), x.clone().requires_grad_()
        y = F.batch_norm(leaf, torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE), weight, training=training)
        found.append((y, *torch.autograd.grad(y, (leaf, weight), dy)))
    torch.testing.assert_close(*found)


@in_torch
def test_a_module_that_ran_can_swap_its_tensors():
    """Which torch refuses where somebody holds a weak reference to one."""
    norm = fused_ops.BatchNorm1d(4).to(DEVICE).eval()
    norm(normal(6, 4))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        norm.load_state_dict({name: tensor.clone() for name, tensor in norm.state_dict().items()})
        norm.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert norm(normal(6, 4, dtype=torch.float64)).dtype == torch.float64


@in_torch
def test_no_more_is_known_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch):
    known = fused_ops.channel_fallback._known_means
    known.clear()
    monkeypatch.setattr(fused_ops.channel_fallback, "MOST_KNOWN", 8)
    x, kept = normal(6, 4, 5), [(torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE)) for _ in range(20)]
    for mean, var in kept:
        by_running_statistics(x, mean, var)
        assert len(known) <= 8


@in_torch
@pytest.mark.parametrize("learns", [False, True])
def test_what_was_made_in_inference_mode_moves_outside_of_it(learns):
    with torch.inference_mode():
        made = torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE)
    running, x = (torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE)), normal(6, 4, 5).requires_grad_(learns)
    weight = normal(4, seed=1)
    expected = F.batch_norm(x, *running, weight, training=True)  # first: what it was planned with has a version
    torch.testing.assert_close(F.batch_norm(x, *made, weight, training=True), expected)
    torch.testing.assert_close(made, running)


@in_torch
@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU a Function of ours refuses it, as torch's functions do")
def test_in_inference_mode_with_gradients_there_is_no_node():
    x, weight = normal(6, 4, 5).requires_grad_(), normal(4, seed=1).requires_grad_()
    expected = F.batch_norm(x, None, None, weight, training=True)
    with torch.inference_mode(), torch.enable_grad():
        y = F.batch_norm(x, None, None, weight, training=True)
    torch.testing.assert_close(y, expected.detach())


class Subclass(torch.Tensor):
    """A tensor of somebody's own."""


@pytest.mark.parametrize("tracks", [False, True])
@every_function
def test_a_subclass_and_what_has_left_a_transform_train(function, tracks, torch_backend):
    x, residual, weight, bias = tensors(3, 4, 5)
    kept: list[Tensor] = []

    def escape(x: Tensor) -> Tensor:
        kept.append(x)
        return x.sum()

    torch.func.grad(escape)(x.detach())
    expected = None
    for given in (x, x.detach().as_subclass(Subclass), kept[0]):
        running = statistics(4) if tracks else None
        y = call(function, running=running)(given, residual, weight.requires_grad_(), bias)[0]
        (found,) = torch.autograd.grad(y.square().sum(), weight)
        expected = found if expected is None else expected
        torch.testing.assert_close(found.as_subclass(torch.Tensor), expected)


@every_function
def test_what_has_left_a_transform_learns_nothing_by_running_statistics(function, torch_backend):
    x, residual, weight, bias = (tensor.detach() for tensor in tensors(3, 4, 5))
    kept: list[Tensor] = []

    def escape(x: Tensor) -> Tensor:
        kept.append(x)
        return x.sum()

    torch.func.grad(escape)(x)
    found, expected = (
        call(function, running=statistics(4), training=False)(given, residual, weight, bias)[0]
        for given in (kept[0], x)
    )
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad
