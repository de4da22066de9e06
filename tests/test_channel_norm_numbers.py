"""The numbers of the channel norms, forward and backward, against NumPy float64 within torch eager's own error."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fused_ops import Activation
from tests.channel_norm_cases import FUNCTIONS, PLACES, ChannelCase, make_case, with_layout
from tests.hard_data import HARD, constant_rows, large_mean, outlier
from tests.layouts import Layout, channels_last
from tests.norm_cases import (
    DEVICE,
    DTYPES,
    HALF,
    TORCH_ACTIVATIONS,
    check,
    run_fused,
    same_bits,
    short,
    with_exact_sums,
    with_fields,
)

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels")

from tests.channel_norm_ways import WAYS, Way

pytestmark = [pytest.mark.one_in(8), pytest.mark.usefixtures("triton_backend", "memory_checked")]

Tensor = torch.Tensor

# Inf - Inf and overflow are what these tests are about, and NumPy, which interprets the kernels, warns of them.
non_finite = pytest.mark.filterwarnings("ignore::RuntimeWarning")

ACTIVATIONS = [
    *TORCH_ACTIVATIONS,
    Activation("leaky_relu", negative_slope=0.3),
    Activation("leaky_relu", negative_slope=-0.5),
    Activation("elu", alpha=1.7),
    Activation("softplus", beta=2.0, threshold=3.0),
]


def in_ways(*quick: str, of: tuple[str, ...] = WAYS) -> pytest.MarkDecorator:
    """Runs a test in every way, in all but the quick ones in the long sweep."""
    ways = [pytest.param(way, marks=[] if way in quick else pytest.mark.full, id=way.replace(" ", "-")) for way in of]
    return pytest.mark.parametrize("way", ways, indirect=True)


def functions(*quick: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "function", [pytest.param(name, marks=[] if name in quick else pytest.mark.full) for name in FUNCTIONS]
    )


every_function = pytest.mark.parametrize("function", FUNCTIONS)
every_place = pytest.mark.parametrize(("function", "residual"), PLACES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=short)


# --- ordinary data -------------------------------------------------------------------------------------------------


def ordinary() -> list[Any]:
    """Every place of the residual, activation of each kind, type and way. Quick are of the quickest way all in float32
    and each once in half, and of the others each place and each activation once in half."""
    calls = []
    for (index, place), (offset, activation), dtype, (turn, way) in itertools.product(
        enumerate(PLACES), enumerate((None, "relu", "gelu")), DTYPES, enumerate(WAYS)
    ):
        half = HALF[(index + offset + turn) % 2]
        if way == "whole":
            is_quick = dtype in (torch.float32, half) or (dtype == torch.float64 and (index + offset) % 3 == 0)
        else:
            is_quick = dtype == half and (index + offset + turn) % 3 == 0
        name = "-".join(map(short, (*place, activation, dtype, way.replace(" ", "-"))))
        calls.append(pytest.param(*place, activation, dtype, way, marks=[] if is_quick else pytest.mark.full, id=name))
    return calls


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("function", "residual", "activation", "dtype", "way"), ordinary(), indirect=["way"])
def test_ordinary_data(function: str, residual: bool, activation: str | None, dtype: torch.dtype, way: Way) -> None:
    case = way.case(function, dtype=dtype, residual=residual, activation=activation)
    check(with_exact_sums(case) if activation == "relu" else case)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize(
    ("function", "residual"),
    [pytest.param(*place, marks=[] if place == ("group_norm", True) else pytest.mark.full) for place in PLACES],
)
@in_ways("whole", of=("whole",))
def test_every_activation(function: str, residual: bool, activation: str | Activation, way: Way) -> None:
    check(way.case(function, residual=residual, activation=activation))


@pytest.mark.full
@in_ways()
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@every_place
def test_every_activation_in_half(function: str, residual: bool, activation: str | Activation, way: Way) -> None:
    dtype = HALF[ACTIVATIONS.index(activation) % 2]
    check(with_exact_sums(way.case(function, dtype=dtype, residual=residual, activation=activation)))


@in_ways("whole", "channels_last")
@pytest.mark.parametrize("affine", ["neither", "weight", "bias"])
@functions("group_norm", "add_instance_norm")
def test_weight_and_bias_are_optional(function: str, affine: str, way: Way) -> None:
    case = way.case(function, dtype=torch.float16, residual=True, activation="silu")
    if affine != "weight":
        case = with_fields(case, weight=None)
    if affine != "bias":
        case = with_fields(case, bias=None)
    check(case)


@non_finite  # 1 / sqrt(0) of the lanes that pad a tile
@in_ways("whole", "channels_last")
@pytest.mark.parametrize("eps", [0.0, 1e-3, 2.0])
@functions("group_norm")
def test_eps(function: str, eps: float, way: Way) -> None:
    check(way.case(function, dtype=torch.float16, eps=eps))


# --- shapes --------------------------------------------------------------------------------------------------------

SHAPES = [  # shape, groups of group norm
    ((6, 30), 3),  # planes of one element
    ((1, 30), 3),
    ((3, 6), 6),  # one value a group, which is its own mean
    ((3, 5, 1), 1),
    ((1, 1, 2), 1),
    ((2, 30, 49), 3),
    ((2, 30, 7, 7), 3),
    ((1, 30, 7, 7), 30),
    ((2, 8, 14, 14), 1),
    ((1, 6, 3, 20), 2),
    ((3, 7, 1, 9), 7),
    ((2, 4, 2, 3, 5), 2),
    ((1, 64, 4, 4), 32),
    ((2, 33, 2, 2, 2), 11),
    ((2, 16, 16), 4),  # a multiple of 16 bytes
    ((5, 2, 3), 2),  # the last tile holds groups of fewer samples than the others
    ((9, 6, 9), 2),
]


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.full)], ids=short)
@pytest.mark.parametrize(
    ("shape", "groups", "layout"),
    [
        pytest.param(
            *of, layout, id=f"{short(of[0])}-{of[1]}-{layout.__name__}", marks=pytest.mark.full if slow else []
        )
        for index, of in enumerate(SHAPES)
        for layout in (torch.clone, channels_last)
        for slow in [index % 2 == 0 and layout is channels_last]
    ],
)
@functions("group_norm")
def test_shapes(function: str, shape: tuple[int, ...], groups: int, layout: Layout, dtype: torch.dtype) -> None:
    if "instance" in function and math.prod(shape[2:]) == 1:
        pytest.skip("instance norm refuses planes of one element")
    case = make_case(function, *shape, groups=groups, dtype=dtype, residual=True, activation="silu")
    check(with_layout(case, layout))


LONG = [  # dtype, shape, groups: on both sides of what a program holds whole, and of what compiles for a plane's length
    (torch.float32, (2, 2, 1023), 1),
    (torch.float32, (1, 2, 1024), 1),
    (torch.float32, (1, 2, 1025), 2),
    (torch.float32, (1, 2, 4096), 1),
    (torch.float32, (1, 2, 4097), 1),
    (torch.float32, (1, 1, 8192), 1),
    (torch.float32, (1, 2, 8193), 2),
    (torch.float32, (1, 1, 16385), 1),
    (torch.float32, (1, 4, 37, 111), 2),
    (torch.bfloat16, (1, 2, 8192), 1),
    (torch.bfloat16, (1, 1, 30011), 1),
    (torch.float16, (1, 24, 21, 21), 1),
    (torch.float64, (1, 2, 512), 1),
    (torch.float64, (1, 4, 700), 2),
    (torch.float64, (1, 1, 2049), 1),
]
QUICK_LONG = [(1, 2, 1025), (1, 2, 4097), (1, 1, 16385), (1, 24, 21, 21), (1, 4, 700)]


@pytest.mark.parametrize(
    ("dtype", "shape", "groups"),
    [pytest.param(*long, marks=[] if long[1] in QUICK_LONG else pytest.mark.full) for long in LONG],
    ids=short,
)
@pytest.mark.parametrize(
    ("function", "residual", "activation"),
    [("group_norm", True, "relu"), pytest.param("add_group_norm", True, "gelu", marks=pytest.mark.full)],
)
def test_long_groups(
    function: str, residual: bool, activation: str, dtype: torch.dtype, shape: tuple[int, ...], groups: int
) -> None:
    case = make_case(function, *shape, groups=groups, dtype=dtype, residual=residual, activation=activation)
    check(with_exact_sums(case))


MANY = [  # dtype, shape, groups: channels_last in more positions and channels than a tile has
    (torch.float16, (1, 40, 9, 60), 4),
    (torch.float32, (1, 160, 5, 9), 32),
    (torch.float16, (2, 258, 5, 5), 6),
    (torch.float64, (1, 6, 700), 3),
    (torch.bfloat16, (1, 3, 5000), 1),
]


@pytest.mark.parametrize(
    ("dtype", "shape", "groups"),
    [pytest.param(*many, marks=[] if index == 0 else pytest.mark.full) for index, many in enumerate(MANY)],
    ids=short,
)
@pytest.mark.parametrize("activation", ["relu", pytest.param("gelu", marks=pytest.mark.full)])
def test_large_channels_last(activation: str, dtype: torch.dtype, shape: tuple[int, ...], groups: int) -> None:
    case = make_case("group_norm", *shape, groups=groups, dtype=dtype, residual=True, activation=activation)
    check(with_layout(with_exact_sums(case), channels_last))


# --- data that rounds badly ----------------------------------------------------------------------------------------


def with_data(case: ChannelCase, data: Callable[[Tensor], Tensor]) -> ChannelCase:
    """A case each of whose groups is such data; where what is normalized is a sum, the halves are exact."""
    x = data(case.x.reshape(case.x.shape[0], case.groups, -1)).reshape(case.x.shape)
    case = with_fields(case, x=x / 2, residual=x / 2) if case.adds_first else with_fields(case, x=x)
    return with_layout(case, channels_last if not case.dy.is_contiguous() else torch.Tensor.contiguous)


QUICK_DATA = [
    (large_mean, torch.float32, "channels_last"),
    (large_mean, torch.float32, "small pieces"),
    (outlier, torch.float16, "ragged"),
]
HARD_CALLS = [
    pytest.param(
        data,
        dtype,
        way,
        marks=[] if way == "whole" or (data, dtype, way) in QUICK_DATA else pytest.mark.full,
        id=f"{data.__name__}-{short(dtype)}-{way.replace(' ', '-')}",
    )
    for data, dtype, way in itertools.product(HARD, DTYPES, WAYS)
    # One element of a group decides its result, and chance how well that rounds: few groups measure nothing but that,
    # in float64 the rounding of the reference.
    if data is not outlier or dtype in HALF or way == "whole"
]


@non_finite  # lanes that pad a tile overflow half
@pytest.mark.parametrize(("data", "dtype", "way"), HARD_CALLS, indirect=["way"])
@functions("group_norm")
def test_data_that_rounds_badly(function: str, data: Callable[[Tensor], Tensor], dtype: torch.dtype, way: Way) -> None:
    # Without an activation: beside a kink a slope may be either, and no error bounds the difference.
    check(with_data(way.case(function, dtype=dtype), data))


@pytest.mark.parametrize("layout", [torch.clone, channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 4, 75, 80), pytest.param((1, 32, 50, 50), marks=pytest.mark.full)], ids=short)
def test_large_mean_of_long_groups(shape: tuple[int, ...], layout: Layout) -> None:
    case = make_case("group_norm", *shape, groups=2, frozen=("weight", "bias"))
    check(with_layout(with_data(case, large_mean), layout))


def cliff(x: Tensor) -> Tensor:
    """Pieces whose means are far apart, so that the merge adds what no piece saw."""
    return x + 100.0 * (torch.arange(x.shape[-1], device=x.device) // 64 % 3)


@in_ways("small pieces", "channels_last in small pieces", of=("small pieces", "channels_last in small pieces"))
def test_pieces_that_differ(way: Way) -> None:
    check(with_data(way.case("group_norm", samples=4, frozen=("weight", "bias")), cliff))


@in_ways("whole", "channels_last")
@functions("group_norm", "add_instance_norm")
def test_zero_weights(function: str, way: Way) -> None:
    case = way.case(function, dtype=torch.float16, residual=True, activation="gelu")
    some = case.weight * (torch.arange(len(case.weight), device=DEVICE) % 3 != 0)
    check(with_fields(case, weight=some))
    case = with_fields(case, weight=torch.zeros_like(some))
    arrived = case.dtotal if case.adds_first else torch.zeros_like(case.x)
    assert torch.equal(check(case).gradients["dx"], arrived)


@non_finite
@in_ways("whole", "channels_last")
@functions("group_norm")
def test_constant_groups_without_eps_are_nan(function: str, way: Way) -> None:
    check(with_data(way.case(function, dtype=torch.float16, eps=0.0), torch.zeros_like))


@in_ways("whole", "ragged", "channels_last")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=short)
def test_constant_groups_are_their_bias(dtype: torch.dtype, way: Way) -> None:
    case = with_data(way.case("group_norm", dtype=dtype, samples=2), constant_rows)
    y = run_fused(case).outputs["y"]
    assert torch.equal(y, case.bias.view(-1, 1, 1).expand_as(y))


@non_finite  # the squares of what rounding leaves do overflow
@in_ways("whole", "small pieces")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=short)
def test_mean_at_the_largest_number_does_not_overflow(dtype: torch.dtype, way: Way) -> None:
    """torch's own sum overflows here, so its error would allow anything."""
    case = way.case("group_norm", dtype=dtype, samples=2, dy=None)
    x = torch.full_like(case.x, 0.99 * torch.finfo(dtype).max)
    x[1] *= -1
    y = run_fused(with_fields(case, x=x, weight=torch.zeros_like(case.weight))).outputs["y"]
    assert same_bits(y, case.bias.view(-1, 1, 1).expand_as(y).contiguous())


