"""However a row is divided among tiles, chunks and programs, the numbers are right, and where promised the same bits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.row_norm_cases import (
    DEVICE,
    FUNCTIONS,
    Case,
    assert_same_bits,
    check,
    make_case,
    normal,
    run_fused,
    same_bits,
    short,
    with_fields,
)
from tests.tolerances import assert_within_budget, kernels_are_interpreted, rounding

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels to schedule")

import fused_ops.kernels.column_sum as column_sum_module
import fused_ops.kernels.row_norm.backward as backward_module
import fused_ops.kernels.row_norm.forward as forward_module
from fused_ops.kernels import launch
from fused_ops.kernels.row_norm import RowNorm, row_norm_forward

pytestmark = pytest.mark.usefixtures("triton_backend")

Tensor = torch.Tensor

# The places of a residual, and activations of each kind: no slope, a slope of two values (a bit mask), any slope.
CALLS = [
    pytest.param(function, residual, activation, id="-".join([function, "residual" * residual, str(activation)]))
    for function, residual, activation in [
        *itertools.product(("layer_norm", "rms_norm"), (False, True), (None, "relu", "silu")),
        *itertools.product(FUNCTIONS[2:], (True,), (None, "relu", "silu")),
    ]
]
every_call = pytest.mark.parametrize(("function", "residual", "activation"), CALLS)
FORWARDS = ("whole", "walk", "share")
every_forward = pytest.mark.parametrize("forward", FORWARDS)


class Schedule:
    """Puts other configurations in the place of the launchers' own until the test ends."""

    MODULES = (forward_module, backward_module, column_sum_module)

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def replace(self, module: ModuleType, name: str, function: Callable[..., Any]) -> None:
        self._monkeypatch.setattr(module, name, function)
        self.forget_launchers()

    def forget_launchers(self) -> None:
        for module in self.MODULES:
            for member in vars(module).values():
                if member is not launch.device_facts and hasattr(member, "cache_clear"):
                    member.cache_clear()

    def forward(self, kind: str, block_span: int = 32, steps: int = 1) -> None:
        """Whole rows as configured, or chunks of steps * block_span elements, walked or shared."""
        if kind == "whole":
            return
        self.replace(forward_module, "row_forward_config", lambda *sizes: None)
        self.replace(forward_module, "chunk_config", chunks_of(block_span, steps))
        self.replace(forward_module, "walks_rows", lambda *sizes: kind == "walk")

    def backward(
        self, block_span: int = 32, steps: int = 1, stripes: int | None = None, block_columns: int = 64
    ) -> None:
        """Chunks of steps * block_span elements; blocks of columns, each shared by `stripes` programs."""
        self.replace(backward_module, "row_backward_config", lambda *sizes: None)
        self.replace(backward_module, "backward_chunk_config", chunks_of(block_span, steps))
        block = launch.RowConfig(block_rows=1, block_span=block_columns, num_warps=4, stages=2)
        self.replace(backward_module, "column_block_config", lambda itemsize: block)
        if stripes is not None:
            self.replace(backward_module, "column_stripes", lambda rows, blocks, facts: min(rows, stripes))


def chunks_of(block_span: int, steps: int) -> Callable[[int, int], launch.ChunkConfig]:
    def config(span: int, itemsize: int) -> launch.ChunkConfig:
        return launch.ChunkConfig(block_span, steps, launch.cdiv(span, block_span * steps), num_warps=4)

    return config


@pytest.fixture
def schedule(monkeypatch: pytest.MonkeyPatch) -> Iterator[Schedule]:
    schedule = Schedule(monkeypatch)
    yield schedule
    monkeypatch.undo()
    schedule.forget_launchers()


def row_norm_of(case: Case) -> RowNorm:
    return RowNorm(case.x.shape[-1], case.eps, "layer" in case.function, case.adds_first, case.activation)


def everything_forward(case: Case, rows: slice = slice(None)) -> dict[str, Tensor | None]:
    """y, total, statistics and, for a slope of two values, the mask: all that a forward launch can write."""
    norm = row_norm_of(case)
    residual = None if case.residual is None else case.residual[rows]
    out = row_norm_forward(
        case.x[rows],
        residual,
        case.weight,
        case.bias,
        norm,
        save_statistics=True,
        save_bits=case.activation is not None and norm.slope_takes_two_values,
    )
    return out._asdict()


