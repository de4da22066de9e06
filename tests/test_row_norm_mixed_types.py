"""Parameters and residuals of other types than x, and what is rounded when."""

from __future__ import annotations

import pytest
import torch

from fused_ops import use_backend
from tests.norm_cases import DEVICE, HALF, check, run_fused, run_reference, same_bits, short, with_fields
from tests.row_norm_cases import FUNCTIONS, PLACES, make_case
from tests.tolerances import assert_within_budget, rounding

pytestmark = [pytest.mark.one_in(8), pytest.mark.usefixtures("memory_checked")]

Tensor = torch.Tensor

every_place = pytest.mark.parametrize(("function", "residual"), PLACES)


MIXED = [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float16, torch.bfloat16),
    (torch.float64, torch.float32),
]


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize(("dtype", "parameters"), MIXED, ids=short)
@every_place
def test_parameters_of_another_type(function: str, residual: bool, dtype: torch.dtype, parameters: torch.dtype) -> None:
    check(make_case(function, 6, 60, dtype=dtype, parameters=parameters, residual=residual, activation="gelu"))


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("types", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=short)
def test_weight_and_bias_of_different_types(types: tuple[torch.dtype, torch.dtype]) -> None:
    case = make_case("layer_norm", 6, 60, dtype=torch.bfloat16)
    check(with_fields(case, weight=case.weight.to(types[0]), bias=case.bias.to(types[1])))


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("parameters", ["x's", "float32"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("dtype", HALF, ids=short)
@pytest.mark.parametrize("function", FUNCTIONS[2:])
def test_float32_residual_of_half_x(function: str, dtype: torch.dtype, activation: str | None, parameters: str) -> None:
    wide = torch.float32 if parameters == "float32" else dtype
    case = make_case(function, 6, 60, dtype=dtype, parameters=wide, activation=activation)
    case = with_fields(case, residual=case.residual.float(), dtotal=case.dtotal.float())
    actual = check(case)
    assert actual.outputs["total"].dtype == actual.gradients["dresidual"].dtype == torch.float32
    assert actual.outputs["y"].dtype == actual.gradients["dx"].dtype == dtype
    assert same_bits(actual.outputs["total"], case.residual + case.x)


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("dtype", HALF, ids=short)
def test_each_output_is_rounded_once(dtype: torch.dtype) -> None:
    """Residual and activation cost no rounding of their own: half input misses by one rounding of each number."""
    case = make_case("layer_norm", 8, 100, dtype=dtype, residual=True, activation="silu")
    y = run_fused(case).outputs["y"].double()
    expected = run_reference(case).outputs["y"].to(DEVICE)
    truncates = 2 if dtype == torch.bfloat16 else 1
    in_float32 = 32 * rounding(torch.float32) * float(expected.abs().max())
    allowed = truncates * rounding(dtype) * expected.abs() + in_float32
    assert bool(((y - expected).abs() <= allowed).all())


def test_backends_agree_within_their_budgets() -> None:
    case = make_case("add_layer_norm", 6, 60, activation="gelu")
    with use_backend("triton"):
        kernels = run_fused(case).everything()
    with use_backend("torch"):
        composition = run_fused(case).everything()
    expected = run_reference(case).everything()
    for name, tensor in kernels.items():
        terms = 6 if name in ("dweight", "dbias") else 1
        assert_within_budget(name, tensor, composition[name], expected[name], terms)
