"""Which gradients of the channel norms are computed, in mixed types too, and the bit mask of a slope of two values."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fused_ops import Activation, reference
from tests.channel_norm_cases import FUNCTIONS, PLACES, ChannelCase, make_case, with_layout
from tests.layouts import Layout, channels_last
from tests.norm_cases import (
    DEVICE,
    HALF,
    OPERANDS,
    check,
    run_fused,
    run_reference,
    same_bits,
    short,
    with_exact_sums,
    with_fields,
)
from tests.tolerances import rounding

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels")

from tests.channel_norm_ways import WAYS, Way
from tests.conftest import FamilyCall

pytestmark = [pytest.mark.one_in(8), pytest.mark.usefixtures("triton_backend", "memory_checked")]

Tensor = torch.Tensor

TWO_VALUED = ("relu", "relu6", "leaky_relu")
ADDED_FIRST = FUNCTIONS[2:]


def ways(*quick: str) -> pytest.MarkDecorator:
    """Runs a test in every way, in all but the quick ones in the long sweep."""
    marked = [
        pytest.param(way, marks=[] if way in quick else pytest.mark.full, id=way.replace(" ", "-")) for way in WAYS
    ]
    return pytest.mark.parametrize("way", marked, indirect=True)


def mostly(values: tuple, *quick: object) -> list:
    """All but the quick ones in the long sweep."""
    return [pytest.param(value, marks=[] if value in quick else pytest.mark.full) for value in values]


# --- what is asked for ---------------------------------------------------------------------------------------------


def choices(case: ChannelCase) -> Iterator[tuple[str, ...]]:
    """Every set of operands that require no gradient."""
    given = [name for name in OPERANDS if getattr(case, name) is not None]
    for count in range(len(given) + 1):
        yield from itertools.combinations(given, count)


QUICK_CHOICES = [
    ("group_norm", True, "leaky_relu", "whole"),
    ("group_norm", True, "gelu", "channels_last"),
    ("add_instance_norm", True, None, "ragged"),
    ("add_group_norm", True, "gelu", "whole"),
]
CHOICES = [
    pytest.param(*place, activation, way, marks=[] if quick else pytest.mark.full)
    for place, activation, way in itertools.product(PLACES, (None, "leaky_relu", "gelu"), WAYS)
    for quick in [(*place, activation, way) in QUICK_CHOICES]
]


@pytest.mark.parametrize(("function", "residual", "activation", "way"), CHOICES, indirect=["way"])
def test_every_choice_of_gradients(
    function: str, residual: bool, activation: str | None, way: Way, family_calls: list[FamilyCall]
) -> None:
    """`check` also holds that a frozen operand gets None; and no launcher computes or allocates one nobody wants."""
    case = with_exact_sums(way.case(function, dtype=torch.float16, residual=residual, activation=activation))
    for frozen in choices(case):
        family_calls.clear()
        check(with_fields(case, frozen=frozen))
        wanted = {f"d{name}" for name in OPERANDS if getattr(case, name) is not None and name not in frozen}
        if case.adds_first and "dresidual" in wanted:  # it is dx, and goes by that name
            wanted = wanted - {"dresidual"} | {"dx"}
        elif activation is None:  # dresidual is dy, which is at hand
            wanted -= {"dresidual"}
        backward = [call.result._asdict() for call in family_calls if call.direction == "backward"]
        computed = {name for found in backward for name, gradient in found.items() if gradient is not None}
        assert computed == wanted, frozen
        assert len(backward) == bool(wanted), frozen


@ways("whole", "channels_last")
@pytest.mark.parametrize("types", mostly(("one", "float32 residual"), "float32 residual"))
@pytest.mark.parametrize("missing", ["dy", "dtotal"])
@pytest.mark.parametrize("activation", mostly((None, "silu"), "silu"))
@pytest.mark.parametrize("function", mostly(ADDED_FIRST, "add_group_norm"))
def test_an_output_that_nothing_uses(function: str, activation: str | None, missing: str, types: str, way: Way) -> None:
    case = way.case(function, dtype=torch.float16, activation=activation)
    if types != "one":
        case = with_fields(case, residual=case.residual.float(), dtotal=case.dtotal.float())
    for frozen in ((), ("x",), ("residual",), ("weight", "bias"), ("x", "residual")):
        check(with_fields(case, frozen=frozen, **{missing: None}))


@ways("whole", "channels_last")
@pytest.mark.parametrize("parameter", ["weight", "bias"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_one_parameter_alone(activation: str | None, parameter: str, way: Way) -> None:
    """A weight without a bias, or a bias without a weight, trained alone too."""
    case = way.case("group_norm", dtype=torch.float16, residual=True, activation=activation)
    case = with_fields(case, **{"weight" if parameter == "bias" else "bias": None})
    for frozen in ((), ("x", "residual")):
        check(with_fields(case, frozen=frozen))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=short)
def test_groups_of_one_value(dtype: torch.dtype) -> None:
    """Which torch takes of more than one sample: dx is 0 whatever arrives, and y knows nothing of x."""
    case = make_case("group_norm", 2, 4, groups=4, dtype=dtype, residual=True, activation="silu")
    for frozen in ((), ("x",), ("residual",), ("weight", "bias")):
        result = check(with_fields(case, frozen=frozen))
        # Where a compiler fuses product and difference, their rounding is left, over the deviation that eps allows.
        left = rounding(torch.float32) * float(case.dy.abs().max()) * case.eps**-0.5
        assert "x" in frozen or result.gradients["dx"].abs().max() <= (2 * left if DEVICE.type == "cuda" else 0)


# --- mixed types ---------------------------------------------------------------------------------------------------

MIXED = [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float16, torch.bfloat16),
    (torch.float64, torch.float32),
]
QUICK_MIXED = [MIXED[0], MIXED[4]]


@ways("whole", "channels_last")
@pytest.mark.parametrize(
    ("dtype", "parameters"),
    [pytest.param(*types, marks=[] if types in QUICK_MIXED else pytest.mark.full) for types in MIXED],
    ids=short,
)
@pytest.mark.parametrize(
    ("function", "residual"),
    [pytest.param(*place, marks=[] if place == ("group_norm", True) else pytest.mark.full) for place in PLACES],
)
def test_parameters_of_another_type(
    function: str, residual: bool, dtype: torch.dtype, parameters: torch.dtype, way: Way, family_calls: list[FamilyCall]
) -> None:
    case = way.case(function, dtype=dtype, parameters=parameters, residual=residual, activation="gelu")
    check(case)
    found = family_calls[-1].result
    assert found.dweight.dtype == found.dbias.dtype == parameters  # by itself: autograd would convert them


@ways("whole", "channels_last")
@pytest.mark.parametrize("types", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=short)
def test_weight_and_bias_of_different_types(
    types: tuple[torch.dtype, torch.dtype], way: Way, family_calls: list[FamilyCall]
) -> None:
    """Without an activation no kernel of the backward reads the bias."""
    case = way.case("group_norm", dtype=torch.bfloat16)
    check(with_fields(case, weight=case.weight.to(types[0]), bias=case.bias.to(types[1])))
    found = family_calls[-1].result
    assert (found.dweight.dtype, found.dbias.dtype) == types


@ways("whole", "channels_last")
@pytest.mark.parametrize("parameters", mostly(("x's", "float32"), "float32"))
@pytest.mark.parametrize("activation", mostly((None, "relu", "silu"), "silu"))
@pytest.mark.parametrize("dtype", mostly(HALF, torch.bfloat16), ids=short)
@pytest.mark.parametrize("function", mostly(ADDED_FIRST, "add_group_norm"))
def test_float32_residual_of_half_x(
    function: str, dtype: torch.dtype, activation: str | None, parameters: str, way: Way
) -> None:
    wide = torch.float32 if parameters == "float32" else dtype
    case = way.case(function, dtype=dtype, parameters=wide, activation=activation)
    case = with_fields(case, residual=case.residual.float(), dtotal=case.dtotal.float())
    actual = check(case)
    assert actual.outputs["total"].dtype == actual.gradients["dresidual"].dtype == torch.float32
    assert actual.outputs["y"].dtype == actual.gradients["dx"].dtype == dtype
    assert same_bits(actual.outputs["total"].contiguous(), (case.residual + case.x).contiguous())


@ways("whole", "ragged", "channels_last")
@pytest.mark.parametrize("dtype", HALF, ids=short)
def test_each_output_is_rounded_once(dtype: torch.dtype, way: Way) -> None:
    """Residual and activation cost no rounding of their own: half input misses by one rounding of each number."""
    case = way.case("group_norm", dtype=dtype, residual=True, activation="silu", dy=None)
    y = run_fused(case).outputs["y"].double().cpu()
    expected = run_reference(case).outputs["y"].cpu()
    truncates = 2 if dtype == torch.bfloat16 else 1
    in_float32 = 32 * rounding(torch.float32) * float(expected.abs().max())
    allowed = truncates * rounding(dtype) * expected.abs() + in_float32
    assert bool(((y - expected).abs() <= allowed).all())


# --- the mask ------------------------------------------------------------------------------------------------------


def masks(case: ChannelCase) -> list[Tensor]:
    """The bytes that autograd keeps in a forward call."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run_fused(with_fields(case, dy=None, dtotal=None))
    return [tensor for tensor in kept if tensor.dtype == torch.uint8]


