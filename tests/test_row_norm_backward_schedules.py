"""The row family's backward is right however its rows are divided among tiles, chunks and programs."""

from __future__ import annotations

import pytest
import torch

from tests.norm_cases import check, normal, run_fused, same_bits, short, with_fields
from tests.row_norm_cases import make_case

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels to schedule")

import fused_ops.kernels.row_norm.backward as backward_module
from fused_ops import functional as F
from fused_ops.kernels import launch
from tests.row_norm_schedule import DIVISIONS, FEW_CALLS, Schedule, calls

pytestmark = [pytest.mark.one_in(8), pytest.mark.usefixtures("triton_backend", "memory_checked")]


@calls([*FEW_CALLS, ("layer_norm", True, None), ("layer_norm", True, "silu"), ("add_layer_norm", True, "silu")])
def test_chunked_backward_is_right(schedule: Schedule, function: str, residual: bool, activation: str | None) -> None:
    schedule.backward()
    check(make_case(function, 5, 700, residual=residual, activation=activation, frozen=("weight",)))


@pytest.mark.parametrize("division", DIVISIONS, ids=short)
@calls([("layer_norm", True, "relu"), ("add_rms_norm", True, None)])
def test_chunked_backward_of_every_division(
    schedule: Schedule, function: str, residual: bool, activation: str | None, division: tuple[int, int, int]
) -> None:
    span, block_span, steps = division
    schedule.backward(block_span, steps)
    check(make_case(function, 3, span, residual=residual, activation=activation, frozen=("bias",)))


FROZEN = [("x",), ("x", "residual"), ("weight", "bias"), ("x", "weight"), ("bias", "residual"), ("x", "weight", "bias")]


@pytest.mark.parametrize("frozen", FROZEN, ids="-".join)
@calls([("layer_norm", True, "relu"), ("layer_norm", True, "silu"), ("add_layer_norm", True, "relu")])
def test_chunked_backward_computes_what_is_asked_for(
    schedule: Schedule, function: str, residual: bool, activation: str | None, frozen: tuple[str, ...]
) -> None:
    schedule.backward(64, columns=64)
    check(make_case(function, 8, 97, residual=residual, activation=activation, frozen=frozen))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=short)
@calls([("layer_norm", True, "silu"), ("add_rms_norm", True, None)])
def test_chunked_backward_of_other_types(
    schedule: Schedule, function: str, residual: bool, activation: str | None, dtype: torch.dtype
) -> None:
    schedule.backward()
    case = make_case(function, 3, 700, dtype=dtype, residual=residual, activation=activation, frozen=("weight",))
    check(case)
    if case.adds_first and dtype != torch.float64:
        check(with_fields(case, residual=case.residual.float(), dtotal=case.dtotal.float()))


@pytest.mark.parametrize("programs", [1, 2, 3])
@pytest.mark.parametrize("function", ["layer_norm", "add_rms_norm"])
def test_programs_that_take_many_tiles(schedule: Schedule, function: str, programs: int) -> None:
    """dx has the same bits however the tiles are dealt out; the partial sums cover every row once."""
    case = make_case(function, 330, 20, residual=True, activation="silu")
    usual = run_fused(case)
    schedule.replace(backward_module, "backward_programs", lambda tiles, *sizes: min(tiles, programs))
    actual = check(case)
    for name in ("dx", "dresidual"):
        assert same_bits(actual.gradients[name], usual.gradients[name]), name


@pytest.mark.parametrize("stripes", [2, 5, 100])
@pytest.mark.parametrize("function", ["layer_norm", "add_rms_norm"])
def test_programs_that_share_a_block_of_columns(schedule: Schedule, function: str, stripes: int) -> None:
    case = make_case(function, 7, 97, residual=True, activation="silu")
    schedule.backward(64, stripes=1, columns=128)
    alone = run_fused(case)
    schedule.backward(64, stripes=stripes, columns=64)
    actual = check(case)
    for name in ("dx", "dresidual"):
        assert same_bits(actual.gradients[name], alone.gradients[name]), name


