"""What dropout inside the add_ norms drops: what residual_add drops under the same seed, in any norm and layout, as
torch's generator says; and what it costs: a seed, and no launch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import fused_ops
from fused_ops import functional as F
from tests.calls import recorded, scalar
from tests.channel_norm_calls import order
from tests.layouts import channels_last, every_other_column, samples_last, spatial_dims_swapped, unaligned
from tests.norm_cases import DEVICE, HALF, normal, same_bits, short

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels")

from tests.dropout_cases import ROWS, SIX, call, factor

Tensor = torch.Tensor

every_norm = pytest.mark.parametrize("function", SIX)
each_type = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=short)


def of_shapes(*shapes: tuple[int, ...]) -> pytest.MarkDecorator:
    """Parametrizes over every norm and shape; planes of one element have no statistics of an instance."""
    pairs = [(function, shape) for function in SIX for shape in shapes if len(shape) > 2 or "instance" not in function]
    return pytest.mark.parametrize(("function", "shape"), pairs, ids=short)


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """x and residual, which learn."""
    x, residual = (normal(*shape, dtype=dtype, seed=seed).requires_grad_() for seed in (0, 1))
    return x, residual


def seeded(seed: int, function: str, *operands: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return call(function, *operands, **{"dropout_p": 0.3, **keywords})


def state() -> Tensor:
    return torch.cuda.get_rng_state() if DEVICE.type == "cuda" else torch.get_rng_state()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", HALF, ids=short)
@every_norm
def test_half_x_is_multiplied_in_the_float32_of_its_stream(
    function: str, dtype: torch.dtype, each_backend: str
) -> None:
    """Of a residual of zeros the total is what is kept of x over 0.7, which half could not tell."""
    x = normal(3, 4, 5, dtype=dtype)
    _, total = seeded(0, function, x, torch.zeros_like(x, dtype=torch.float32))
    kept = total != 0
    assert 0 < int(kept.sum()) < total.numel()
    torch.testing.assert_close(total[kept], x.float()[kept] / 0.7)


# --- one mask ------------------------------------------------------------------------------------------------------


@pytest.mark.one_in(5)
@pytest.mark.usefixtures("memory_checked")
@pytest.mark.parametrize("layout", [torch.clone, channels_last], ids=["contiguous", "channels_last"])
@of_shapes((6, 8), (3, 4, 5), (2, 4, 7, 7), (3, 4, 6, 6), (2, 4, 17, 16), (2, 2, 3, 2, 4))
def test_every_norm_drops_what_residual_add_drops(
    function: str, shape: tuple[int, ...], layout: Any, triton_backend: None
) -> None:
    """Of ones that are added to zeros the total is the factor itself, bit for bit; and so is the gradient of x, of the
    total alone, by a backward of its own, and of both, where it is the residual's times the factor."""
    x = layout(torch.ones(shape, dtype=torch.float64, device=DEVICE)).requires_grad_()
    residual = layout(torch.zeros(shape, dtype=torch.float64, device=DEVICE)).requires_grad_()
    expected = factor(shape, 0.3, seed=9)
    assert 0 < int((expected == 0).sum()) < expected.numel()
    y, total = seeded(9, function, x, residual)
    assert torch.equal(total, expected)
    dtotal = layout(normal(*shape, dtype=torch.float64, seed=2))
    (dx,) = torch.autograd.grad(total, x, dtotal, retain_graph=True)
    assert torch.equal(dx, dtotal * expected)
    for outputs, arriving in (((y,), (dtotal.cos(),)), ((y, total), (dtotal.cos(), dtotal))):
        dx, dresidual = torch.autograd.grad(outputs, (x, residual), arriving, retain_graph=True)
        assert torch.equal(dx, dresidual * expected) and dresidual.all()


@pytest.mark.one_in(3)
@pytest.mark.parametrize("function", [function for function in SIX if function not in ROWS])
@pytest.mark.parametrize(
    "layout", [every_other_column, samples_last, spatial_dims_swapped, unaligned], ids=lambda layout: layout.__name__
)
def test_the_mask_goes_by_the_logical_index_in_any_layout(function: str, layout: Any, triton_backend: None) -> None:
    shape = (3, 4, 5, 6)
    x, residual = drawn(*shape)
    plain = seeded(1, function, x, residual)
    gradients = torch.autograd.grad(scalar(plain), (x, residual))
    other = seeded(1, function, layout(x), layout(residual))
    torch.testing.assert_close(other, plain)
    torch.testing.assert_close(torch.autograd.grad(scalar(other), (x, residual)), gradients)


