"""Gradients of the add_ norms with dropout: only those asked for, those of a total alone, second ones, by batches, in
transforms, and of a forward that is computed again. They drop what forward dropped."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import func
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from fused_ops import functional as F
from tests.calls import composed, fused, operands, scalar
from tests.channel_norm_cases import with_layout
from tests.layouts import channels_last
from tests.norm_cases import DEVICE, OPERANDS, check, normal, run_fused, same_bits, short, with_exact_sums, with_fields

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels")

from tests.conftest import FamilyCall
from tests.dropout_cases import FUNCTIONS, ROWS, SIX, call, factor, small_case, wide

Tensor = torch.Tensor

# torch's own, as it first loads forward-mode differentiation.
pytestmark = [pytest.mark.one_in(8), pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")]

each_function = pytest.mark.parametrize("function", FUNCTIONS)
every_norm = pytest.mark.parametrize("function", SIX)
each_kind = pytest.mark.parametrize("activation", [None, "relu", "gelu"])


# --- only what is asked for ----------------------------------------------------------------------------------------


@pytest.mark.one_in(8)
@pytest.mark.usefixtures("memory_checked")
@pytest.mark.parametrize("unused", [None, "dy", "dtotal"])
@each_kind
@each_function
def test_every_choice_of_gradients(
    function: str, activation: str | None, unused: str | None, triton_backend: None, family_calls: list[FamilyCall]
) -> None:
    """`check` also holds that a frozen operand gets None; and no launcher computes or allocates one nobody wants, nor
    runs where the total alone was used."""
    whole = with_exact_sums(small_case(function, dtype=torch.float16, activation=activation, dropout_p=0.5))
    whole = whole if unused is None else with_fields(whole, **{unused: None})
    for wanted in (("x",), ("residual",), ("x", "residual"), ("weight",), ("residual", "bias"), OPERANDS, ()):
        given = [name for name in wanted if getattr(whole, name) is not None]
        family_calls.clear()
        check(with_fields(whole, frozen=tuple(name for name in OPERANDS if name not in given)))
        backward = [call.result._asdict() for call in family_calls if call.direction == "backward"]
        computed = {name for found in backward for name, gradient in found.items() if gradient is not None}
        expected = set() if unused == "dy" else {f"d{name}" for name in given}
        assert computed == expected and len(backward) == bool(expected), wanted


@pytest.mark.one_in(3)
@pytest.mark.parametrize("unused", [None, "dy", "dtotal"])
@pytest.mark.parametrize("wanted", [("x",), ("residual",), ("x", "residual"), ("mean_weight",), ("x", "var_weight")])
def test_every_choice_of_gradients_of_switchable_norm(
    wanted: tuple[str, ...], unused: str | None, triton_backend: None
) -> None:
    """As where everything is asked for, whose numbers other tests have."""
    shapes = {"x": (3, 4, 5), "residual": (3, 4, 5), "mean_weight": (3,), "var_weight": (3,)}
    found = []
    for learns in (tuple(shapes), wanted):
        leaves = {
            name: normal(*shape, dtype=torch.float64, seed=seed).requires_grad_(name in learns)
            for seed, (name, shape) in enumerate(shapes.items())
        }
        torch.manual_seed(2)
        y, total = call("add_switch_norm", **leaves, activation="gelu", dropout_p=0.4)
        used = [output for name, output in (("dy", y), ("dtotal", total)) if name != unused]
        if not any(output.requires_grad for output in used):
            assert unused == "dy" and not {"x", "residual"} & set(wanted)
            return
        asked = [leaves[name] for name in wanted]
        found.append(torch.autograd.grad(sum(output.sin().sum() for output in used), asked, allow_unused=True))
    assert all(map(same_bits, *found))


@pytest.mark.one_in(4)
@pytest.mark.usefixtures("memory_checked")
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=short)
@each_function
def test_gradients_of_a_float32_stream(function: str, half: torch.dtype, triton_backend: None) -> None:
    """dresidual is float32, and dx is it times the factor, rounded to x's type."""
    whole = wide(small_case(function, dtype=half, activation="gelu"))
    for frozen, unused in itertools.product(((), ("x",), ("residual",)), ((), ("dy",), ("dtotal",))):
        case = with_fields(whole, frozen=frozen, **dict.fromkeys(unused))
        result = run_fused(case)
        assert (result.outputs["y"].dtype, result.outputs["total"].dtype) == (half, torch.float32)
        dx, dresidual = result.gradients["dx"], result.gradients["dresidual"]
        assert (dx is None) == ("x" in frozen) and (dresidual is None) == ("residual" in frozen)
        assert dx is None or dx.dtype == half
        assert dresidual is None or dresidual.dtype == torch.float32
        if dx is not None and dresidual is not None:
            kept = factor(tuple(case.x.shape), case.dropout_p, case.drop_seed, torch.float32)
            assert_rounded_once(dx, dresidual * kept)


