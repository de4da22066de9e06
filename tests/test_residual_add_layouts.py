"""Any layout of any operand gives what its contiguous copy gives, what is dropped included, and y lies as x does."""

from __future__ import annotations

import functools

import hypothesis
import pytest
import torch
from hypothesis import strategies

from fused_ops import functional as F
from tests.layouts import (
    Layout,
    channels_last,
    channels_of_more,
    channels_of_more_channels_last,
    every_other_column,
    every_third_row,
    few,
    layouts,
    left_columns,
    many,
    outer_dims_swapped,
    right_columns,
    samples_apart_channels_last,
    samples_last,
    spatial_dims_swapped,
    spatial_dims_swapped_channels_last,
    transposed,
    unaligned,
    unaligned_channels_last,
)
from tests.norm_cases import DEVICE, Result, normal, same_bits, short, with_fields
from tests.residual_add_cases import (
    EACH_KIND,
    IMAGE,
    AddCase,
    check,
    factor_of,
    make_case,
    run_fused,
    run_reference,
    run_torch,
    with_exact_sums,
    with_layout,
)
from tests.tolerances import assert_within_budget, kernels_are_interpreted

pytestmark = pytest.mark.usefixtures("memory_checked")

Tensor = torch.Tensor


def negated(tensor: Tensor) -> Tensor:
    """A view that torch negates as it reads, as the imaginary part of a conjugate is one."""
    return torch._neg_view(-tensor)


def reversed_dims(tensor: Tensor) -> Tensor:
    order = tuple(range(tensor.dim() - 1, -1, -1))
    return tensor.permute(order).contiguous().permute(order)


LAYOUTS = [
    every_other_column,
    left_columns,
    right_columns,
    every_third_row,
    unaligned,
    negated,
    transposed,
    outer_dims_swapped,
    reversed_dims,
    channels_last,
    samples_apart_channels_last,
    unaligned_channels_last,
    channels_of_more,
    channels_of_more_channels_last,
    spatial_dims_swapped,
    spatial_dims_swapped_channels_last,
    samples_last,
]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
DROPS = {"dropout_p": 0.3, "drop_path_p": 0.4}


@functools.cache
def contiguous_case(activation: str | None) -> tuple[AddCase, Result]:
    case = make_case(*IMAGE, scale=(6, 1, 1), activation=activation, **DROPS)
    return case, run_fused(case)


def assert_same_elements(actual: Result, expected: Result) -> None:
    """Every bit of all but dscale, which is summed in another order."""
    for name in ("y", "dx", "dresidual"):
        found, other = actual.everything()[name], expected.everything()[name]
        assert found is not None and same_bits(found.resolve_neg(), other), name


def assert_as_contiguous(case: AddCase, contiguous: AddCase, expected: Result | None = None) -> None:
    """The numbers, and where kernels are interpreted their bits."""
    actual = check(case)
    if kernels_are_interpreted():
        assert_same_elements(actual, expected or run_fused(contiguous))


# --- one operand, and all of them ----------------------------------------------------------------------------------


@pytest.mark.one_in(7)
@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("operand", ["x", "residual", "dy"])
@every_layout
def test_one_operand_in_another_layout(layout: Layout, operand: str, activation: str) -> None:
    case, expected = contiguous_case(activation)
    assert_as_contiguous(with_layout(case, layout, operand), case, expected)


# What decides where an element's scale, sample and index are looked for: a scale, drops, both or neither.
NEEDS = {
    "nothing": {},
    "a scale": {"scale": (6, 1, 1)},
    "a scale of columns": {"scale": (4,)},
    "a scale of samples": {"scale": (3, 1, 1, 1)},
    "a scale of everything": {"scale": IMAGE},
    "dropout": {"dropout_p": 0.3},
    "drop-path": {"drop_path_p": 0.4},
    "a scale and drops": {"scale": (6, 1, 1), **DROPS},
}


@pytest.mark.one_in(20)
@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("activation", EACH_KIND)
@pytest.mark.parametrize("needs", NEEDS)
@every_layout
def test_every_operand_in_another_layout(layout: Layout, needs: str, activation: str | None) -> None:
    case = make_case(*IMAGE, activation=activation, **NEEDS[needs])
    assert_as_contiguous(with_layout(case, layout), case)


@pytest.mark.one_in(8)
@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=short)
@every_layout
def test_other_types_in_another_layout(layout: Layout, dtype: torch.dtype) -> None:
    case = make_case(*IMAGE, dtype=dtype, scale=(6, 1, 1), activation="relu", **DROPS)
    check(with_layout(case, layout))


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("activation", EACH_KIND)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=short)
def test_all_layouts_differ(half: torch.dtype, activation: str | None) -> None:
    for residual_dtype in (half, torch.float32):
        case = make_case(*IMAGE, dtype=half, residual_dtype=residual_dtype, activation=activation)
        case = with_layout(with_layout(with_exact_sums(case), channels_last, "x"), every_third_row, "residual")
        check(with_layout(case, spatial_dims_swapped, "dy"))