@pytest.mark.one_in(2)
@every_norm
@each_type
def test_what_is_kept_is_scaled_in_the_type_of_all_arithmetic(
    function: str, dtype: torch.dtype, triton_backend: None
) -> None:
    """x / (1 - p) + residual, rounded once to the stream's type, which may be wider."""
    shape = (3, 4, 9)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    x, residual = normal(*shape, dtype=dtype), normal(*shape, dtype=compute, seed=1)
    y, total = seeded(2, function, x, residual)
    scale = torch.tensor(1 / (1 - 0.3), dtype=compute, device=DEVICE)
    kept = factor(shape, 0.3, seed=2) != 0
    product = torch.where(kept, x.to(compute) * scale, 0.0)
    # A GPU multiplies and adds in one step: the product is not rounded, and the sum may round to the other side.
    rounding = torch.finfo(compute).eps * (product.abs() / 2 + total.abs()) * (DEVICE.type != "cpu")
    error = (total - (product + residual)).abs()
    assert (total.dtype, y.dtype) == (compute, dtype) and bool((error <= rounding).all())
    assert torch.equal(total[~kept], residual[~kept])


@every_norm
def test_a_rate_of_one_leaves_the_residual_and_the_gradient_of_it(function: str, each_backend: str) -> None:
    x, residual = drawn(3, 4, 5)
    y, total = call(function, x, residual, dropout_p=1.0)
    assert torch.equal(total, residual)
    dx, dresidual = torch.autograd.grad(scalar((y, total)), (x, residual))
    whole = residual.detach().requires_grad_()
    expected = call(function, torch.zeros_like(whole), whole)
    assert torch.equal(y, expected[0]) and not dx.any()
    torch.testing.assert_close(dresidual, torch.autograd.grad(scalar(expected), whole)[0])


@pytest.mark.one_in(2)
@pytest.mark.parametrize("p", [0.4, 1.0])
@every_norm
def test_nan_of_x_is_in_the_total_dropped_or_not(function: str, p: float, each_backend: str) -> None:
    """A product drops, as in torch on a CPU."""
    x, residual = normal(3, 4, 5), normal(3, 4, 5, seed=1)
    x[1, 2] = math.nan
    _, total = seeded(0, function, x, residual, dropout_p=p)
    assert torch.equal(total.isnan(), x.isnan())


# --- torch's generator ---------------------------------------------------------------------------------------------


@pytest.mark.one_in(2)
@every_norm
def test_manual_seed_governs_what_is_dropped(function: str, each_backend: str) -> None:
    x, residual = drawn(4, 6, 5, dtype=torch.float32)

    def everything(seed: int | None = None) -> list[Tensor]:
        if seed is not None:
            torch.manual_seed(seed)
        outputs = call(function, x, residual, activation="gelu", dropout_p=0.3)
        return [*outputs, *torch.autograd.grad(scalar(outputs), (x, residual))]

    first, second, again, next_again, other = (everything(seed) for seed in (5, None, 5, None, 6))
    assert all(map(same_bits, first, again)) and all(map(same_bits, second, next_again))
    assert not torch.equal(first[1], second[1]) and not torch.equal(first[1], other[1])


@pytest.mark.one_in(2)
@every_norm
def test_only_a_call_that_drops_moves_the_generator(function: str, each_backend: str) -> None:
    """Neither its backward, nor a rate of 0, nor evaluation, which are the bare call bit for bit."""
    x, residual = drawn(3, 4, 5, dtype=torch.float32)
    given = {"running_mean": torch.zeros(4, device=DEVICE), "running_var": torch.ones(4, device=DEVICE)}
    own = {**given, "training": False} if function in ("add_batch_norm", "add_switch_norm") else {}
    before = state()
    bare = call(function, x, residual)
    of_rate_zero = call(function, x, residual, dropout_p=0.0)
    evaluated = call(function, x, residual, **{"training": False, **own}, dropout_p=0.3)
    expected = call(function, x, residual, **own) if own else bare
    torch.autograd.grad(scalar(bare), (x, residual))
    assert torch.equal(state(), before)
    assert all(map(same_bits, of_rate_zero, bare)) and all(map(same_bits, evaluated, expected))
    outputs = call(function, x, residual, dropout_p=0.3)
    after = state()
    assert not torch.equal(after, before)
    torch.autograd.grad(scalar(outputs), (x, residual))
    assert torch.equal(state(), after), "backward drew"


@pytest.mark.one_in(2)
@every_norm
def test_backward_may_come_twice_and_late(function: str, triton_backend: None) -> None:
    """What other calls draw in between changes nothing."""
    x, residual = drawn(3, 4, 5)
    outputs = seeded(4, function, x, residual)
    found = []
    for _ in range(2):
        call(function, x, residual, dropout_p=0.3)
        torch.rand(3)
        found.append(torch.autograd.grad(scalar(outputs), (x, residual), retain_graph=True))
    assert all(map(same_bits, *found))
    torch.testing.assert_close(found[0][0], found[0][1] * factor((3, 4, 5), 0.3, seed=4), rtol=0, atol=0)


# --- the composition -----------------------------------------------------------------------------------------------