def assert_same_forward(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None], what: str) -> None:
    for name, tensor in actual.items():
        other = expected[name]
        assert (tensor is None) == (other is None), name
        if tensor is not None and other is not None:
            same = torch.equal(tensor, other) if name == "bits" else same_bits(tensor, other)
            assert same, f"{name} differs: {what}"


# --- forward -------------------------------------------------------------------------------------------------------

# (span, block_span, steps): one chunk, one element beyond it, no power of two of chunks, a last chunk of one element,
# and chunks whose last tiles lie beyond the row.
DIVISIONS = [(32, 32, 1), (33, 32, 1), (150, 32, 1), (161, 32, 1), (150, 16, 2), (97, 16, 3), (65, 16, 4)]
every_division = pytest.mark.parametrize("division", DIVISIONS, ids=short)


@every_division
@every_call
def test_walked_and_shared_rows_have_the_same_bits(
    schedule: Schedule,
    function: str,
    residual: bool,
    activation: str | None,
    division: tuple[int, int, int],
) -> None:
    span, block_span, steps = division
    case = make_case(function, 3, span, residual=residual, activation=activation)
    schedule.forward("walk", block_span, steps)
    walked = everything_forward(case)
    schedule.forward("share", block_span, steps)
    assert_same_forward(everything_forward(case), walked, "walked and shared")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=short)
@pytest.mark.parametrize("division", [(161, 32, 1), (97, 16, 3)], ids=short)
@pytest.mark.parametrize("forward", ["walk", "share"])
@every_call
def test_chunked_forward_is_right(
    schedule: Schedule,
    function: str,
    residual: bool,
    activation: str | None,
    forward: str,
    division: tuple[int, int, int],
    dtype: torch.dtype,
) -> None:
    span, block_span, steps = division
    case = make_case(
        function, 12, span, dtype=dtype, residual=residual, activation=activation, frozen=("weight", "bias")
    )
    if activation == "relu":  # away from the kink, and with sums that every type holds
        case = with_fields(case, x=(case.x * 16).round() / 16)
        case = case if case.residual is None else with_fields(case, residual=(case.residual * 16).round() / 16)
    schedule.forward(forward, block_span, steps)
    check(case)


@pytest.mark.parametrize("activation", [None, "relu"])
@every_forward
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_sample_alone_has_the_bits_it_has_in_a_batch(
    schedule: Schedule, function: str, forward: str, activation: str | None
) -> None:
    case = make_case(function, 40, 70, dtype=torch.float16, residual=True, activation=activation)
    schedule.forward(forward, 32)
    batch = everything_forward(case)
    for row in (0, 7, 39):
        alone = everything_forward(case, slice(row, row + 1))
        expected = {name: None if tensor is None else tensor[row : row + 1] for name, tensor in batch.items()}
        assert_same_forward(alone, expected, f"row {row} alone")


def test_a_long_sample_alone_is_shared_and_in_a_batch_walked(schedule: Schedule) -> None:
    """With the choice that the launcher makes itself, on a device of few multiprocessors."""
    case = make_case("add_layer_norm", 9, 70, activation="gelu")
    schedule.replace(forward_module, "row_forward_config", lambda *sizes: None)
    schedule.replace(forward_module, "chunk_config", chunks_of(32, 1))
    facts = launch.DeviceFacts(multiprocessors=4, l2_bytes=1 << 20)
    schedule.replace(forward_module, "device_facts", lambda device: facts)
    chosen = []
    choose = forward_module.walks_rows

    def spy(*sizes: Any) -> bool:
        chosen.append(choose(*sizes))
        return chosen[-1]

    schedule.replace(forward_module, "walks_rows", spy)
    batch = everything_forward(case)
    alone = everything_forward(case, slice(5, 6))
    assert chosen == [True, False]
    expected = {name: None if tensor is None else tensor[5:6] for name, tensor in batch.items()}
    assert_same_forward(alone, expected, "row 5 alone")


