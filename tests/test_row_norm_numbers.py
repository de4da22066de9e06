"""The numbers of the row norms, forward and backward, against NumPy float64 within torch eager's own error."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fused_ops import Activation
from tests.hard_data import HARD, large_mean, zeros
from tests.norm_cases import (
    DEVICE,
    DTYPES,
    HALF,
    TORCH_ACTIVATIONS,
    Case,
    check,
    run_fused,
    same_bits,
    short,
    with_exact_sums,
    with_fields,
)
from tests.row_norm_cases import FUNCTIONS, PLACES, make_case

pytestmark = [pytest.mark.one_in(8), pytest.mark.usefixtures("memory_checked")]

Tensor = torch.Tensor

# Inf - Inf and overflow are what these tests are about, and NumPy, which interprets the kernels, warns of them.
non_finite = pytest.mark.filterwarnings("ignore::RuntimeWarning")

FEW_PLACES = [("layer_norm", False), ("rms_norm", True), ("add_layer_norm", True)]


def places(quick: list[tuple[str, bool]]) -> pytest.MarkDecorator:
    """Parametrizes over every norm and place of the residual, all but the quick ones in the long sweep."""
    return pytest.mark.parametrize(
        ("function", "residual"),
        [
            pytest.param(
                *place,
                marks=[] if place in quick else pytest.mark.full,
                id=f"{place[0]}{'-residual' if place[1] else ''}",
            )
            for place in PLACES
        ],
    )


every_function = pytest.mark.parametrize("function", FUNCTIONS)
every_place = places(PLACES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=short)
# The torch composition is nearly what it is measured against: most of its runs are left to the long sweep.
mostly_kernels = pytest.mark.parametrize(
    "each_backend", ["triton", pytest.param("torch", marks=pytest.mark.full)], indirect=True
)

ACTIVATIONS = [
    *TORCH_ACTIVATIONS,
    Activation("leaky_relu", negative_slope=0.3),
    Activation("leaky_relu", negative_slope=-0.5),
    Activation("elu", alpha=1.7),
    Activation("softplus", beta=2.0, threshold=3.0),
]


# --- ordinary data -------------------------------------------------------------------------------------------------


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@every_dtype
@every_place
def test_ordinary_data(function: str, residual: bool, dtype: torch.dtype, activation: str | None) -> None:
    case = make_case(function, 64, 60, dtype=dtype, residual=residual, activation=activation)
    check(with_exact_sums(case) if activation == "relu" else case)


@pytest.mark.one_in(2)
@mostly_kernels
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@every_place
def test_every_activation(each_backend: str, function: str, residual: bool, activation: str | Activation) -> None:
    check(make_case(function, 64, 60, residual=residual, activation=activation))


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("dtype", HALF, ids=short)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@every_place
@pytest.mark.full
def test_every_activation_in_half(
    function: str, residual: bool, activation: str | Activation, dtype: torch.dtype
) -> None:
    case = make_case(function, 64, 60, dtype=dtype, residual=residual, activation=activation)
    check(with_exact_sums(case))


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("affine", ["neither", "weight", "bias"])
@every_function
def test_weight_and_bias_are_optional(function: str, affine: str) -> None:
    case = make_case(function, 5, 40, residual=True, activation="silu")
    if affine != "weight":
        case = with_fields(case, weight=None)
    if affine != "bias":
        case = with_fields(case, bias=None)
    check(case)


@non_finite  # 1 / sqrt(0) of the lanes that pad a tile
@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-3, 2.0])
@every_function
def test_eps(function: str, eps: float) -> None:
    check(make_case(function, 5, 40, eps=eps))


@pytest.mark.usefixtures("each_backend")
@every_dtype
@pytest.mark.parametrize("function", ["rms_norm", "add_rms_norm"])
def test_rms_eps_defaults_to_that_of_torch(function: str, dtype: torch.dtype) -> None:
    # Small numbers, beside which every candidate for eps is large.
    case = make_case(function, 5, 40, dtype=dtype, eps=None)
    case = with_fields(case, x=case.x * 2.0**-13, residual=None if case.residual is None else case.residual * 2.0**-13)
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    of_torch = torch.nn.functional.rms_norm(torch.ones(1, dtype=dtype) * 2.0**-13, (1,)).double().item()
    implied = (2.0**-13 / of_torch) ** 2 - 2.0**-26
    if abs(implied - eps) > 0.1 * eps:  # an older torch, which took x's type
        eps = torch.finfo(dtype).eps
    explicit = with_fields(case, eps=eps)
    actual, expected = run_fused(case), run_fused(explicit)
    for name, output in actual.everything().items():
        assert same_bits(output, expected.everything()[name]), name
    check(explicit)


# --- spans ---------------------------------------------------------------------------------------------------------


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("span", [1, 2, 7, 8, 64, 100, 255, 1000, 1024, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@places(FEW_PLACES)
def test_spans(function: str, residual: bool, dtype: torch.dtype, span: int) -> None:
    # Summing parameter gradients over long spans takes an interpreter seconds; test_long_parameter_gradients does it.
    frozen = ("weight", "bias") if span > 255 else ()
    rows = max(3, 2048 // span)
    check(make_case(function, rows, span, dtype=dtype, residual=residual, activation="silu", frozen=frozen))


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("span", [1000, 4097, 8193])
def test_long_parameter_gradients(span: int) -> None:
    check(make_case("layer_norm", 3, span, activation="gelu", frozen=("x",)))


RESIDENT_LIMITS = [  # (dtype, affine, span): the longest row that some kernel holds whole
    (torch.float32, True, 8192),
    (torch.float32, True, 16384),
    (torch.float16, True, 16384),
    (torch.bfloat16, False, 32768),
    (torch.float64, True, 1024),
    (torch.float64, True, 2048),
]


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("beyond", [0, 1])
@pytest.mark.parametrize(("dtype", "affine", "limit"), RESIDENT_LIMITS, ids=short)
@pytest.mark.parametrize("function", ["layer_norm", pytest.param("add_rms_norm", marks=pytest.mark.full)])
def test_at_and_beyond_a_resident_limit(
    function: str, dtype: torch.dtype, affine: bool, limit: int, beyond: int
) -> None:
    frozen = ("weight", "bias")
    check(make_case(function, 2, limit + beyond, dtype=dtype, affine=affine, frozen=frozen))


@pytest.mark.usefixtures("triton_backend")
def test_beyond_128k() -> None:
    check(make_case("layer_norm", 1, 131_073, dtype=torch.float16, residual=True, frozen=("weight", "bias")))


# --- data that rounds badly ----------------------------------------------------------------------------------------

hard_data = pytest.mark.parametrize("data", HARD, ids=lambda data: data.__name__)


def hard_case(function: str, data: Callable[[Tensor], Tensor], *shape: int, **fields: Any) -> Case:
    """A case whose normalized tensor is such data; where it is a sum, the halves are exact."""
    case = make_case(function, *shape, **fields)
    x = data(case.x)
    return with_fields(case, x=x / 2, residual=x / 2) if case.adds_first else with_fields(case, x=x)


@pytest.mark.one_in(2)
@mostly_kernels
@hard_data
@every_dtype
@places(FEW_PLACES)
def test_data_that_rounds_badly(
    each_backend: str, function: str, residual: bool, dtype: torch.dtype, data: Callable[[Tensor], Tensor]
) -> None:
    # Without an activation: beside a kink a slope may be either, and no error bounds the difference.
    check(hard_case(function, data, 32, 100, dtype=dtype, residual=residual))


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("span", [1000, 4099])
def test_large_mean_of_long_rows(span: int) -> None:
    check(hard_case("layer_norm", large_mean, 4, span, frozen=("weight", "bias")))


@non_finite  # the squares of what rounding leaves do overflow
@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("span", [8, 100, 1024, 20480])
def test_mean_of_rows_at_the_largest_number_does_not_overflow(dtype: torch.dtype, span: int) -> None:
    """torch's own sum overflows here, so its error would allow anything."""
    largest = 0.99 * torch.finfo(dtype).max
    bias = torch.linspace(-2, 2, span).to(DEVICE, dtype)
    x = torch.tensor([[largest], [-largest]]).expand(2, span).to(DEVICE, dtype)
    case = make_case("layer_norm", 2, span, dtype=dtype, x=x, bias=bias, weight=torch.zeros_like(bias), dy=None)
    assert same_bits(run_fused(case).outputs["y"], bias.expand(2, span))


