"""How often residual_add launches, and that its numbers are right however blocks and programs divide the work."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.layouts import channels_last
from tests.norm_cases import DEVICE, assert_same_bits, same_bits, short, with_fields
from tests.residual_add_cases import AddCase, blocks_of, check, has_gap, make_case, run_fused, with_layout
from tests.tolerances import kernels_are_interpreted

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels to launch")

from benchmarks.audit.watch import watch
from fused_ops.kernels import residual
from fused_ops.kernels.launch import DeviceFacts, assume_device
from fused_ops.kernels.residual import GROUP, Division, divide, period_length
from fused_ops.kernels.views import memory_arrangement

pytestmark = pytest.mark.usefixtures("triton_backend", "memory_checked")

Tensor = torch.Tensor

DROPS = {"dropout_p": 0.3, "drop_path_p": 0.3}
FORWARD, BACKWARD = "residual_add_forward_kernel", "residual_add_backward_kernel"
SUM = "column_sum_of_any_span_kernel"


# --- how often -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "frozen", "backward"),
    [
        ({}, (), []),
        ({}, ("x",), []),
        ({"activation": "relu"}, (), [BACKWARD]),
        ({"activation": "gelu"}, (), [BACKWARD]),
        ({"activation": "gelu"}, ("x",), [BACKWARD]),
        (DROPS, (), [BACKWARD]),
        (DROPS, ("x",), []),  # dresidual is dy
        ({"scale": (4,)}, (), [BACKWARD, SUM]),
        ({"scale": (4,)}, ("scale",), [BACKWARD]),
        ({"scale": (4,)}, ("x", "scale"), []),
        ({"scale": (4,)}, ("x", "residual"), [BACKWARD, SUM]),
        ({"scale": (4,), "activation": "relu", **DROPS}, (), [BACKWARD, SUM]),
        ({"scale": (4,), "activation": "gelu", **DROPS}, ("scale",), [BACKWARD]),
        ({"residual_dtype": torch.float32, "dtype": torch.float16}, (), []),
        ({"residual_dtype": torch.float32, "dtype": torch.float16, "activation": "relu"}, (), [BACKWARD]),
    ],
)
def test_one_launch_forward_and_at_most_two_backward(
    launches: list[str], fields: dict[str, Any], frozen: tuple[str, ...], backward: list[str]
) -> None:
    for layout in (torch.clone, channels_last):
        case = with_layout(make_case(2, 3, 4, 4, frozen=frozen, **fields), layout)
        launches.clear()
        run_fused(case)
        assert launches == [FORWARD, *backward]


@pytest.mark.parametrize("fields", [{}, {"activation": "relu", "scale": (4,), **DROPS}], ids=["bare", "everything"])
def test_nothing_is_launched_without_elements_or_a_gradient(launches: list[str], fields: dict[str, Any]) -> None:
    run_fused(make_case(0, 4, **fields))
    assert launches == []
    with torch.no_grad():
        run_fused(with_fields(make_case(2, 4, **fields), dy=None))
    assert launches == [FORWARD]


# --- divisions -----------------------------------------------------------------------------------------------------

BLOCK = 128
Shape = tuple[int, ...]
# x and its scale, each for a way in which a program's block meets the channels: see the test below.
DIVIDED: list[tuple[Shape, Shape]] = [
    ((70, 24), (24,)),  # channels that are the next ones, eight at a time
    ((70, 7), (7,)),
    ((3, 1000), (1000,)),  # a period of more blocks than are tried
    ((3, 1003), (1003,)),
    ((30, 3, 8), (3, 1)),
    ((30, 5, 5), (5, 1)),  # whole runs that do not divide the block
    ((40, 2, 3), (2, 1)),
    ((12, 3, 6), (3, 1)),  # parts of runs
    ((10, 3, 49), (3, 1)),
    ((9, 2, 200), (2, 1)),  # runs longer than a block
    ((6, 2, 256), (2, 1)),
    ((4, 2, 259), (2, 1)),
    ((30, 8, 8), (8, 1)),
    ((1500,), ()),
    ((1501,), (1,)),
    ((30, 50), (30, 1)),  # by sample
    ((30, 50), (30, 50)),  # of x's own shape
    ((6, 4, 9, 5), (4, 1, 5)),  # an axis of x's missing between two of its own
]


def division_of(shape: Shape, scale: Shape) -> tuple[Division, int]:
    """How a contiguous x is divided, and its period."""
    strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    places = memory_arrangement(shape, strides, scale, drops=False)
    division = divide(places.inner, BLOCK)
    return division, period_length(places.inner * places.channels, division.owned)


def assert_division_is_right(case: AddCase) -> None:
    """On a device of one multiprocessor, whose few programs go down many periods each."""
    with blocks_of(BLOCK), assume_device(DeviceFacts(multiprocessors=1, l2_bytes=1 << 20)):
        check(case)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("shape", "scale"), DIVIDED, ids=short)
def test_every_division_is_right(shape: Shape, scale: Shape) -> None:
    assert_division_is_right(make_case(*shape, scale=scale, activation="silu"))


@pytest.mark.one_in(6)
@pytest.mark.parametrize("layout", [torch.clone, channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "scale"), [each for each in DIVIDED if len(each[0]) > 2 and not has_gap(each[1], each[0])], ids=short
)
def test_every_division_drops_right(shape: Shape, scale: Shape, layout: Callable[[Tensor], Tensor]) -> None:
    case = make_case(*shape, scale=scale, activation="silu", dropout_p=0.3)
    assert_division_is_right(with_layout(case, layout))


@pytest.mark.parametrize(
    ("shape", "scale", "sums"),
    [((600, 3), (3,), 2), ((16, 64), (64,), 1), ((5, 4, 17, 11), (4, 1, 1), 2), ((300, 16, 9), (16, 1), 2)],
    ids=short,
)
def test_many_partial_rows_are_summed_in_several_launches(
    shape: Shape, scale: Shape, sums: int, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few channels are few columns, and so few programs, each of which would go down all rows."""
    if DEVICE.type != "cpu":
        pytest.skip("a device is assumed for CPU tensors alone")
    monkeypatch.setattr(residual, "_ROWS", 8)
    with assume_device(DeviceFacts(multiprocessors=1, l2_bytes=1 << 20)):
        check(make_case(*shape, scale=scale, activation="silu"))
    assert sums <= launches.count(SUM) <= 4


