"""The numbers of residual_add, forward and backward, against NumPy float64 within torch eager's own error."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from fused_ops import Activation, use_backend
from tests.norm_cases import DTYPES, HALF, TORCH_ACTIVATIONS, Result, same_bits, short, with_fields
from tests.residual_add_cases import (
    EACH_KIND,
    IMAGE,
    SCALES,
    AddCase,
    check,
    factor_of,
    has_gap,
    make_case,
    masks_of,
    run_fused,
    run_reference,
    run_torch,
    with_exact_sums,
)
from tests.tolerances import allowed_error, assert_within_budget, largest_error, rounding

pytestmark = pytest.mark.usefixtures("memory_checked")

Tensor = torch.Tensor

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=short)
every_kind = pytest.mark.parametrize("activation", EACH_KIND)
# The torch composition is nearly what it is measured against: most of its runs are left to the long sweep.
mostly_kernels = pytest.mark.parametrize(
    "each_backend", ["triton", pytest.param("torch", marks=pytest.mark.full)], indirect=True
)
# Inf * 0 is what these tests are about, and NumPy, which interprets the kernels, warns of it.
non_finite = pytest.mark.filterwarnings("ignore::RuntimeWarning")

ACTIVATIONS = [
    *TORCH_ACTIVATIONS,
    Activation("leaky_relu", negative_slope=0.3),
    Activation("leaky_relu", negative_slope=-0.5),
    Activation("elu", alpha=1.7),
    Activation("softplus", beta=2.0, threshold=3.0),
]
WAYS: dict[str, dict[str, Any]] = {
    "bare": {},
    "scaled": {"scale": (6, 1, 1)},
    "dropped": {"dropout_p": 0.3},
    "everything": {"scale": (6, 1, 1), "dropout_p": 0.3, "drop_path_p": 0.4},
}


# --- types and activations -----------------------------------------------------------------------------------------


@pytest.mark.one_in(4)
@pytest.mark.usefixtures("each_backend")
@every_kind
@every_dtype
@pytest.mark.parametrize("way", WAYS)
def test_ordinary_data(way: str, dtype: torch.dtype, activation: str | None) -> None:
    case = make_case(*IMAGE, dtype=dtype, activation=activation, **WAYS[way])
    check(with_exact_sums(case) if activation == "relu" else case)


@pytest.mark.one_in(3)
@mostly_kernels
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("way", ["bare", "everything"])
def test_every_activation(each_backend: str, way: str, activation: str | Activation) -> None:
    check(make_case(*IMAGE, activation=activation, **WAYS[way]))


@pytest.mark.one_in(9)
@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("dtype", [*HALF, torch.float64], ids=short)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("way", ["bare", "everything"])
def test_every_activation_in_other_types(way: str, activation: str | Activation, dtype: torch.dtype) -> None:
    check(with_exact_sums(make_case(*IMAGE, dtype=dtype, activation=activation, **WAYS[way])))


@pytest.mark.one_in(3)
@pytest.mark.usefixtures("each_backend")
@every_kind
@pytest.mark.parametrize("dtype", HALF, ids=short)
@pytest.mark.parametrize("way", WAYS)
def test_float32_residual_of_half_x(way: str, dtype: torch.dtype, activation: str | None) -> None:
    case = make_case(*IMAGE, dtype=dtype, residual_dtype=torch.float32, activation=activation, **WAYS[way])
    actual = check(case)
    assert actual.outputs["y"].dtype == actual.gradients["dresidual"].dtype == torch.float32
    assert actual.gradients["dx"].dtype == dtype
    if way == "bare" and activation is None:
        assert same_bits(actual.outputs["y"], case.residual + case.x)


MIXED = [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float16, torch.bfloat16),
    (torch.float64, torch.float32),
]


@pytest.mark.one_in(3)
@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize(("dtype", "scale_dtype"), MIXED, ids=short)
def test_a_scale_of_another_type(
    dtype: torch.dtype, scale_dtype: torch.dtype, activation: str | None, drops: bool
) -> None:
    rates = {"dropout_p": 0.3, "drop_path_p": 0.4} if drops else {}
    check(make_case(*IMAGE, dtype=dtype, scale=(4,), scale_dtype=scale_dtype, activation=activation, **rates))


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=short)
def test_a_float64_scale_is_rounded_to_float32(dtype: torch.dtype) -> None:
    """All arithmetic is float32: so is the error of what is then stored as float64."""
    case = make_case(*IMAGE, dtype=dtype, scale=(4,), scale_dtype=torch.float64, activation="gelu")
    actual, eager, expected = (run(case).everything() for run in (run_fused, run_torch, run_reference))
    assert actual["dscale"].dtype == torch.float64
    for name in ("y", "dx", "dresidual"):
        assert_within_budget(name, actual[name], eager[name], expected[name])
    in_float32 = run_torch(with_fields(case, scale=case.scale.float())).gradients["dscale"]
    allowed = allowed_error(in_float32, expected["dscale"], torch.float32, case.terms)
    assert largest_error(actual["dscale"], expected["dscale"]) <= allowed


@pytest.mark.usefixtures("triton_backend")
@every_kind
@pytest.mark.parametrize("dtype", HALF, ids=short)
def test_each_output_is_rounded_once(dtype: torch.dtype, activation: str | None) -> None:
    """The scale, the drops and the activation cost no rounding of their own, whose sum is in float32."""
    case = make_case(*IMAGE, dtype=dtype, activation=activation, **WAYS["everything"])
    actual, expected = run_fused(case), run_reference(case)
    truncates = 2 if dtype == torch.bfloat16 else 1
    for name, found in actual.everything().items():
        want = expected.everything()[name]
        in_float32 = 32 * rounding(torch.float32) * float(want.abs().max())
        allowed = truncates * rounding(dtype) * want.abs() + in_float32
        assert bool(((found.double().cpu() - want).abs() <= allowed).all()), name


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("dtype", HALF, ids=short)
@pytest.mark.parametrize("fields", [{"scale": (6, 1, 1)}, {"dropout_p": 0.3}, {"drop_path_p": 0.3}, WAYS["everything"]])
def test_a_half_branch_is_multiplied_in_the_float32_of_its_stream(fields: dict[str, Any], dtype: torch.dtype) -> None:
    case = make_case(*IMAGE, dtype=dtype, residual_dtype=torch.float32, **fields)
    y, expected = run_fused(case).outputs["y"], run_reference(case).outputs["y"]
    assert largest_error(y, expected) <= 8 * rounding(torch.float32) * float(expected.abs().max())


# --- scales --------------------------------------------------------------------------------------------------------


@pytest.mark.one_in(6)
@pytest.mark.usefixtures("triton_backend")
@every_kind
@pytest.mark.parametrize(
    ("scale", "drops"),  # one with a gap drops by torch: test_a_scale_with_a_gap_drops_by_torch
    [(scale, drops) for scale in SCALES[1:] for drops in (False, True) if not (drops and has_gap(scale, IMAGE))],
    ids=short,
)
def test_a_scale_of_every_shape(scale: tuple[int, ...], activation: str | None, drops: bool) -> None:
    rates = {"dropout_p": 0.3, "drop_path_p": 0.4} if drops else {}
    check(make_case(*IMAGE, scale=scale, activation=activation, **rates))


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize(
    ("shape", "scale"),
    [
        ((), ()),
        ((5,), (5,)),
        ((5,), (1,)),
        ((1, 1, 1), (1, 1, 1)),
        ((1, 6), (1, 6)),
        ((6, 1), (6, 1)),
        ((1, 6, 1), (6, 1)),
        ((2, 1, 4), (1, 4)),
        ((2, 3, 1, 4), (3, 1, 1)),
        ((2, 3, 2, 3, 2), (3, 1, 3, 1)),
        ((2, 3, 2, 3, 2), (2, 1, 2, 1, 2)),
    ],
    ids=short,
)
def test_a_scale_of_other_ranks(shape: tuple[int, ...], scale: tuple[int, ...]) -> None:
    rate = 0.0 if has_gap(scale, shape) else 0.3
    check(make_case(*shape, scale=scale, dtype=torch.float16, activation="gelu", dropout_p=rate))


@pytest.mark.usefixtures("each_backend")
def test_a_scale_in_other_layouts() -> None:
    case = make_case(4, 6, 5, scale=(6, 5))
    assert case.scale is not None
    transposed = case.scale.t().contiguous().t()
    strided = torch.stack((case.scale, case.scale.cos()), -1)[..., 0]
    negated = torch._neg_view(-case.scale)
    expected = run_fused(case)
    for scale in (transposed, strided, negated):
        actual = check(with_fields(case, scale=scale))
        for name, tensor in actual.everything().items():
            torch.testing.assert_close(tensor, expected.everything()[name])
    check(with_fields(case, scale=torch.full((), 1.5, device=case.x.device).expand(6, 5)))


@pytest.mark.usefixtures("each_backend")
@every_kind
def test_zero_and_tiny_scales(activation: str | None) -> None:
    """CaiT's begin at 1e-6, and whoever starts from the identity at 0."""
    case = make_case(*IMAGE, scale=(6, 1, 1), activation=activation)
    assert case.scale is not None
    check(with_fields(case, scale=case.scale * 1e-6))
    actual = check(with_fields(case, scale=torch.zeros_like(case.scale)))
    assert actual.gradients["dx"] is not None and not actual.gradients["dx"].any()