# --- a walk along each row: no parameter gradients ------------------------------------------------------------------

NO_PARAMETER_GRADIENTS = ("weight", "bias")


@calls([*FEW_CALLS, ("layer_norm", True, None), ("layer_norm", True, "silu"), ("add_layer_norm", True, "silu")])
def test_walked_backward_is_right(
    schedule: Schedule, launches: list[str], function: str, residual: bool, activation: str | None
) -> None:
    schedule.backward_walk()
    case = make_case(function, 5, 700, residual=residual, activation=activation, frozen=NO_PARAMETER_GRADIENTS)
    check(case)
    check(make_case(function, 5, 700, residual=residual, activation=activation, affine=False))
    assert launches.count("row_walk_backward_kernel") == 2


@pytest.mark.parametrize("division", DIVISIONS, ids=short)
@calls([("layer_norm", True, "relu"), ("add_rms_norm", True, None)])
def test_walked_backward_of_every_division(
    schedule: Schedule,
    launches: list[str],
    function: str,
    residual: bool,
    activation: str | None,
    division: tuple[int, int, int],
) -> None:
    span, block_span, _ = division
    for odd in (0, 3):
        schedule.backward_walk(block_span, stages=2)
        frozen = NO_PARAMETER_GRADIENTS
        check(make_case(function, 3, span - odd, residual=residual, activation=activation, frozen=frozen))
    assert launches.count("row_walk_backward_kernel") == 2


@pytest.mark.parametrize("frozen", [("x",), ("residual",)], ids="-".join)
@calls([("layer_norm", True, "relu"), ("add_layer_norm", True, "silu")])
def test_walked_backward_computes_what_is_asked_for(
    schedule: Schedule, function: str, residual: bool, activation: str | None, frozen: tuple[str, ...]
) -> None:
    schedule.backward_walk(64)
    frozen = (*frozen, *NO_PARAMETER_GRADIENTS)
    check(make_case(function, 8, 97, residual=residual, activation=activation, frozen=frozen))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=short)
@calls([("layer_norm", True, "silu"), ("add_rms_norm", True, None)])
def test_walked_backward_of_other_types(
    schedule: Schedule, launches: list[str], function: str, residual: bool, activation: str | None, dtype: torch.dtype
) -> None:
    schedule.backward_walk()
    frozen = NO_PARAMETER_GRADIENTS
    case = make_case(function, 3, 700, dtype=dtype, residual=residual, activation=activation, frozen=frozen)
    check(case)
    if case.adds_first and dtype != torch.float64:
        check(with_fields(case, residual=case.residual.float(), dtotal=case.dtotal.float()))
    assert "row_walk_backward_kernel" in launches


@pytest.mark.parametrize(("filters", "walks"), [(3, True), (2, False)])
def test_long_filters_take_one_launch_where_they_occupy_a_device(
    schedule: Schedule, launches: list[str], filters: int, walks: bool
) -> None:
    """Three walked rows are three fifths of five multiprocessors."""
    facts = launch.DeviceFacts(multiprocessors=5, l2_bytes=1 << 20)
    schedule.replace(backward_module, "device_facts", lambda device: facts)
    weight = normal(filters, 1030, 3, 3).requires_grad_()
    standardized = F.weight_standardize(weight)
    dy = normal(filters, 1030, 3, 3, seed=1)
    launches.clear()
    (dweight,) = torch.autograd.grad(standardized, weight, dy)
    shared = ["row_gradient_sums_kernel", "row_gradient_apply_kernel"]
    assert launches == (["row_walk_backward_kernel"] if walks else shared)
    exact = weight.detach().double().flatten(1).requires_grad_()
    normalized = torch.nn.functional.layer_norm(exact, (9270,))
    (expected,) = torch.autograd.grad(normalized, exact, dy.double().flatten(1))
    torch.testing.assert_close(dweight.flatten(1).double(), expected, rtol=1e-5, atol=1e-5)