# --- NaN and Inf ---------------------------------------------------------------------------------------------------

NON_FINITE = [  # value, activation
    (math.nan, None),
    (math.inf, "gelu"),
    *(
        pytest.param(*combination, marks=pytest.mark.full)
        for combination in [(math.nan, "relu"), (math.inf, None), (-math.inf, "relu"), (-math.inf, "silu")]
    ),
]


@non_finite
@in_ways("whole", "channels_last")
@pytest.mark.parametrize(("value", "activation"), NON_FINITE)
@pytest.mark.parametrize("operand", ["x", pytest.param("residual", marks=pytest.mark.full), "dy"])
@functions("group_norm")
def test_non_finite_in_one_group_stays_there(
    function: str, operand: str, value: float, activation: str | None, way: Way
) -> None:
    clean = way.case(function, dtype=torch.float16, residual=True, activation=activation)
    tensor = getattr(clean, operand).clone()
    tensor[1, 2, 2, 2] = value
    poisoned = with_fields(clean, **{operand: tensor})
    actual, expected = check(poisoned).everything(), run_fused(clean).everything()
    others = torch.ones(2, clean.groups, dtype=torch.bool)
    others[1, 2 * clean.groups // clean.x.shape[1]] = False
    for name in ("y", "total", "dx", "dresidual"):
        if name in actual:
            grouped = (tensor[name].reshape(2, clean.groups, -1)[others] for tensor in (actual, expected))
            assert same_bits(*grouped), name


@non_finite
@in_ways("whole", "channels_last")
@pytest.mark.parametrize("value", [math.nan, pytest.param(math.inf, marks=pytest.mark.full)])
@pytest.mark.parametrize("operand", ["weight", "bias"])
def test_non_finite_parameter(operand: str, value: float, way: Way) -> None:
    case = way.case("group_norm", dtype=torch.float16)
    tensor = getattr(case, operand).clone()
    tensor[3] = value
    case = with_fields(case, **{operand: tensor})
    if value == math.inf:  # the order of its sums tells whether a gradient is infinite or NaN
        case = with_fields(case, dy=None)
    check(case)


@non_finite
@in_ways("whole", "ragged")
@every_dtype
def test_overflow_leaves_other_groups_alone(dtype: torch.dtype, way: Way) -> None:
    clean = way.case("group_norm", dtype=dtype, samples=2)
    x = clean.x.clone()
    channels = x.shape[1] // clean.groups
    x[1, channels : 2 * channels] = torch.finfo(dtype).max
    x[1, channels : 2 * channels, ::2] *= -1
    actual, expected = (run_fused(with_fields(clean, x=tensor)).everything() for tensor in (x, clean.x))
    for name in ("y", "dx"):
        found, other = actual[name], expected[name]
        assert same_bits(found[0].contiguous(), other[0].contiguous()), name
        assert same_bits(found[1, 2 * channels :].contiguous(), other[1, 2 * channels :].contiguous()), name