def assert_rounded_once(actual: Tensor, exact: Tensor) -> None:
    """Whatever way it is rounded: an interpreter truncates bfloat16."""
    finfo = torch.finfo(actual.dtype)
    assert bool(((actual.float() - exact).abs() <= finfo.eps * exact.abs() + finfo.smallest_normal).all())


# --- second derivatives --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "activation"),
    [
        pytest.param(
            *pair, marks=[] if pair in (("add_layer_norm", "gelu"), ("add_batch_norm", None)) else pytest.mark.full
        )
        for pair in itertools.product(FUNCTIONS, (None, "gelu", "tanh"))
    ],
)
def test_first_and_second_derivatives_are_those_of_finite_differences(
    function: str, activation: str | None, triton_backend: None
) -> None:
    case = small_case(function, dtype=torch.float64, activation=activation)
    tensors = tuple(operands(case).values())
    assert gradcheck(fused(case), tensors, fast_mode=True)
    assert gradgradcheck(fused(case), tensors, fast_mode=True)


@pytest.mark.full
def test_derivatives_of_switchable_norm_are_those_of_finite_differences(triton_backend: None) -> None:
    x, residual = (normal(2, 3, 4, dtype=torch.float64, seed=seed).requires_grad_() for seed in (0, 1))

    def function(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        return call("add_switch_norm", x, residual, activation="gelu", dropout_p=0.4)

    assert gradcheck(function, (x, residual), fast_mode=True)
    assert gradgradcheck(function, (x, residual), fast_mode=True)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("layout", [torch.clone, channels_last], ids=["contiguous", "channels_last"])
@each_kind
@each_function
def test_a_gradient_penalty_is_that_of_torchs_composition(
    function: str, activation: str | None, layout: Any, triton_backend: None
) -> None:
    case = small_case(function, dtype=torch.float64, activation=activation)
    case = case if function in ROWS else with_layout(case, layout)
    found = []
    for run in (fused, composed):
        tensors = case.leaves()
        loss = scalar(run(case)(*tensors.values()))
        first = torch.autograd.grad(loss, list(tensors.values()), create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        found.append(torch.autograd.grad(loss + penalty, list(tensors.values())))
    torch.testing.assert_close(*found)


@pytest.mark.one_in(5)
@each_kind
@every_norm
@pytest.mark.parametrize("used", ["y", "total", "both"])
def test_create_graph_changes_no_gradient(
    function: str, activation: str | None, used: str, triton_backend: None
) -> None:
    x, residual = (normal(3, 4, 5, dtype=torch.float64, seed=seed).requires_grad_() for seed in (0, 1))
    torch.manual_seed(1)
    outputs = call(function, x, residual, activation=activation, dropout_p=0.3)
    loss = scalar({"y": outputs[:1], "total": outputs[1:], "both": outputs}[used])
    plain, differentiable = (
        torch.autograd.grad(loss, (x, residual), retain_graph=True, create_graph=create_graph)
        for create_graph in (False, True)
    )
    torch.testing.assert_close([gradient.detach() for gradient in differentiable], list(plain))
    kept = factor((3, 4, 5), 0.3, seed=1)
    assert torch.equal(differentiable[0] != 0, (kept != 0) & (differentiable[1] != 0))


# --- by batches, and torch.func ------------------------------------------------------------------------------------


@pytest.mark.one_in(4)
@pytest.mark.parametrize("vectorized", ["is_grads_batched", "vmap"])
@every_norm
def test_gradients_by_batches_are_those_one_by_one(function: str, vectorized: str, each_backend: str) -> None:
    x, residual = (normal(3, 2, 5, dtype=torch.float64, seed=seed).requires_grad_() for seed in (0, 1))
    outputs = call(function, x, residual, activation="gelu", dropout_p=0.3)
    basis = normal(4, 3, 2, 5, dtype=torch.float64, seed=2), normal(4, 3, 2, 5, dtype=torch.float64, seed=3)
    expected = [torch.autograd.grad(outputs, (x, residual), row, retain_graph=True) for row in zip(*basis, strict=True)]
    if vectorized == "is_grads_batched":
        found = torch.autograd.grad(outputs, (x, residual), basis, is_grads_batched=True)
    else:
        found = torch.vmap(lambda *d: torch.autograd.grad(outputs, (x, residual), d))(*basis)
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*expected, strict=True))))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("randomness", ["same", "different"])
@every_norm
def test_vmap_drops_as_it_is_told(function: str, randomness: str, each_backend: str) -> None:
    """Under a transform the composition runs, whose randomness torch knows how to batch."""
    x, residual = torch.ones(2, 3, 4, 30, device=DEVICE), torch.zeros(2, 3, 4, 30, device=DEVICE)
    batched = func.vmap(lambda x, r: call(function, x, r, dropout_p=0.5), randomness=randomness)
    torch.manual_seed(0)
    _, total = batched(x, residual)
    assert torch.equal(total.unique(), torch.tensor([0.0, 2.0], device=DEVICE))
    assert torch.equal(total[0], total[1]) == (randomness == "same")