def unpacked(bits: Tensor, case: ChannelCase) -> np.ndarray:
    """A flag an element: of each plane from a byte of its own, or, where channels are neighbours, of each position."""
    samples, channels, *positions = case.x.shape
    flags = np.unpackbits(bits.cpu().numpy(), axis=1, bitorder="little").astype(bool)
    if case.x.is_contiguous():
        return flags[:, : int(np.prod(positions))].reshape(case.x.shape)
    return np.moveaxis(flags[:, :channels].reshape(samples, *positions, channels), -1, 1)


SIZES = [(2, 6, 1, 7), (2, 3, 8), (1, 5, 9), (2, 9, 4, 4), (1, 16, 25), (1, 2, 100), (1, 33, 3, 3)]


@pytest.mark.parametrize("shape", SIZES, ids=short)
@pytest.mark.parametrize("activation", [*mostly(TWO_VALUED, "relu6"), Activation("leaky_relu", negative_slope=-0.5)])
@pytest.mark.parametrize("layout", [torch.clone, channels_last], ids=["contiguous", "channels_last"])
def test_mask(layout: Layout, activation: str | Activation, shape: tuple[int, ...]) -> None:
    """A bit an element, the lowest first: set where the slope is 1."""
    case = make_case("group_norm", *shape, residual=True, activation=activation)
    case = with_layout(case, layout)
    (bits,) = masks(case)
    assert bits.shape == case.mask_shape
    z = run_reference(with_fields(case, activation=None)).outputs["y"]
    passes = reference.activation_slope(z.numpy(), activation) == 1.0
    np.testing.assert_array_equal(unpacked(bits, case), passes)