def test_a_row_cut_from_a_wider_tensor_alone_has_the_bits_it_has_in_a_batch() -> None:
    """A lone row counts as having its span for a stride; only a GPU's load width could tell."""
    if not kernels_are_interpreted():
        pytest.skip("another load width may add in another order")
    wide = normal(8, 75, dtype=torch.float16)
    case = make_case("layer_norm", 8, 70, dtype=torch.float16, x=wide[:, :70])
    batch = everything_forward(case)
    alone = everything_forward(case, slice(3, 4))
    assert_same_forward(alone, {name: None if t is None else t[3:4] for name, t in batch.items()}, "row 3 alone")


# --- data that chunks could get wrong --------------------------------------------------------------------------------


def cliff(x: Tensor) -> Tensor:
    """Chunks whose means are far apart, so that the merge adds what no chunk saw."""
    return x + 100.0 * (torch.arange(x.shape[-1], device=x.device) // 32 % 3)


def large_mean(x: Tensor) -> Tensor:
    return (1e4 + 1e-2 * x.double()).to(x.dtype)


def constant(x: Tensor) -> Tensor:
    return torch.full_like(x, 3.7)


def near_the_root_of_the_largest(x: Tensor) -> Tensor:
    return x.tanh() * math.sqrt(torch.finfo(x.dtype).max / x.shape[-1]) / 2


CHUNK_DATA = [cliff, large_mean, constant, near_the_root_of_the_largest]


@pytest.mark.parametrize("data", CHUNK_DATA, ids=lambda data: data.__name__)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("forward", ["walk", "share"])
@pytest.mark.parametrize("function", ["layer_norm", "rms_norm"])
def test_chunked_moments(
    schedule: Schedule, function: str, forward: str, steps: int, data: Callable[[Tensor], Tensor]
) -> None:
    case = make_case(function, 12, 1111)
    schedule.forward(forward, 32, steps)
    check(with_fields(case, x=data(case.x), frozen=("weight", "bias")))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, which interprets the kernels, warns of Inf - Inf
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 40, 96])
@every_forward
@pytest.mark.parametrize("function", FUNCTIONS)
def test_non_finite_stays_in_its_row(schedule: Schedule, function: str, forward: str, place: int, value: float) -> None:
    clean = make_case(function, 4, 97)
    x = clean.x.clone()
    x[1, place] = value
    schedule.forward(forward, 16, 2)
    if forward != "whole":
        schedule.backward(16, 2)
    actual = check(with_fields(clean, x=x, frozen=("weight", "bias"))).everything()
    expected = run_fused(clean).everything()
    others = torch.tensor([0, 2, 3])
    for name in ("y", "dx"):
        assert same_bits(actual[name][others], expected[name][others]), name


# --- backward ------------------------------------------------------------------------------------------------------


@every_division
@every_call
def test_chunked_backward_is_right(
    schedule: Schedule,
    function: str,
    residual: bool,
    activation: str | None,
    division: tuple[int, int, int],
) -> None:
    span, block_span, steps = division
    schedule.backward(block_span, steps)
    check(make_case(function, 24, span, residual=residual, activation=activation))


@pytest.mark.parametrize(
    "frozen", [("x",), ("x", "residual"), ("weight", "bias"), ("x", "weight"), ("bias", "residual")]
)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_chunked_backward_computes_what_is_asked_for(
    schedule: Schedule, function: str, activation: str | None, frozen: tuple[str, ...]
) -> None:
    schedule.backward(32)
    check(make_case(function, 24, 97, residual=True, activation=activation, frozen=frozen))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=short)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_chunked_backward_of_other_types(schedule: Schedule, function: str, dtype: torch.dtype) -> None:
    schedule.forward("share", 32)
    schedule.backward(32)
    case = make_case(function, 24, 97, dtype=dtype, residual=True, activation="silu")
    check(case)
    if case.adds_first and dtype != torch.float64:
        check(with_fields(case, residual=case.residual.float(), dtotal=case.dtotal.float()))


