"""Any layout of any operand gives what its contiguous copy gives; any shape, and one tensor in two places."""

from __future__ import annotations

import functools

import hypothesis
import pytest
import torch
from hypothesis import strategies

from fused_ops import functional as F
from tests.layouts import (
    Layout,
    every_other_column,
    every_third_row,
    few,
    in_buffer,
    layouts,
    left_columns,
    many,
    outer_dims_swapped,
    right_columns,
    transposed,
    unaligned,
)
from tests.norm_cases import (
    DEVICE,
    OPERANDS,
    Case,
    Result,
    assert_same_bits,
    check,
    normal,
    run_fused,
    run_reference,
    run_torch,
    same_bits,
    short,
    with_fields,
)
from tests.row_norm_cases import FUNCTIONS, make_case
from tests.tolerances import assert_within_budget, kernels_are_interpreted

pytestmark = [pytest.mark.one_in(8), pytest.mark.usefixtures("memory_checked")]

Tensor = torch.Tensor

ACTIVATION_SIZED = ("x", "residual", "dy", "dtotal")

# The torch composition is nearly what it is measured against: most of its runs are left to the long sweep.
mostly_kernels = pytest.mark.parametrize(
    "each_backend", ["triton", pytest.param("torch", marks=pytest.mark.full)], indirect=True
)
every_function = pytest.mark.parametrize("function", FUNCTIONS)


LAYOUTS = [
    every_other_column,
    left_columns,
    right_columns,
    every_third_row,
    unaligned,
    transposed,
    outer_dims_swapped,
]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)


@functools.cache
def contiguous_case(function: str, dtype: torch.dtype) -> tuple[Case, Result]:
    case = make_case(function, 3, 5, 40, dtype=dtype, residual=True, activation="silu")
    return case, run_fused(case)


def assert_as_contiguous(case: Case, contiguous: Case, expected: Result | None = None) -> None:
    """The same bits where kernels are interpreted; a GPU may add in another order at another alignment."""
    for name in ACTIVATION_SIZED + OPERANDS:
        assert same_bits(getattr(case, name), getattr(contiguous, name)), "the test changed the numbers"
    if kernels_are_interpreted():
        assert_same_bits(run_fused(case), expected or run_fused(contiguous))
    else:
        check(case)


# dtotal arrives only where there is a total.
OPERANDS_OF = [
    (function, operand)
    for function in FUNCTIONS
    for operand in ACTIVATION_SIZED
    if operand != "dtotal" or function.startswith("add_")
]
every_operand = pytest.mark.parametrize(("function", "operand"), OPERANDS_OF)