# --- rates ---------------------------------------------------------------------------------------------------------

RATES = [*itertools.product((0.0, 0.1, 0.5, 1.0), (0.0, 0.5, 1.0)), (1e-12, 0.0), (0.999, 0.9), (1.0 - 1e-7, 0.0)]


@pytest.mark.one_in(5)
@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize(("dropout_p", "drop_path_p"), RATES)
def test_every_rate(dropout_p: float, drop_path_p: float, activation: str) -> None:
    check(make_case(8, 40, scale=(40,), dropout_p=dropout_p, drop_path_p=drop_path_p, activation=activation))


@pytest.mark.one_in(5)
@pytest.mark.usefixtures("each_backend")
@every_kind
@every_dtype
def test_a_rate_of_one_leaves_the_residual(dtype: torch.dtype, activation: str | None) -> None:
    case = make_case(4, 40, scale=(40,), dtype=dtype, activation=activation)
    alone = run_fused(with_fields(case, x=torch.zeros_like(case.x), scale=None))
    for rates in ({"dropout_p": 1.0}, {"drop_path_p": 1.0}, {"dropout_p": 1.0, "drop_path_p": 1.0}):
        found = run_fused(with_fields(case, **rates))
        assert torch.equal(found.outputs["y"], alone.outputs["y"]), rates
        assert torch.equal(found.gradients["dresidual"], alone.gradients["dresidual"]), rates
        assert not found.gradients["dx"].any() and not found.gradients["dscale"].any(), rates