@pytest.mark.one_in(6)
@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize(
    "needs", ["nothing", "drops", "channels", "channels, drops", "columns, drops", "samples", "all"]
)
@pytest.mark.parametrize("shape", [(2, 24, 5), (2, 8, 3, 3), (2, 16, 7, 7), (2, 3, 2, 3, 4), (3, 8, 1, 1)], ids=short)
def test_channels_last(shape: tuple[int, ...], needs: str) -> None:
    """Channels in groups of eight and others, one position and many; the gradients lie so, too."""
    fields = {"dropout_p": 0.3, "drop_path_p": 0.4} if "drop" in needs else {}
    ones = [1] * (len(shape) - 2)
    scales = {"channels": (shape[1], *ones), "columns": shape[-1:], "samples": (shape[0], 1, *ones), "all": shape}
    case = make_case(*shape, activation="relu", scale=scales.get(needs.split()[0]), **fields)
    assert_as_contiguous(with_layout(case, channels_last), case)
    found = run_fused(with_layout(case, channels_last))
    for name in ("y", "dx", "dresidual"):
        lain_out = found.everything()[name]
        assert lain_out is not None and lain_out.stride() == torch.empty_like(channels_last(case.x)).stride(), name


@pytest.mark.one_in(3)
@pytest.mark.usefixtures("each_backend")
@every_layout
def test_y_lies_as_x(layout: Layout) -> None:
    """Whatever the residual's layout, as in `x + residual`."""
    case = make_case(*IMAGE, dtype=torch.float16, residual_dtype=torch.float32)
    x = layout(case.x)
    for rates in ({}, DROPS):
        for scale in (None, normal(6, 1, 1)):
            y = F.residual_add(x, channels_last(case.residual), scale=scale, activation="gelu", **rates)
            assert y.stride() == torch.empty_like(x).stride() and y.dtype == torch.float32


# --- what is dropped does not depend on where it lies --------------------------------------------------------------


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("triton_backend")
@every_layout
def test_what_is_dropped_goes_by_logical_index(layout: Layout) -> None:
    case = make_case(*IMAGE, **DROPS)
    assert torch.equal(factor_of(with_layout(case, layout)), factor_of(case))


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=short)
def test_what_is_dropped_depends_on_no_shape_and_no_type(dtype: torch.dtype) -> None:
    """An element's index and a sample's are all that counts: blocks of a program, which types change, do not."""
    flat = make_case(1200, dropout_p=0.3)
    expected = factor_of(flat) != 0
    for shape in ((30, 40), (40, 30), (3, 4, 100), (2, 2, 3, 10, 10)):
        assert torch.equal(factor_of(make_case(*shape, dtype=dtype, dropout_p=0.3)).flatten() != 0, expected)
    longer = factor_of(make_case(1201, dtype=dtype, dropout_p=0.3)) != 0
    assert torch.equal(longer[:1200], expected)

    samples = factor_of(make_case(60, 1, drop_path_p=0.3)).flatten() != 0
    for shape in ((60, 7), (60, 3, 8), (60,)):
        by_sample = factor_of(make_case(*shape, dtype=dtype, drop_path_p=0.3)) != 0
        assert torch.equal(by_sample, samples.view(-1, *[1] * (len(shape) - 1)).expand(shape))


# --- expanded tensors: stride 0 ------------------------------------------------------------------------------------


@pytest.mark.one_in(4)
@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("operand", ["x", "residual", "dy"])
@pytest.mark.parametrize("shape", [(1, 6, 5, 4), (3, 1, 5, 4), (3, 6, 1, 1), (3, 6, 5, 1), (1, 1, 1, 1)], ids=short)
def test_expanded(shape: tuple[int, ...], operand: str) -> None:
    case = make_case(*IMAGE, scale=(6, 1, 1), activation="silu", **DROPS)
    expanded = normal(*shape, seed=9).expand(IMAGE)
    contiguous = with_fields(case, **{operand: expanded.contiguous()})
    assert_as_contiguous(with_fields(case, **{operand: expanded}), contiguous)