@pytest.mark.full
@ways("small pieces", "channels_last in small pieces")
@pytest.mark.parametrize("function", ["group_norm", "instance_norm"])
def test_mask_of_pieces(function: str, way: Way) -> None:
    case = way.case(function, residual=True, activation="relu")
    (bits,) = masks(case)
    y = run_fused(with_fields(case, dy=None)).outputs["y"]
    np.testing.assert_array_equal(unpacked(bits, case), y.numpy() > 0)


@pytest.mark.parametrize("layout", [torch.clone, channels_last], ids=["contiguous", "channels_last"])
def test_mask_at_nan_is_torchs(layout: Layout) -> None:
    case = make_case("group_norm", 2, 6, 4, 5, groups=3, residual=True, activation="relu", affine=False)
    residual = case.residual.clone()
    residual[1, 2, 3, 1] = torch.nan
    case = with_layout(with_fields(case, residual=residual), layout)
    (bits,) = masks(case)
    z = torch.full((1,), torch.nan, requires_grad=True)
    (slope,) = torch.autograd.grad(torch.relu(z), [z], torch.ones(1))
    assert unpacked(bits, case)[1, 2, 3, 1] == (slope.item() == 1.0)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_mask_only_where_it_stands_for_the_residual(function: str) -> None:
    for activation, residual in itertools.product([None, "relu", "gelu"], [False, True]):
        case = make_case(function, 2, 6, 10, groups=3, residual=residual, activation=activation)
        expected = activation in TWO_VALUED and residual and not case.adds_first
        assert len(masks(case)) == expected, (activation, residual)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, which interprets the kernels, warns of Inf * 0
@pytest.mark.parametrize("value", mostly((torch.nan, torch.inf), torch.inf))
@pytest.mark.parametrize("residual", [False, True])
@ways("whole", "channels_last")
def test_a_slope_of_zero_blocks_what_is_not_finite(residual: bool, value: float, way: Way) -> None:
    """As torch's relu does, and a product would not."""
    case = way.case("group_norm", dtype=torch.float16, residual=residual, activation="relu")
    y = run_fused(with_fields(case, dy=None)).outputs["y"]
    dy, blocked = torch.where(y == 0, value, case.dy), torch.where(y == 0, 0.0, case.dy)
    actual, expected = (run_fused(way.lay_out(with_fields(case, dy=tensor))) for tensor in (dy, blocked))
    for name, gradient in actual.gradients.items():
        assert same_bits(gradient.contiguous(), expected.gradients[name].contiguous()), name