# --- sizes ---------------------------------------------------------------------------------------------------------

SIZES: list[tuple[tuple[int, ...], tuple[int, ...] | None]] = [
    ((), None),
    ((1,), (1,)),
    ((1, 1), None),
    ((7,), (7,)),
    ((8,), None),
    ((3, 5), (5,)),
    ((3, 1, 7), (7,)),
    ((2047,), None),
    ((2049,), None),
    ((3, 1025), (1025,)),
    ((5, 2048), (2048,)),
    ((31, 136), (136,)),
    ((4, 16, 7, 7), (16, 1, 1)),
    ((3, 5, 7, 7), (5, 1, 1)),
    ((3, 5, 14, 14), (5, 1, 1)),
    ((2, 2, 33, 33), (2, 1, 1)),
    ((2, 2, 32, 32), (2, 1, 1)),
    ((2, 3, 2, 3, 5), (3, 1, 1, 1)),
]


@pytest.mark.one_in(9)
@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("way", ["bare", "relu", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=short)
@pytest.mark.parametrize(("shape", "scale"), SIZES, ids=short)
def test_sizes(shape: tuple[int, ...], scale: tuple[int, ...] | None, dtype: torch.dtype, way: str) -> None:
    """Less than a group of eight, more than a program's block, and what divides neither."""
    fields: dict[str, Any] = {"activation": "relu" if way == "relu" else None}
    if way == "everything":
        # torch, whose error is the measure, may be lucky with all of a few: in half only the last rounding counts.
        dtype = torch.float16 if math.prod(shape) < 100 else dtype
        fields = {"scale": scale, "activation": "silu", "dropout_p": 0.3, "drop_path_p": 0.4 if shape else 0.0}
    case = make_case(*shape, dtype=dtype, **fields)
    check(with_exact_sums(case) if way == "relu" else case)


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("each_backend")
@every_kind
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (2, 0, 3), (2, 3, 0), (0, 0)], ids=short)
def test_no_elements(shape: tuple[int, ...], activation: str | None) -> None:
    for scale in (None, (), (shape[-1],), shape):
        rates = {"dropout_p": 0.5, "drop_path_p": 0.5}
        for case in (make_case(*shape, scale=scale, activation=activation, **more) for more in ({}, rates)):
            actual = check(case)
            assert scale is None or not actual.gradients["dscale"].any()


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.full
def test_more_than_65535_of_anything() -> None:
    check(make_case(66_000, 3, dtype=torch.float16, scale=(3,), activation="silu", dropout_p=0.1, drop_path_p=0.1))
    check(make_case(3, 66_000, dtype=torch.float16, scale=(66_000,), dropout_p=0.1, drop_path_p=0.1))


