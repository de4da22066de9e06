"""However a row is divided among tiles, chunks and programs, its numbers are right and, where so promised, its bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.hard_data import large_mean
from tests.norm_cases import Case, assert_same_bits, check, normal, run_fused, same_bits, short, with_fields
from tests.row_norm_cases import FUNCTIONS, make_case
from tests.tolerances import kernels_are_interpreted

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels to schedule")

import fused_ops.kernels.row_norm.forward as forward_module
from benchmarks.audit.watch import watch
from fused_ops.kernels import launch
from fused_ops.kernels.problem import RowNorm, slope_takes_two_values
from fused_ops.kernels.row_norm import row_norm_forward
from tests.row_norm_schedule import DIVISIONS, FEW_CALLS, Schedule, calls

pytestmark = [pytest.mark.one_in(8), pytest.mark.usefixtures("triton_backend", "memory_checked")]

Tensor = torch.Tensor


def everything_forward(case: Case, rows: slice = slice(None)) -> dict[str, Tensor | None]:
    """y, total, statistics and, for a slope of two values, the mask: all that a forward launch can write."""
    assert case.activation is None or isinstance(case.activation, str)
    norm = RowNorm(case.x.shape[-1], case.eps, "layer" in case.function, case.adds_first, case.activation)
    out = row_norm_forward(
        case.x[rows],
        None if case.residual is None else case.residual[rows],
        case.weight,
        case.bias,
        norm,
        save_statistics=True,
        save_bits=slope_takes_two_values(norm.activation),
    )
    return out._asdict()


def assert_same_forward(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None], rows: slice) -> None:
    """The same bits in everything that forward wrote, given those rows of what is expected."""
    for name, tensor in actual.items():
        other = expected[name]
        assert same_bits(tensor, None if other is None else other[rows]), name


# --- forward -------------------------------------------------------------------------------------------------------


@pytest.mark.one_in(3)
@pytest.mark.parametrize("division", DIVISIONS, ids=short)
@calls(FEW_CALLS)
def test_walked_and_shared_rows_have_the_same_bits(
    schedule: Schedule,
    launches: list[str],
    function: str,
    residual: bool,
    activation: str | None,
    division: tuple[int, int, int],
) -> None:
    span, block_span, steps = division
    case = make_case(function, 2, span, residual=residual, activation=activation)
    schedule.forward("walk", block_span, steps)
    walked = everything_forward(case)
    assert launches == ["row_walk_forward_kernel"]
    schedule.forward("share", block_span, steps)
    assert_same_forward(everything_forward(case), walked, slice(None))


@pytest.mark.parametrize("division", [(700, 256, 1), pytest.param((385, 64, 3), marks=pytest.mark.full)], ids=short)
@calls(FEW_CALLS)
def test_shared_rows_are_right(
    schedule: Schedule, function: str, residual: bool, activation: str | None, division: tuple[int, int, int]
) -> None:
    """And with them walked ones, which have the same bits."""
    span, block_span, steps = division
    case = make_case(function, 3, span, residual=residual, activation=activation, frozen=("weight", "bias"))
    schedule.forward("share", block_span, steps)
    check(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=short)
@calls([("layer_norm", True, "silu"), ("add_rms_norm", True, None)])
def test_shared_rows_of_other_types(
    schedule: Schedule, function: str, residual: bool, activation: str | None, dtype: torch.dtype
) -> None:
    case = make_case(function, 3, 700, dtype=dtype, residual=residual, activation=activation, frozen=("weight", "bias"))
    schedule.forward("share")
    check(case)
    if case.adds_first and dtype != torch.float64:
        check(with_fields(case, residual=case.residual.float(), dtotal=case.dtotal.float()))


@pytest.mark.parametrize("division", [(700, 256, 1), (385, 64, 3), (130, 64, 2)], ids=short)
@pytest.mark.parametrize("forward", ["walk", "share"])
@calls([("layer_norm", True, "relu"), ("add_rms_norm", True, "silu")])
def test_parts_of_tiles_change_no_bit(
    schedule: Schedule,
    function: str,
    residual: bool,
    activation: str | None,
    forward: str,
    division: tuple[int, int, int],
) -> None:
    span, block_span, steps = division
    case = make_case(function, 3, span, residual=residual, activation=activation)
    schedule.forward(forward, block_span, steps)
    whole = everything_forward(case)
    schedule.forward(forward, block_span, steps, parts=2)
    assert_same_forward(everything_forward(case), whole, slice(None))


@calls([("layer_norm", True, "relu"), ("add_layer_norm", True, None)])
def test_long_rows_in_parts_by_the_tables_themselves(
    schedule: Schedule, function: str, residual: bool, activation: str | None
) -> None:
    case = make_case(function, 2, 33_032, dtype=torch.float16, residual=residual, activation=activation)
    if case.adds_first:
        case = with_fields(case, residual=case.residual.float(), dtotal=case.dtotal.float())
    loaded_itemsize, waiting = (2 + 4, 1) if case.adds_first else (2, 2)
    assert launch.chunk_config(33_032, 2, loaded_itemsize, waiting).parts == 2
    check(case)
    shared = everything_forward(case)
    schedule.replace(forward_module, "walks_rows", lambda *sizes: True)
    assert_same_forward(everything_forward(case), shared, slice(None))


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("forward", ["whole", "walk", "share"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_sample_alone_has_the_bits_it_has_in_a_batch(
    schedule: Schedule, function: str, forward: str, activation: str | None
) -> None:
    case = make_case(function, 5, 72, dtype=torch.float16, residual=True, activation=activation)
    schedule.forward(forward, 64)
    batch = everything_forward(case)
    for row in (0, 3):
        rows = slice(row, row + 1)
        assert_same_forward(everything_forward(case, rows), batch, rows)


def test_a_long_sample_alone_is_shared_and_in_a_batch_walked(schedule: Schedule) -> None:
    """By the choice that the launcher makes itself, on a device of few multiprocessors."""
    case = make_case("add_layer_norm", 9, 72, activation="gelu")
    schedule.forward("walk", 64)
    facts = launch.DeviceFacts(multiprocessors=4, l2_bytes=1 << 20)
    schedule.replace(forward_module, "device_facts", lambda device: facts)
    chosen: list[bool] = []

    def choose(*sizes: Any) -> bool:
        chosen.append(launch.walks_rows(*sizes))
        return chosen[-1]

    schedule.replace(forward_module, "walks_rows", choose)
    batch = everything_forward(case)
    assert_same_forward(everything_forward(case, slice(5, 6)), batch, slice(5, 6))
    assert chosen == [True, False]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", ["whole", "walk", "share"])
@calls([("layer_norm", True, "relu"), ("add_rms_norm", True, None)])
def test_the_order_of_programs_changes_no_bit(
    schedule: Schedule, kind: str, function: str, residual: bool, activation: str | None
) -> None:
    if not kernels_are_interpreted():
        pytest.skip("a GPU orders programs as it likes")
    case = make_case(function, 7, 712, residual=residual, activation=activation)
    schedule.forward(kind)
    if kind != "whole":
        schedule.backward(stripes=3)
    in_order = run_fused(case)
    for seed in (1, 2):
        with watch(shuffle=seed):
            assert_same_bits(run_fused(case), in_order)


def test_a_row_cut_from_a_wider_tensor_alone_has_the_bits_it_has_in_a_batch() -> None:
    """A lone row counts as having its span for a stride, which may change the load width."""
    if not kernels_are_interpreted():
        pytest.skip("a GPU may add in another order at another load width")
    case = make_case("layer_norm", 8, 70, x=normal(8, 75)[:, :70])
    assert_same_forward(everything_forward(case, slice(3, 4)), everything_forward(case), slice(3, 4))


# --- data that chunks could get wrong ------------------------------------------------------------------------------


def cliff(x: Tensor) -> Tensor:
    """Chunks whose means are far apart, so that the merge adds what no chunk saw."""
    return x + 100.0 * (torch.arange(x.shape[-1], device=x.device) // 256 % 3)


def constant(x: Tensor) -> Tensor:
    return torch.full_like(x, 3.7)


def large_squares(x: Tensor) -> Tensor:
    return x.tanh() * (math.sqrt(torch.finfo(x.dtype).max / x.shape[-1]) / 2)


@pytest.mark.parametrize("data", [cliff, large_mean, constant, large_squares], ids=lambda data: data.__name__)
@pytest.mark.parametrize("steps", [1, pytest.param(4, marks=pytest.mark.full)])
@pytest.mark.parametrize("function", ["layer_norm", pytest.param("rms_norm", marks=pytest.mark.full)])
def test_chunked_moments(schedule: Schedule, function: str, steps: int, data: Callable[[Tensor], Tensor]) -> None:
    case = make_case(function, 4, 1300, frozen=("weight", "bias"))
    schedule.forward("share", 256 // steps, steps)
    check(with_fields(case, x=data(case.x)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, which interprets the kernels, warns of Inf - Inf
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [pytest.param(0, marks=pytest.mark.full), 95])
@pytest.mark.parametrize("forward", [pytest.param("whole", marks=pytest.mark.full), "share", "walk"])
@pytest.mark.parametrize("function", ["layer_norm", "add_rms_norm"])
def test_non_finite_stays_in_its_row(schedule: Schedule, function: str, forward: str, place: int, value: float) -> None:
    clean = make_case(function, 3, 96, frozen=("weight", "bias"))
    x = clean.x.clone()
    x[1, place] = value
    schedule.forward(forward, 32, 2)
    if forward != "whole":
        schedule.backward(32, 2)
    actual, expected = check(with_fields(clean, x=x)).everything(), run_fused(clean).everything()
    for name in ("y", "dx"):
        assert same_bits(actual[name][::2], expected[name][::2]), name


# --- reproducibility -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward", ["whole", "walk", "share"])
@pytest.mark.parametrize("function", ["layer_norm", "add_rms_norm"])
def test_the_same_call_gives_the_same_bits(schedule: Schedule, function: str, forward: str) -> None:
    case = make_case(function, 2, 96, residual=True, activation="gelu", frozen=("bias",))
    schedule.forward(forward, 64)
    if forward != "whole":
        schedule.backward(64)
    assert_same_bits(run_fused(case), run_fused(case))


@pytest.mark.parametrize("chunked", [False, True])
def test_dx_of_a_sample_alone_has_the_bits_it_has_in_a_batch(schedule: Schedule, chunked: bool) -> None:
    case = make_case("layer_norm", 12, 97, activation="gelu")
    if chunked:
        schedule.backward(64)
    batch = run_fused(case).gradients["dx"]
    alone = run_fused(with_fields(case, x=case.x[11:12], dy=case.dy[11:12])).gradients["dx"]
    assert same_bits(alone, batch[11:12])