@pytest.mark.usefixtures("each_backend")
@every_function
def test_zero_weights(function: str) -> None:
    case = make_case(function, 6, 40, residual=True, activation="gelu")
    some = case.weight * (torch.arange(40, device=DEVICE) % 3 != 0)
    check(with_fields(case, weight=some))
    actual = check(with_fields(case, weight=torch.zeros_like(some)))
    arrived = case.dtotal if case.adds_first else torch.zeros_like(case.x)
    assert torch.equal(actual.gradients["dx"], arrived)


@non_finite
@pytest.mark.usefixtures("each_backend")
@every_function
def test_constant_rows_without_eps_are_nan(function: str) -> None:
    check(hard_case(function, zeros, 3, 20, eps=0.0))


# --- NaN and Inf ---------------------------------------------------------------------------------------------------


NON_FINITE = [  # value, activation
    (math.nan, None),
    (math.nan, "relu"),
    (math.inf, "gelu"),
    *(
        pytest.param(*combination, marks=pytest.mark.full)
        for combination in [(math.inf, None), (-math.inf, "relu"), (-math.inf, "silu"), (math.nan, "gelu")]
    ),
]


@non_finite
@mostly_kernels
@pytest.mark.parametrize(("value", "activation"), NON_FINITE)
@pytest.mark.parametrize("operand", ["x", "residual", "dy"])
@every_function
def test_non_finite_in_one_row_stays_there(
    each_backend: str, function: str, operand: str, value: float, activation: str | None
) -> None:
    clean = make_case(function, 5, 20, residual=True, activation=activation)
    tensor = getattr(clean, operand).clone()
    tensor[2, 7] = value
    poisoned = with_fields(clean, **{operand: tensor})
    check(poisoned)
    actual, expected = run_fused(poisoned).everything(), run_fused(clean).everything()
    others = torch.tensor([0, 1, 3, 4])
    for name in ("y", "total", "dx", "dresidual"):
        if name in actual:
            assert same_bits(actual[name][others], expected[name][others]), name


@non_finite
@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("operand", ["weight", "bias"])
def test_non_finite_parameter(operand: str, value: float) -> None:
    case = make_case("layer_norm", 5, 20)
    tensor = getattr(case, operand).clone()
    tensor[7] = value
    check(with_fields(case, **{operand: tensor}))


@non_finite
@pytest.mark.usefixtures("each_backend")
@every_dtype
@every_function
def test_overflow_leaves_other_rows_alone(function: str, dtype: torch.dtype) -> None:
    clean = make_case(function, 5, 20, dtype=dtype)
    x = clean.x.clone()
    x[2] = torch.finfo(dtype).max
    x[2, ::2] *= -1
    actual, expected = run_fused(with_fields(clean, x=x)), run_fused(clean)
    others = torch.tensor([0, 1, 3, 4])
    for name in ("y", "dx"):
        assert same_bits(actual.everything()[name][others], expected.everything()[name][others]), name