# --- NaN and Inf ---------------------------------------------------------------------------------------------------


@non_finite
@pytest.mark.one_in(12)
@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("operand", ["x", "residual", "dy", "scale"])
@every_kind
@pytest.mark.parametrize("drops", [False, True])
def test_what_is_not_finite_stays_where_it_is(drops: bool, activation: str | None, operand: str, value: float) -> None:
    rates = {"dropout_p": 0.4, "drop_path_p": 0.3} if drops else {}
    clean = make_case(*IMAGE, scale=(6, 1, 1), activation=activation, **rates)
    tensor = getattr(clean, operand).clone()
    tensor.view(-1)[4::11] = value
    poisoned = with_fields(clean, **{operand: tensor})
    check(poisoned)
    if operand == "scale":
        return
    actual, expected = run_fused(poisoned).everything(), run_fused(clean).everything()
    elsewhere = tensor.isfinite()
    for name in ("y", "dx", "dresidual"):
        assert same_bits(actual[name][elsewhere], expected[name][elsewhere]), name


@non_finite
@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("rates", [{"dropout_p": 0.5}, {"drop_path_p": 0.5}, {"dropout_p": 1.0}], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_and_dropped_is_nan_as_in_torch(value: float, rates: dict[str, float]) -> None:
    """A product drops it, on a CPU at least: torch.nn.functional.dropout of Inf is NaN there."""
    case = make_case(8, 40, **rates)
    case = with_fields(case, x=torch.full_like(case.x, value))
    y, dropped = run_fused(case).outputs["y"], factor_of(case) == 0
    assert dropped.any() and y[dropped].isnan().all()
    assert same_bits(y[~dropped], (case.x + case.residual)[~dropped])


@non_finite
@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("scale", [None, (20,)], ids=short)
def test_a_slope_of_zero_blocks_what_is_not_finite(scale: tuple[int, ...] | None) -> None:
    """As torch's relu does, and a product would not."""
    case = make_case(4, 20, activation="relu", scale=scale)
    y = run_fused(with_fields(case, dy=None)).outputs["y"]
    blocked = with_fields(case, dy=torch.where(y == 0, 0.0, case.dy))
    for value in (math.nan, math.inf):
        actual = run_fused(with_fields(case, dy=torch.where(y == 0, value, case.dy)))
        for name, gradient in run_fused(blocked).gradients.items():
            assert same_bits(actual.gradients[name], gradient), name


@pytest.mark.usefixtures("triton_backend")
def test_large_numbers_do_not_overflow_on_the_way() -> None:
    """Three quarters of the largest, doubled by what dropout keeps, and taken back by the scale: in torch it is Inf."""
    case = make_case(4, 40, dtype=torch.float16, scale=(40,), dropout_p=0.5)
    large = torch.full_like(case.x, 0.75 * torch.finfo(torch.float16).max)
    case = with_fields(case, x=large, scale=torch.full_like(large[0], 0.25), residual=torch.zeros_like(large), dy=None)
    y, expected = run_fused(case).outputs["y"], run_reference(case).outputs["y"]
    assert largest_error(y, expected) <= allowed_error(expected, expected, torch.float16)


# --- the two backends ----------------------------------------------------------------------------------------------


def test_backends_agree_within_their_budgets() -> None:
    case = make_case(*IMAGE, scale=(6, 1, 1), activation="gelu")
    found: dict[str, Result] = {}
    for backend in ("triton", "torch"):
        with use_backend(backend):
            found[backend] = run_fused(case)
    expected = run_reference(case).everything()
    of_torch = found["torch"].everything()
    for name, tensor in found["triton"].everything().items():
        assert_within_budget(name, tensor, of_torch[name], expected[name], case.terms if name == "dscale" else 1)


@pytest.mark.usefixtures("triton_backend")
def test_the_reference_and_torch_are_given_what_was_dropped() -> None:
    """The harness itself: a mask that is not the call's is found out."""
    case: AddCase = make_case(8, 40, dropout_p=0.5, drop_path_p=0.3)
    other = with_fields(case, seed=case.seed + 1)
    assert largest_error(run_fused(case).outputs["y"], run_reference(case, masks_of(other)).outputs["y"]) > 0.1