@pytest.mark.parametrize("programs", [1, 2, 3, 5])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_programs_that_take_many_tiles(schedule: Schedule, function: str, programs: int) -> None:
    """dx has the same bits however the tiles are dealt out; the partial sums cover every row once."""
    case = make_case(function, 700, 20, residual=True, activation="silu")
    usual = run_fused(case)
    schedule.replace(backward_module, "backward_programs", lambda tiles, *sizes: min(tiles, programs))
    actual = check(case)
    for name in ("dx", "dresidual"):
        assert same_bits(actual.gradients[name], usual.gradients[name]), name


@pytest.mark.parametrize("stripes", [1, 2, 5, 24, 100])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_programs_that_share_a_block_of_columns(schedule: Schedule, function: str, stripes: int) -> None:
    case = make_case(function, 24, 97, residual=True, activation="silu")
    schedule.backward(32, stripes=1)
    alone = run_fused(case)
    schedule.backward(32, stripes=stripes, block_columns=32)
    actual = check(case)
    for name in ("dx", "dresidual"):
        assert same_bits(actual.gradients[name], alone.gradients[name]), name


# --- reproducibility -----------------------------------------------------------------------------------------------


@every_forward
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_same_call_gives_the_same_bits(schedule: Schedule, function: str, forward: str) -> None:
    case = make_case(function, 30, 97, residual=True, activation="gelu")
    schedule.forward(forward)
    if forward != "whole":
        schedule.backward()
    assert_same_bits(run_fused(case), run_fused(case))


def test_gradients_of_other_rows_do_not_move_a_row(schedule: Schedule) -> None:
    """dx of a row, too, has the bits it has alone."""
    case = make_case("layer_norm", 30, 97, activation="gelu")
    alone = with_fields(case, x=case.x[11:12], dy=case.dy[11:12])
    for chunked in (False, True):
        if chunked:
            schedule.backward(32)
        batch = run_fused(case).gradients["dx"]
        assert same_bits(run_fused(alone).gradients["dx"], batch[11:12])


# --- the sum of partial gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["both", "dweight", "dbias"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (63, 17), (64, 5), (65, 33), (200, 48), (130, 2049)], ids=short)
def test_column_sum(shape: tuple[int, int], given: str) -> None:
    partials = [
        normal(*shape, seed=seed) if given in ("both", name) else None for seed, name in enumerate(("dweight", "dbias"))
    ]
    sums = column_sum_module.column_sum(*partials, torch.float32, torch.float32)
    for name, partial, actual in zip(("dweight", "dbias"), partials, sums, strict=True):
        if partial is None:
            assert actual is None
            continue
        assert actual is not None and actual.shape == shape[1:]
        exact = partial.double().sum(0).cpu()
        # Each addition rounds once, and a running sum of this many is no larger than the sum of magnitudes.
        allowed = shape[0] * rounding(torch.float32) * partial.double().abs().sum(0).cpu()
        assert bool(((actual.double().cpu() - exact).abs() <= allowed).all()), name


def test_column_sum_rounds_to_the_parameters_types() -> None:
    partials = normal(70, 20), normal(70, 20, seed=1)
    dweight, dbias = column_sum_module.column_sum(*partials, torch.float16, torch.float64)
    assert (dweight.dtype, dbias.dtype) == (torch.float16, torch.float64)
    for partial, actual in zip(partials, (dweight, dbias), strict=True):
        expected = partial.double().sum(0).cpu()
        assert_within_budget("sum", actual, partial.sum(0).to(actual.dtype), expected, terms=70)


# --- configurations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("config", [launch.chunk_config, launch.backward_chunk_config])
def test_chunks_cover_every_row_without_an_empty_chunk(
    config: Callable[[int, int], launch.ChunkConfig], itemsize: int
) -> None:
    powers = [2**k + beside for k in range(13, 29) for beside in (-1, 0, 1)]
    for span in [*powers, 131_073, 200_000, 3 * 2**20 + 5]:
        chunks = config(span, itemsize)
        length = chunks.block_span * chunks.steps
        assert (chunks.chunks - 1) * length < span <= chunks.chunks * length, span
        assert chunks.chunks <= launch.MOST_CHUNKS, span
        assert chunks.block_span & (chunks.block_span - 1) == 0, span


def test_the_device_has_a_say_in_no_block() -> None:
    """What decides the bits of a row takes neither rows nor a device."""
    assert DEVICE.type in ("cpu", "cuda")