@pytest.mark.usefixtures("triton_backend")
@every_layout
@every_operand
def test_one_operand_in_another_layout(function: str, layout: Layout, operand: str) -> None:
    case, expected = contiguous_case(function, torch.float32)
    assert_as_contiguous(with_fields(case, **{operand: layout(getattr(case, operand))}), case, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@every_layout
@every_function
def test_every_operand_in_another_layout(each_backend: str, function: str, layout: Layout, dtype: torch.dtype) -> None:
    case = make_case(function, 3, 5, 40, dtype=dtype, residual=True, activation="silu")
    given = {name: getattr(case, name) for name in ACTIVATION_SIZED if getattr(case, name) is not None}
    check(with_fields(case, **{name: layout(tensor) for name, tensor in given.items()}))


@every_function
def test_x_and_residual_of_different_strides(each_backend: str, function: str) -> None:
    case = make_case(function, 3, 5, 40, residual=True, activation="silu")
    check(with_fields(case, x=left_columns(case.x), residual=every_third_row(case.residual), dy=transposed(case.dy)))


@pytest.mark.parametrize("dims", [1, 2, 3])
@every_function
def test_channels_last(each_backend: str, function: str, dims: int) -> None:
    """A row over (C, H, W) is not contiguous in channels_last, and neither is one over (H, W) or (W,)."""
    case = make_case(function, 2, 6, 4, 5, dims=dims, residual=True, activation="gelu")
    given = {name: getattr(case, name) for name in ACTIVATION_SIZED if getattr(case, name) is not None}
    channels_last = {name: tensor.to(memory_format=torch.channels_last) for name, tensor in given.items()}
    check(with_fields(case, **channels_last))
    check(with_fields(case, x=channels_last["x"]))
    check(with_fields(case, dy=channels_last["dy"]))


# --- expanded tensors: stride 0 ------------------------------------------------------------------------------------


@mostly_kernels
@pytest.mark.parametrize("shape", [(1, 1, 40), (3, 1, 40), (1, 5, 40), (3, 5, 1), (1, 1, 1)], ids=short)
@every_operand
def test_expanded(each_backend: str, function: str, operand: str, shape: tuple[int, ...]) -> None:
    case = make_case(function, 3, 5, 40, residual=True, activation="silu")
    expanded = normal(*shape, seed=9).expand(3, 5, 40)
    copied = with_fields(case, **{operand: expanded.contiguous()})
    case = with_fields(case, **{operand: expanded})
    if each_backend == "triton":
        assert_as_contiguous(case, copied)
    else:
        check(case)


def test_gradient_of_a_sum_is_expanded(each_backend: str) -> None:
    """What y.sum() and total.mean() send back has no stride at all."""
    case = make_case("add_layer_norm", 6, 40)
    ones = torch.ones((), device=DEVICE)
    check(with_fields(case, dy=ones.expand(6, 40), dtotal=(ones / 240).expand(6, 40)))


# --- weight and bias -----------------------------------------------------------------------------------------------


def strided_parameter(parameter: Tensor) -> Tensor:
    return in_buffer(parameter, (2 * len(parameter), *parameter.shape[1:]), lambda buffer: buffer[::2])


PARAMETER_LAYOUTS = [strided_parameter, unaligned, transposed]


@pytest.mark.parametrize("layout", PARAMETER_LAYOUTS, ids=lambda layout: layout.__name__)
@every_function
def test_parameters_in_another_layout(each_backend: str, function: str, layout: Layout) -> None:
    case = make_case(function, 7, 6, 8, dims=2, residual=True, activation="silu")
    changed = {name: layout(getattr(case, name)) for name in ("weight", "bias") if getattr(case, name) is not None}
    check(with_fields(case, **changed))


@every_function
def test_expanded_weight(each_backend: str, function: str) -> None:
    case = make_case(function, 7, 48)
    check(with_fields(case, weight=torch.full((), 1.5, device=DEVICE).expand(48)))


# --- one tensor in two places --------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@every_function
def test_x_is_the_residual_too(each_backend: str, function: str, activation: str | None) -> None:
    case = make_case(function, 6, 40, activation=activation)
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


@every_function
def test_one_tensor_everywhere(each_backend: str, function: str) -> None:
    same = normal(1, 40)
    check(make_case(function, 1, 40, residual=True, x=same, dy=same, weight=same[0], eps=0.1))


# --- sizes ---------------------------------------------------------------------------------------------------------

SHAPES = [  # shape, how many of its last dims are normalized
    ((16,), 1),
    ((6, 30), 1),
    ((6, 30), 2),
    ((3, 4, 20), 1),
    ((3, 4, 20), 2),
    ((3, 4, 20), 3),
    ((2, 3, 4, 6), 3),
    ((2, 3, 4, 6), 4),
    ((2, 3, 2, 3, 5), 1),
    ((2, 3, 2, 3, 5), 5),
    ((1, 1, 8), 1),
    ((1, 1, 8), 2),
    ((4, 8, 1), 1),
    ((4, 8, 1), 2),
    ((7, 1, 1, 9), 3),
]


@pytest.mark.parametrize(("shape", "dims"), SHAPES, ids=short)
@every_function
def test_normalized_shapes(each_backend: str, function: str, shape: tuple[int, ...], dims: int) -> None:
    check(make_case(function, *shape, dims=dims, dtype=torch.bfloat16, residual=True, activation="silu"))


@pytest.mark.parametrize(
    ("shape", "dims"),
    [((0, 8), 1), ((3, 0), 1), ((0, 0), 1), ((2, 0, 3), 1), ((2, 0, 3), 2), ((0, 2, 3), 2), ((0,), 1)],
    ids=short,
)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@every_function
def test_no_elements(
    each_backend: str, function: str, shape: tuple[int, ...], dims: int, activation: str | None
) -> None:
    check(make_case(function, *shape, dims=dims, residual=True, activation=activation))


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.full
def test_more_than_65535_rows() -> None:
    check(make_case("add_layer_norm", 66_000, 3, dtype=torch.float16, activation="silu"))


@pytest.mark.usefixtures("triton_backend")
@every_operand
def test_rows_more_than_two_to_the_31_apart(function: str, operand: str) -> None:
    case = make_case(function, 2, 64, dtype=torch.float16, residual=True, activation="silu")
    stride = 2**31 + 8
    storage = torch.UntypedStorage((stride + 64) * 2, device=DEVICE)  # memory that is not touched is not there
    far = torch.empty(0, dtype=torch.float16, device=DEVICE).set_(storage, 0, (2, 64), (stride, 1))
    far.copy_(getattr(case, operand))
    assert_as_contiguous(with_fields(case, **{operand: far}), case)


# --- drawn at random -----------------------------------------------------------------------------------------------


@strategies.composite
def laid_out_cases(draw: strategies.DrawFn) -> tuple[Case, Case]:
    """A case in drawn layouts, and its contiguous copy."""
    shape = tuple(draw(strategies.lists(strategies.integers(1, 6), min_size=1, max_size=5)))
    dims = draw(strategies.integers(1, len(shape)))
    function = draw(strategies.sampled_from(FUNCTIONS))
    dtype = draw(strategies.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    activation = draw(strategies.sampled_from([None, "relu", "silu"]))
    residual = draw(strategies.booleans())
    case = make_case(function, *shape, dims=dims, dtype=dtype, residual=residual, activation=activation)
    fields = {name: tensor for name in ACTIVATION_SIZED if (tensor := getattr(case, name)) is not None}
    fields = {name: draw(layouts(shape))(tensor) for name, tensor in fields.items()}
    contiguous = {name: tensor.contiguous() for name, tensor in fields.items()}
    return with_fields(case, **fields), with_fields(case, **contiguous)


def _check_drawn_layouts(cases: tuple[Case, Case]) -> None:
    case, contiguous = cases
    actual, copied = run_fused(case), run_fused(contiguous)
    if kernels_are_interpreted():
        assert_same_bits(actual, copied)
        return
    expected = run_reference(contiguous).everything()
    for name, tensor in actual.everything().items():
        if tensor is not None:
            terms = case.rows if name in ("dweight", "dbias") else 1
            assert_within_budget(name, tensor, copied.everything()[name], expected[name], terms)


@pytest.mark.usefixtures("triton_backend")
def test_drawn_layouts() -> None:
    few(hypothesis.given(laid_out_cases())(_check_drawn_layouts))()


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.full
def test_many_drawn_layouts() -> None:
    many(hypothesis.given(laid_out_cases())(_check_drawn_layouts))()