@every_norm
def test_the_composition_drops_as_torch_does(function: str) -> None:
    """Its masks are torch's own: what the total holds of x, y is the norm of it, and gradients drop the same."""
    shape = (8, 4, 6, 5)
    x, residual = drawn(*shape)
    with fused_ops.use_backend("torch"):
        y, total = seeded(3, function, x, residual, activation="gelu")
        torch.manual_seed(3)
        dropped = torch.nn.functional.dropout(x.detach(), 0.3)
        torch.testing.assert_close(total - residual, dropped)
        kept = dropped != 0
        deviation = math.sqrt(0.3 * 0.7 / kept.numel())
        assert abs(kept.double().mean() - 0.7) <= 5 * deviation
        total_alone = total.detach().requires_grad_()
        expected = call(function, torch.zeros_like(total_alone), total_alone, activation="gelu")
        torch.testing.assert_close(y, expected[0])
        (dtotal,) = torch.autograd.grad(scalar(expected), total_alone)
        dx, dresidual = torch.autograd.grad(scalar((y, total)), (x, residual))
        torch.testing.assert_close(dresidual, dtotal)
        torch.testing.assert_close(dx, torch.where(kept, dtotal / 0.7, 0.0))


@pytest.mark.parametrize("activation", [None, "relu"])
def test_instance_norm_by_running_statistics_drops(activation: str | None, each_backend: str) -> None:
    """There no kernel runs, whichever backend is set."""
    x, residual = drawn(3, 4, 5)
    running = normal(4, dtype=torch.float64), normal(4, dtype=torch.float64, seed=1).square() + 0.5
    y, total = F.add_instance_norm(x, residual, *running, use_input_stats=False, activation=activation, dropout_p=0.4)
    kept = (total - residual).abs() > 1e-9
    torch.testing.assert_close(total, residual + torch.where(kept, x / 0.6, 0.0))
    dx, dresidual = torch.autograd.grad(scalar((y, total)), (x, residual))
    torch.testing.assert_close(dx, torch.where(kept, dresidual / 0.6, 0.0))
    assert kept.any() and not kept.all()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (2, 0, 3)], ids=short)
@every_norm
def test_without_elements_nothing_is_dropped_or_fails(function: str, shape: tuple[int, ...], each_backend: str) -> None:
    if shape[1] == 0 and function == "add_group_norm":
        shape = (0, 2, 3)  # no groups of no channels
    if "instance" in function and shape[2] == 0:
        pytest.skip("planes without elements have no statistics")
    x, residual = drawn(*shape)
    y, total = call(function, x, residual, dropout_p=0.3)
    assert y.shape == total.shape == shape
    assert [g.shape for g in torch.autograd.grad(scalar((y, total)), (x, residual))] == [shape, shape]


# --- cost ----------------------------------------------------------------------------------------------------------


@pytest.mark.one_in(2)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@every_norm
def test_nothing_more_is_kept(function: str, activation: str | None, triton_backend: None) -> None:
    """Neither mask nor factor: the eight bytes of the seed."""
    x, residual = drawn(3, 4, 9, dtype=torch.float32)
    found = []
    for p in (0.0, 0.3):
        with recorded() as kept:
            y, total = call(function, x, residual, activation=activation, dropout_p=p)
        names = {x.data_ptr(): "x", residual.data_ptr(): "residual", total.data_ptr(): "total", y.data_ptr(): "y"}
        found.append([(names.get(t.data_ptr()), tuple(t.shape), t.dtype) for t in kept])
    found[1].remove((None, (1,), torch.int64))
    assert found[0] == found[1] and "total" in dict.fromkeys(name for name, *_ in found[0])


@pytest.mark.one_in(3)
@of_shapes((6, 8), (2, 4, 7, 7), (2, 4, 40, 20))
def test_no_launch_more_each_way(
    function: str, shape: tuple[int, ...], triton_backend: None, launches: list[str]
) -> None:
    x, residual = drawn(*shape, dtype=torch.float32)
    found = []
    for p in (0.0, 0.3):
        launches.clear()
        outputs = call(function, x, residual, activation="gelu", dropout_p=p)
        forward = len(launches)
        torch.autograd.grad(scalar(outputs), (x, residual))
        found.append((launches[:forward], launches[forward:]))
    assert found[0] == found[1]
    if function in ROWS:
        assert found[1] == (["row_norm_forward_kernel"], ["row_norm_backward_kernel"])


@pytest.mark.one_in(2)
@pytest.mark.parametrize("layout", [torch.clone, channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("function", [function for function in SIX if function not in ROWS])
def test_layouts_are_kept(function: str, layout: Any, each_backend: str) -> None:
    x, residual = (layout(tensor.detach()).requires_grad_() for tensor in drawn(2, 4, 5, 3))
    y, total = seeded(0, function, x, residual)
    dx, dresidual = torch.autograd.grad(scalar((y, total)), (x, residual))
    assert order(y) == order(total) == order(x)
    if each_backend == "triton":
        assert order(dx) == order(dresidual) == order(x)