def test_gradient_of_a_sum_is_expanded(each_backend: str) -> None:
    """What y.sum() sends back has no stride at all, and is handed on as it is where nothing is to be computed."""
    ones = torch.ones((), device=DEVICE).expand(IMAGE)
    for activation in EACH_KIND:
        check(make_case(*IMAGE, activation=activation, dy=ones))
        check(make_case(*IMAGE, activation=activation, scale=(6, 1, 1), dy=ones, **DROPS))


def test_an_expanded_scale(each_backend: str) -> None:
    one = torch.full((), 1.5, device=DEVICE)
    case = make_case(*IMAGE, activation="gelu", **DROPS)
    for shape in ((4,), (6, 1, 1), (6, 5, 4), IMAGE):
        check(with_fields(case, scale=one.expand(shape)))


# --- one tensor in two places --------------------------------------------------------------------------------------


@pytest.mark.one_in(2)
@pytest.mark.parametrize("needs", ["nothing", "a scale", "a scale and drops"])
@pytest.mark.parametrize("activation", EACH_KIND)
def test_x_is_the_residual_too(each_backend: str, activation: str | None, needs: str) -> None:
    case = make_case(*IMAGE, activation=activation, **NEEDS[needs])
    case = with_fields(case, residual=case.x)
    check(case)  # two leaves that share memory

    x = case.x.clone().requires_grad_()
    torch.manual_seed(case.seed)
    y = F.residual_add(x, x, scale=case.scale, **case.keywords)
    (dx,) = torch.autograd.grad(y, [x], case.dy)
    of_torch, expected = (run(case).gradients for run in (run_torch, run_reference))
    both = [found["dx"] + found["dresidual"] for found in (of_torch, expected)]
    assert_within_budget("dx + dresidual", dx, *both)


def test_one_tensor_everywhere(each_backend: str) -> None:
    same = normal(2, 40)
    case = make_case(2, 40, x=same, residual=same, dy=same, activation="silu", dropout_p=0.5)
    check(with_fields(case, scale=same[0]))


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("operand", ["x", "residual", "dy"])
def test_rows_more_than_two_to_the_31_apart(operand: str) -> None:
    case = make_case(2, 64, dtype=torch.float16, activation="silu", scale=(64,))
    stride = 2**31 + 8
    storage = torch.UntypedStorage((stride + 64) * 2, device=DEVICE)  # memory that is not touched is not there
    far = torch.empty(0, dtype=torch.float16, device=DEVICE).set_(storage, 0, (2, 64), (stride, 1))
    far.copy_(getattr(case, operand))
    actual, expected = (run_fused(made).everything() for made in (with_fields(case, **{operand: far}), case))
    assert all(same_bits(actual[name], expected[name]) for name in ("y", "dx", "dresidual"))


# --- drawn at random -----------------------------------------------------------------------------------------------


@strategies.composite
def laid_out_cases(draw: strategies.DrawFn) -> tuple[AddCase, AddCase]:
    """A case in drawn layouts, with a scale of any shape, and its contiguous copy."""
    shape = tuple(draw(strategies.lists(strategies.integers(1, 5), min_size=1, max_size=4)))
    scale = None
    if draw(strategies.booleans()):
        first = draw(strategies.integers(0, len(shape)))
        scale = tuple(size if draw(strategies.booleans()) else 1 for size in shape[first:])
    fields = {
        "dtype": draw(strategies.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        "activation": draw(strategies.sampled_from([None, "relu", "silu"])),
        "dropout_p": draw(strategies.sampled_from([0.0, 0.3])),
        "drop_path_p": draw(strategies.sampled_from([0.0, 0.4])),
    }
    case = make_case(*shape, scale=scale, **fields)
    laid_out = {name: draw(layouts(shape))(getattr(case, name)) for name in ("x", "residual", "dy")}
    contiguous = {name: tensor.contiguous() for name, tensor in laid_out.items()}
    return with_fields(case, **laid_out), with_fields(case, **contiguous)


def _check_drawn_layouts(cases: tuple[AddCase, AddCase]) -> None:
    case, contiguous = cases
    if not kernels_are_interpreted():
        check(case)
        return
    actual, copied = run_fused(case), run_fused(contiguous)
    assert_same_elements(actual, copied)
    if case.scale is not None:
        expected = run_reference(contiguous).gradients["dscale"]
        assert_within_budget("dscale", actual.gradients["dscale"], copied.gradients["dscale"], expected, case.terms)


@pytest.mark.usefixtures("triton_backend")
def test_drawn_layouts() -> None:
    fewer = hypothesis.settings(few, max_examples=12)  # each draws four masks, which takes an interpreter long
    fewer(hypothesis.given(laid_out_cases())(_check_drawn_layouts))()


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.full
def test_many_drawn_layouts() -> None:
    many(hypothesis.given(laid_out_cases())(_check_drawn_layouts))()
