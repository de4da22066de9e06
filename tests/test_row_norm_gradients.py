"""Which gradients are computed, in half types too, and the bit mask that stands for a slope of two values."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fused_ops import Activation, reference
from tests.norm_cases import (
    HALF,
    OPERANDS,
    Case,
    check,
    run_fused,
    run_reference,
    same_bits,
    short,
    torch_expression,
    with_exact_sums,
    with_fields,
)
from tests.row_norm_cases import FUNCTIONS, PLACES, make_case

pytestmark = [pytest.mark.one_in(8), pytest.mark.usefixtures("memory_checked")]

Tensor = torch.Tensor

TWO_VALUED = ("relu", "relu6", "leaky_relu")

every_function = pytest.mark.parametrize("function", FUNCTIONS)


# --- what is asked for ---------------------------------------------------------------------------------------------


def choices(case: Case) -> Iterator[tuple[str, ...]]:
    """Every set of operands that require no gradient."""
    given = [name for name in OPERANDS if getattr(case, name) is not None]
    for count in range(len(given) + 1):
        yield from itertools.combinations(given, count)


@pytest.mark.parametrize("activation", [None, "leaky_relu", "gelu"])
@pytest.mark.parametrize(("function", "residual"), PLACES)
def test_every_choice_of_gradients(triton_backend, function, residual, activation):
    """`check` also holds that a frozen operand gets None."""
    case = with_exact_sums(make_case(function, 32, 24, dtype=torch.float16, residual=residual, activation=activation))
    for frozen in choices(case):
        check(with_fields(case, frozen=frozen))


@pytest.mark.parametrize("types", ["one", "float32 residual"])
@pytest.mark.parametrize("missing", ["dy", "dtotal"])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("function", FUNCTIONS[2:])
def test_an_output_that_nothing_uses(each_backend, function, activation, missing, types):
    case = make_case(function, 32, 24, dtype=torch.float16, activation=activation)
    if types != "one":
        case = with_fields(case, residual=case.residual.float(), dtotal=case.dtotal.float())
    for frozen in ((), ("x",), ("residual",), ("weight", "bias"), ("x", "residual")):
        check(with_fields(case, frozen=frozen, **{missing: None}))


# --- the mask ------------------------------------------------------------------------------------------------------


def masks(case: Case) -> list[Tensor]:
    """The bytes that autograd keeps in a forward call."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run_fused(with_fields(case, dy=None, dtotal=None))
    return [tensor for tensor in kept if tensor.dtype == torch.uint8]


@pytest.mark.parametrize("span", [1, 7, 8, 9, 64, 100, 513])
@pytest.mark.parametrize("activation", [*TWO_VALUED, Activation("leaky_relu", negative_slope=-0.5)], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS[:2])
def test_mask(triton_backend, function, activation, span):
    """A bit an element, the lowest first, each row from a byte of its own: set where the slope is 1."""
    case = make_case(function, 5, span, residual=True, activation=activation)
    (bits,) = masks(case)
    assert bits.shape == (5, -(-span // 8))
    z = run_reference(with_fields(case, activation=None)).outputs["y"]
    passes = reference.activation_slope(z.numpy(), activation) == 1.0
    unpacked = np.unpackbits(bits.cpu().numpy(), axis=1, bitorder="little")[:, :span]
    np.testing.assert_array_equal(unpacked.astype(bool), passes)


@pytest.mark.parametrize("activation", TWO_VALUED)
def test_mask_at_nan_is_torchs(triton_backend, activation):
    case = make_case("rms_norm", 5, 20, residual=True, activation=activation, affine=False)
    residual = case.residual.clone()
    residual[2, 3] = torch.nan
    (bits,) = masks(with_fields(case, residual=residual))
    z = torch.full((1,), torch.nan, requires_grad=True)
    (slope,) = torch.autograd.grad(getattr(torch.nn.functional, activation)(z), [z], torch.ones(1))
    assert bool(bits[2, 0] >> 3 & 1) == (slope.item() == 1.0)


@every_function
def test_mask_only_where_it_stands_for_the_residual(triton_backend, function):
    for activation, residual in itertools.product([None, *TWO_VALUED, "gelu"], [False, True]):
        case = make_case(function, 5, 20, residual=residual, activation=activation)
        expected = activation in TWO_VALUED and residual and not case.adds_first
        assert len(masks(case)) == expected, (activation, residual)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, which interprets the kernels, warns of Inf * 0
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("residual", [False, True])
def test_a_slope_of_zero_blocks_what_is_not_finite(triton_backend, residual, value):
    """As torch's relu does, and a product would not."""
    case = make_case("layer_norm", 4, 20, residual=residual, activation="relu")
    y = run_fused(with_fields(case, dy=None)).outputs["y"]
    dy = torch.where(y == 0, value, case.dy)
    blocked = torch.where(y == 0, 0.0, case.dy)
    actual, expected = run_fused(with_fields(case, dy=dy)), run_fused(with_fields(case, dy=blocked))
    for name, gradient in actual.gradients.items():
        assert same_bits(gradient, expected.gradients[name]), name


# --- bytes ---------------------------------------------------------------------------------------------------------


def kept_bytes(case: Case, call) -> int:
    """Of all that autograd keeps but statistics, which torch holds in half on a CPU and in float32 on a GPU."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = call(case.leaves())
    assert outputs is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values() if tensor.numel() > case.rows)


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "gelu", "tanh", "softplus"])
@pytest.mark.parametrize("dtype", HALF, ids=short)
@every_function
def test_no_more_bytes_are_kept_than_torch_keeps_in_half(each_backend, function, dtype, activation):
    from fused_ops import functional as F

    for residual in (False, True):
        case = make_case(function, 8, 64, dtype=dtype, residual=residual, activation=activation)

        def fused(leaves, case=case):
            args, kwargs = case.arguments(leaves)
            return getattr(F, case.function)(*args, **kwargs)

        of_torch = kept_bytes(case, lambda leaves, case=case: torch_expression(case, leaves))
        assert 0 < kept_bytes(case, fused) <= of_torch