@pytest.mark.one_in(2)
@every_norm
def test_grad_of_a_call_that_drops(function: str, each_backend: str) -> None:
    x, residual = normal(3, 4, 30), normal(3, 4, 30, seed=1)

    def loss(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y, total = call(function, x, residual, activation="gelu", dropout_p=0.5)
        return scalar((y, total)), total

    (dx, dresidual), (_, total) = func.grad_and_value(loss, argnums=(0, 1), has_aux=True)(x, residual)
    kept = (total - residual).abs() > 1e-6
    torch.testing.assert_close(dx, torch.where(kept, 2 * dresidual, 0.0))
    assert kept.any() and not kept.all()


# --- a forward that is computed again ------------------------------------------------------------------------------


@pytest.mark.one_in(4)
@pytest.mark.parametrize("use_reentrant", [False, True])
@every_norm
def test_checkpointing_drops_the_same_again(function: str, use_reentrant: bool, each_backend: str) -> None:
    """Whatever the generator has drawn in between; dx of the total alone shows the mask of forward."""
    x, residual = (normal(3, 4, 5, seed=seed).requires_grad_() for seed in (0, 1))

    def layer(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return call(function, x, residual, activation="gelu", dropout_p=0.5)

    found = []
    for run in (layer, lambda *tensors: checkpoint(layer, *tensors, use_reentrant=use_reentrant)):
        torch.manual_seed(7)
        outputs = run(x, residual)
        torch.rand(5)
        x.grad = residual.grad = None
        scalar(outputs).backward()
        found.append([*outputs, x.grad, residual.grad])
    assert all(map(same_bits, *found))


@pytest.mark.parametrize("function", ["add_layer_norm", "add_group_norm", "add_batch_norm", "add_switch_norm"])
def test_backward_has_the_mask_of_the_total_that_it_has(function: str, triton_backend: None) -> None:
    """Both are of the forward that ran again, where it was let draw a seed of its own."""
    x, zeros = torch.ones(16, 4, 8, device=DEVICE, requires_grad=True), torch.zeros(16, 4, 8, device=DEVICE)

    def total(x: Tensor) -> Tensor:
        return call(function, x, zeros, activation=None, dropout_p=0.5)[1]

    y = checkpoint(lambda x: total(x) ** 2, x, use_reentrant=False, preserve_rng_state=False)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert set(dx.unique().tolist()) == {0.0, 8.0}  # 2 * (2 * x) * 2 where it was kept
    assert abs((dx != 0).float().mean().item() - 0.5) < 0.11  # 5 deviations; of two masks a quarter would be kept


def test_layers_in_a_row_that_are_checkpointed_together(each_backend: str) -> None:
    """Each draws a seed of its own, in order, again."""
    x, residual = (normal(6, 8, seed=seed).requires_grad_() for seed in (0, 1))

    def layers(x: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(3):
            x, stream = F.add_rms_norm(x, stream, (8,), activation="silu", dropout_p=0.5)
        return x, stream

    found = []
    for run in (layers, lambda *tensors: checkpoint(layers, *tensors, use_reentrant=False)):
        torch.manual_seed(7)
        found.append(torch.autograd.grad(scalar(run(x, residual)), (x, residual)))
    assert all(map(same_bits, *found))