@pytest.mark.parametrize(("rows", "some"), [(7, 1), (1024, 1), (1031, 1), (1025, 25), (2048, 32), (2 * 1023**2, 1089)])
def test_rows_at_first_divide_all(rows: int, some: int) -> None:
    assert residual._rows_at_first(rows, 1024) == some


def test_the_divisions_are_of_every_kind() -> None:
    """Whole runs that divide a block and others, parts of one and whole blocks, and loops of several periods."""
    kinds, turns = set(), 0
    for shape, scale in DIVIDED:
        (owned, summed, whole_runs), period = division_of(shape, scale)
        kinds.add((whole_runs, BLOCK % summed == 0, owned < BLOCK, summed in (1, BLOCK)))
        turns = max(turns, math.prod(shape) // period // 4)  # of four programs
    assert {(whole, divides) for whole, divides, *_ in kinds} == {(True, True), (True, False), (False, True)}
    assert turns >= 3


def test_a_division_owns_what_it_sums() -> None:
    for inner, block in itertools.product([*range(1, 300), 3136, 4096, 50176, 10007], (512, 1024, 2048)):
        owned, summed, whole_runs = divide(inner, block)
        assert 0 < owned <= block and owned % GROUP == 0 and owned % summed == 0 and inner % summed == 0, inner
        assert whole_runs == (summed == inner)
        assert whole_runs or owned == block


def test_a_period_has_every_channel_alike_and_fills_its_blocks() -> None:
    for columns, block in itertools.product([*range(1, 300), 768, 1000, 4096, 9408, 100_003], (448, 1008, 2048)):
        period = period_length(columns, block)
        assert period % columns == 0 and period % GROUP == 0
        blocks = -(-period // block)
        filled = period / (blocks * block)
        smaller = range(math.lcm(columns, GROUP), period, math.lcm(columns, GROUP))
        assert filled >= 8 / 9 or all(each / (-(-each // block) * block) <= filled for each in smaller)


# --- bits ----------------------------------------------------------------------------------------------------------

REPEATED = [
    {"shape": (40, 30), "scale": (30,), "activation": "silu"},
    {"shape": (4, 6, 7, 7), "scale": (6, 1, 1), "activation": "relu"},
    {"shape": (1500,), "activation": "relu"},
]


def repeated_case(shape: Shape, **fields: Any) -> AddCase:
    return make_case(*shape, **fields, **DROPS)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("fields", REPEATED, ids=lambda fields: short(fields["shape"]))
def test_the_order_of_programs_changes_no_bit(fields: dict[str, Any]) -> None:
    if not kernels_are_interpreted():
        pytest.skip("a GPU orders programs as it likes")
    case = repeated_case(**fields)
    with blocks_of(256):
        in_order = run_fused(case)
        for seed in (1, 2):
            with watch(shuffle=seed):
                assert_same_bits(run_fused(case), in_order)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("fields", REPEATED, ids=lambda fields: short(fields["shape"]))
def test_the_same_call_gives_the_same_bits(fields: dict[str, Any], dtype: torch.dtype) -> None:
    case = repeated_case(**fields, dtype=dtype)
    assert_same_bits(run_fused(case), run_fused(case))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("multiprocessors", [1, 2])
@pytest.mark.parametrize("fields", REPEATED[:2], ids=lambda fields: short(fields["shape"]))
def test_how_many_programs_share_the_rows_changes_no_gradient_of_an_element(
    fields: dict[str, Any], multiprocessors: int
) -> None:
    case = repeated_case(**fields)
    with blocks_of(256):
        usual = run_fused(case)
        with assume_device(DeviceFacts(multiprocessors=multiprocessors, l2_bytes=1 << 20)):
            found = run_fused(case)
    for name in ("dx", "dresidual"):
        assert same_bits(found.gradients[name], usual.gradients[name]), name


@pytest.mark.one_in(2)
@pytest.mark.parametrize("scale", [None, (60,)], ids=short)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_a_sample_alone_has_the_bits_it_has_in_a_batch(activation: str | None, scale: Shape | None) -> None:
    """And so it has where it drops, if it is the first: the others have other indices."""
    case = make_case(5, 60, dtype=torch.float16, scale=scale, activation=activation)
    for sample, rates in ((3, {}), (0, DROPS)):
        batch = run_fused(with_fields(case, **rates))
        rows = slice(sample, sample + 1)
        parts = {name: getattr(case, name)[rows] for name in ("x", "residual", "dy")}
        alone = run_fused(with_fields(case, **parts, **rates))
        for name in ("y", "dx", "dresidual"):
            assert same_bits(alone.everything()[name], batch.everything()[name][rows]), name


# --- devices and alignment -----------------------------------------------------------------------------------------


def test_what_is_remembered_depends_on_nothing_but_types() -> None:
    """Calls of many kinds in turn: a launcher that served one of another set of types would raise."""
    fields = [
        {},
        {"activation": "relu"},
        {"activation": "relu", "frozen": ("x", "residual")},
        {"scale": (4,)},
        {"scale": (4,), "scale_dtype": torch.float32},
        {"scale": (), "activation": "gelu"},
        DROPS,
        {"dropout_p": 0.3},
        {"drop_path_p": 0.3, "activation": "gelu"},
        {"scale": (3, 4), "frozen": ("scale",), **DROPS},
    ]
    for dtype, residual_dtype in ((torch.float16, torch.float16), (torch.float16, torch.float32), (torch.float64,) * 2):
        for each in fields:
            run_fused(make_case(3, 4, dtype=dtype, residual_dtype=residual_dtype, **each))
