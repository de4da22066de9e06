"""Any layout of any operand gives the same numbers, in x's own layout, or the plain one where x has neither."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies

from fused_ops import functional as F
from tests.channel_norm_cases import ACTIVATION_SIZED, FUNCTIONS, ChannelCase, make_case, with_layout
from tests.layouts import (
    Layout,
    channels_last,
    channels_of_more,
    channels_of_more_channels_last,
    every_other_column,
    every_third_row,
    few,
    in_buffer,
    layouts,
    left_columns,
    lies_as,
    samples_apart_channels_last,
    samples_last,
    spatial_dims_swapped,
    spatial_dims_swapped_channels_last,
    transposed,
    unaligned,
    unaligned_channels_last,
)
from tests.norm_cases import (
    DEVICE,
    check,
    run_fused,
    run_reference,
    run_torch,
    short,
    with_fields,
)
from tests.tolerances import assert_within_budget

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels")

pytestmark = [pytest.mark.one_in(8), pytest.mark.usefixtures("triton_backend", "memory_checked")]

Tensor = torch.Tensor

# --- layouts -------------------------------------------------------------------------------------------------------

# What kernels read as it is: samples without gaps, of either kind.
READ_AS_THEY_ARE = {
    torch.Tensor.contiguous: False,
    channels_last: True,
    every_third_row: False,
    channels_of_more: False,
    unaligned: False,
    samples_apart_channels_last: True,
    unaligned_channels_last: True,
}
COPIED = [
    channels_of_more_channels_last,
    every_other_column,
    left_columns,
    spatial_dims_swapped,
    spatial_dims_swapped_channels_last,
    samples_last,
    transposed,
]
# Of these, what neighbouring channels tell to be channels_last, and stays so.
KEPT_CHANNELS_LAST = (channels_of_more_channels_last, spatial_dims_swapped_channels_last)
every_layout = pytest.mark.parametrize("layout", [*READ_AS_THEY_ARE, *COPIED], ids=lambda layout: layout.__name__)
either = pytest.mark.parametrize("base", [torch.Tensor.contiguous, channels_last], ids=["contiguous", "channels_last"])

QUICK_OPERANDS = [
    ("group_norm", "x"),
    ("instance_norm", "dy"),
    ("add_group_norm", "residual"),
    ("add_instance_norm", "dtotal"),
]
# Every operand of every function: dtotal arrives only where there is a total.
OPERANDS_OF = [
    pytest.param(function, operand, marks=[] if (function, operand) in QUICK_OPERANDS else pytest.mark.full)
    for function in FUNCTIONS
    for operand in ACTIVATION_SIZED
    if operand != "dtotal" or function.startswith("add_")
]
every_operand = pytest.mark.parametrize(("function", "operand"), OPERANDS_OF)
every_function = pytest.mark.parametrize("function", FUNCTIONS)
few_functions = pytest.mark.parametrize(
    "function", [pytest.param(name, marks=[] if name in FUNCTIONS[::3] else pytest.mark.full) for name in FUNCTIONS]
)


def stays_channels_last(layout: Layout) -> bool:
    return READ_AS_THEY_ARE.get(layout, layout in KEPT_CHANNELS_LAST)


def small_case(function: str, *shape: int, dtype: torch.dtype = torch.float16, **fields: Any) -> ChannelCase:
    """Three channels a group, which a tile pads to four, in planes so short and so many that they move as one run; in
    half, whose own rounding is far larger than what so few elements differ by."""
    fields = {"residual": True, "activation": "silu", **fields}
    shape = shape or (2, 12 if "group" in function else 4, 6, 7)
    return make_case(function, *shape, groups=4, dtype=dtype, **fields)


def check_layout(case: ChannelCase, is_channels_last: bool) -> None:
    """`check`, and that y, total, dx and dresidual lie one after the other in the one or the other order."""
    actual = check(case)
    gradients = {name: actual.gradients[name] for name in ("dx", "dresidual") if actual.gradients.get(name) is not None}
    layout = channels_last if is_channels_last else torch.Tensor.contiguous
    for name, tensor in {**actual.outputs, **gradients}.items():
        assert lies_as(tensor, layout), f"{name}: {tensor.stride()}"


# --- one operand, and all ------------------------------------------------------------------------------------------


@every_layout
@every_operand
def test_one_operand_in_another_layout(function: str, operand: str, layout: Layout) -> None:
    case = with_layout(small_case(function), layout, operand)
    check_layout(case, operand == "x" and stays_channels_last(layout))


@every_layout
@pytest.mark.parametrize(
    ("function", "operand"),
    [
        pytest.param("group_norm", "residual", marks=pytest.mark.full),
        ("group_norm", "dy"),
        pytest.param("add_instance_norm", "dtotal", marks=pytest.mark.full),
    ],
)
def test_one_operand_in_another_layout_beside_channels_last(function: str, operand: str, layout: Layout) -> None:
    case = with_layout(with_layout(small_case(function), channels_last), layout, operand)
    check_layout(case, True)


@pytest.mark.parametrize("shape", [(3, 12, 7), (2, 8, 4, 5), (2, 12, 2, 3, 4)], ids=short)
@pytest.mark.parametrize(
    "layout",
    [channels_last, samples_apart_channels_last, pytest.param(channels_of_more_channels_last, marks=pytest.mark.full)],
)
@few_functions
def test_every_operand_in_another_layout(function: str, layout: Layout, shape: tuple[int, ...]) -> None:
    """(N, L, C) seen as (N, C, L), channels_last and channels_last_3d, where residual and dy lie as x does."""
    case = small_case(function, *shape)
    check_layout(with_layout(case, layout), stays_channels_last(layout))


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=short)
@every_layout
@every_function
def test_every_operand_of_every_type_in_another_layout(function: str, layout: Layout, dtype: torch.dtype) -> None:
    case = small_case(function, 4, 12, 15, 14, dtype=dtype)
    check_layout(with_layout(case, layout), stays_channels_last(layout))


@pytest.mark.parametrize("dims", [1, 2, 3])
@either
def test_dy_of_the_other_layout_with_a_batch_of_one(base: Layout, dims: int) -> None:
    """Where torch's own instance_norm is wrong: off by 4.6 on unit normal data in 3-D."""
    case = with_layout(make_case("instance_norm", 1, 4, *(3, 4, 5)[:dims], dtype=torch.float64), base)
    other = channels_last if base is not channels_last else torch.Tensor.contiguous
    actual, expected = run_fused(with_layout(case, other, "dy")), run_reference(case)
    for name, gradient in actual.gradients.items():
        torch.testing.assert_close(gradient.double().cpu(), expected.gradients[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "shape", [(3, 1, 4, 5), (3, 6, 1, 5), (1, 6, 4, 1), (1, 1, 4, 5), (3, 6, 1, 1), (3, 6), (1, 6, 1, 2)], ids=short
)
@either
def test_sizes_of_one(shape: tuple[int, ...], base: Layout) -> None:
    """Whose strides say nothing, whatever they are."""
    case = make_case("group_norm", *shape, dtype=torch.float16, residual=True, activation="silu")
    case = with_layout(case, base)
    strides = [7 if size == 1 else stride for size, stride in zip(shape, case.x.stride(), strict=True)]
    check_layout(with_fields(case, x=case.x.as_strided(shape, strides)), base is channels_last)


# --- what is copied ------------------------------------------------------------------------------------------------


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Grows by every tensor that a launch is given from outside."""
    from fused_ops.kernels.launcher import Launcher

    tensors: list[Tensor] = []
    original = Launcher.__call__

    def noted(self: Any, programs: int, device: Any, given: Any, *rest: Any) -> None:
        tensors.extend(tensor for tensor in given if tensor is not None)
        original(self, programs, device, given, *rest)

    monkeypatch.setattr(Launcher, "__call__", noted)
    return tensors


@pytest.mark.parametrize("layout", READ_AS_THEY_ARE, ids=lambda layout: layout.__name__)
@few_functions
def test_what_lies_in_either_layout_is_not_copied(function: str, layout: Layout, given: list[Tensor]) -> None:
    """Of all tensors of x's size, the kernels see those of the caller and those that they return."""
    case = with_layout(small_case(function, activation="gelu"), layout)
    result = run_fused(case)
    known = [getattr(case, name) for name in ACTIVATION_SIZED if getattr(case, name) is not None]
    known += [*result.outputs.values(), *(result.gradients[name] for name in ("dx", "dresidual"))]
    addresses = {tensor.data_ptr() for tensor in known}
    seen = {tensor.data_ptr() for tensor in given if tensor.numel() == case.x.numel()}
    assert seen <= addresses
    assert {tensor.data_ptr() for tensor in (case.x, case.residual, case.dy)} <= seen


@pytest.mark.parametrize("copied", [*COPIED, channels_last], ids=lambda layout: layout.__name__)
def test_what_lies_otherwise_is_copied_once_a_pass(copied: Layout, given: list[Tensor]) -> None:
    case = with_layout(small_case("group_norm", activation=None, residual=False), copied, "dy")
    run_fused(case)
    strange = {tensor.data_ptr() for tensor in given if tensor.numel() == case.x.numel()} - {case.x.data_ptr()}
    assert len(strange) == 1


# --- expanded tensors: stride 0 ------------------------------------------------------------------------------------


def expanded(*dims: int) -> Layout:
    """The first of each of these dims in the place of all."""

    def layout(tensor: Tensor) -> Tensor:
        shape = tensor.shape
        for dim in dims:
            tensor = tensor.narrow(dim, 0, 1)
        return tensor.clone().expand(shape)

    return layout


EXPANDED = [(0,), (1,), (2, 3), (3,), (0, 1, 2, 3), (0, 2, 3)]


@pytest.mark.parametrize("dims", EXPANDED, ids=short)
@every_operand
def test_expanded(function: str, operand: str, dims: tuple[int, ...]) -> None:
    check(with_layout(small_case(function), expanded(*dims), operand))


@pytest.mark.parametrize("dims", EXPANDED[:3], ids=short)
@few_functions
def test_expanded_channels_last(function: str, dims: tuple[int, ...]) -> None:
    case = with_layout(small_case(function), channels_last)
    check_layout(with_layout(case, expanded(*dims), "residual", "dy"), True)
    check(with_layout(case, expanded(*dims), "x"))


@either
def test_gradient_of_a_sum_is_expanded(base: Layout) -> None:
    """What y.sum() and total.mean() send back has no stride at all."""
    case = with_layout(small_case("add_group_norm"), base)
    ones = torch.ones((), dtype=torch.float16, device=DEVICE).expand(case.x.shape)
    check(with_fields(case, dy=ones, dtotal=(ones[:1, :1, :1, :1] / 1008).expand(case.x.shape)))


# --- weight and bias, and one tensor in two places -----------------------------------------------------------------


def strided_parameter(parameter: Tensor) -> Tensor:
    return in_buffer(parameter, (2 * len(parameter),), lambda buffer: buffer[::2])


@pytest.mark.parametrize("layout", [strided_parameter, unaligned], ids=lambda layout: layout.__name__)
@either
def test_parameters_in_another_layout(base: Layout, layout: Layout) -> None:
    check(with_layout(with_layout(small_case("group_norm"), base), layout, "weight", "bias"))


@either
def test_expanded_weight(base: Layout) -> None:
    case = small_case("instance_norm")
    weight = torch.full((), 1.5, dtype=torch.float16, device=DEVICE).expand(4)
    check(with_layout(with_fields(case, weight=weight), base))


@either
@pytest.mark.parametrize("activation", [None, pytest.param("silu", marks=pytest.mark.full)])
@few_functions
def test_x_is_the_residual_too(function: str, activation: str | None, base: Layout) -> None:
    case = with_layout(small_case(function, activation=activation), base)
    case = with_fields(case, residual=case.x)
    check(case)  # two leaves that share memory

    x = case.x.clone().requires_grad_()
    args, kwargs = case.arguments({**case.leaves(), "x": x, "residual": x})
    outputs = getattr(F, function)(*args, **kwargs)
    outputs, arrived = (outputs, (case.dy, case.dtotal)) if case.adds_first else ((outputs,), (case.dy,))
    (dx,) = torch.autograd.grad(outputs, [x], arrived)
    of_torch, expected = (run(case).gradients for run in (run_torch, run_reference))
    both = [found["dx"] + found["dresidual"] for found in (of_torch, expected)]
    assert_within_budget("dx + dresidual", dx, *both)


# --- sizes ---------------------------------------------------------------------------------------------------------


@either
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("shape", [(0, 4, 6), (2, 4, 0), (2, 4, 0, 3), (0, 4, 2, 3), (0, 4, 0)], ids=short)
@every_function
def test_no_elements(function: str, shape: tuple[int, ...], activation: str | None, base: Layout) -> None:
    """Not all of which torch takes. No kernel runs, and parameters get zeros."""
    case = with_layout(small_case(function, *shape, activation=activation), base)
    result = run_fused(case)
    for name, tensor in result.everything().items():
        assert tensor is not None and not tensor.any(), name
        assert tensor.shape == ((4,) if name in ("dweight", "dbias") else shape), name


def test_no_channels() -> None:
    case = make_case("group_norm", 2, 0, 3, dtype=torch.float16, groups=1)
    assert run_fused(case).outputs["y"].shape == (2, 0, 3)


@either
@pytest.mark.parametrize("operand", ["x", pytest.param("dy", marks=pytest.mark.full)])
def test_samples_more_than_two_to_the_31_apart(operand: str, base: Layout) -> None:
    case = with_layout(small_case("group_norm", 2, 8, 3, 8), base)
    stride = 2**31 + 8
    storage = torch.UntypedStorage((stride + 192) * 2, device=DEVICE)  # memory that is not touched is not there
    far = torch.empty(0, dtype=torch.float16, device=DEVICE)
    tensor = getattr(case, operand)
    far.set_(storage, 0, tensor.shape, (stride, *tensor.stride()[1:])).copy_(tensor)
    check_layout(with_fields(case, **{operand: far}), base is channels_last)


@pytest.mark.full
def test_more_than_65535_samples() -> None:
    check(make_case("group_norm", 66_000, 2, 2, groups=1, dtype=torch.float16, residual=True, activation="silu"))


# --- drawn at random -----------------------------------------------------------------------------------------------


@strategies.composite
def laid_out_cases(draw: strategies.DrawFn) -> ChannelCase:
    groups = draw(strategies.integers(1, 3))
    channels = groups * draw(strategies.integers(1, 3))
    positions = draw(strategies.lists(strategies.integers(1, 5), min_size=1, max_size=3))
    positions[-1] += 1  # instance norm takes no planes of one element
    shape = (draw(strategies.integers(1, 3)), channels, *positions)
    dtype = draw(strategies.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    activation = draw(strategies.sampled_from([None, "relu", "silu"]))
    function = draw(strategies.sampled_from(FUNCTIONS))
    residual = draw(strategies.booleans())
    case = make_case(function, *shape, groups=groups, dtype=dtype, residual=residual, activation=activation)
    fields = {name: tensor for name in ACTIVATION_SIZED if (tensor := getattr(case, name)) is not None}
    return with_fields(case, **{name: draw(layouts(shape))(tensor) for name, tensor in fields.items()})


def check_drawn_layouts(case: ChannelCase) -> None:
    """What its copy in the layout of the result gives, to the bit where both take the same tiles."""
    actual = run_fused(case)
    in_channels_last = not actual.outputs["y"].is_contiguous()
    dense = run_fused(with_layout(case, channels_last if in_channels_last else torch.Tensor.contiguous)).everything()
    for name, tensor in actual.everything().items():
        if tensor is not None:
            torch.testing.assert_close(tensor, dense[name], equal_nan=True, msg=lambda text, n=name: f"{n}: {text}")


quick = hypothesis.settings(few, max_examples=10)
long = hypothesis.settings(few, max_examples=300)


def test_drawn_layouts() -> None:
    quick(hypothesis.given(laid_out_cases())(check_drawn_layouts))()


@pytest.mark.full
def test_many_drawn_layouts() -> None:
    long(hypothesis.given(laid_out_cases())(check_drawn_layouts))()
