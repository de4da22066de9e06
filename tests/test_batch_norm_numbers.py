"""The numbers of batch norm, forward and backward, against NumPy float64 within torch eager's own error."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as TF

from fused_ops import functional as F
from tests.channel_norm_cases import with_layout
from tests.hard_data import HARD, constant_rows, large_mean, outlier
from tests.layouts import channels_last
from tests.norm_cases import (
    DEVICE,
    DTYPES,
    HALF,
    OPERANDS,
    TORCH_ACTIVATIONS,
    check,
    short,
    with_exact_sums,
    with_fields,
)

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels")

from tests.batch_norm_cases import PLACES, WAYS, BatchCase, Way, make_case, running
from tests.conftest import FamilyCall

pytestmark = [pytest.mark.one_in(8), pytest.mark.usefixtures("triton_backend", "memory_checked")]

Tensor = torch.Tensor

each_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


@pytest.fixture
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    """Runs batch norm in the way that it is parametrized with, and makes cases for it."""
    with running(request.param) as way:
        yield way


def in_ways(*quick: str) -> pytest.MarkDecorator:
    """Runs a test in every way, in all but the quick ones in the long sweep."""
    ways = [
        pytest.param(name, marks=[] if name in quick else pytest.mark.full, id=name.replace(" ", "-")) for name in WAYS
    ]
    return pytest.mark.parametrize("way", ways, indirect=True)


def ordinary() -> list[Any]:
    """Every place of the residual, activation of each kind, type, way and mode. Quick are an eighth."""
    calls = []
    for (index, place), (offset, activation), dtype, (turn, name), training in itertools.product(
        enumerate(PLACES), enumerate((None, "relu", "gelu")), DTYPES, enumerate(WAYS), (True, False)
    ):
        is_quick = (index + offset + turn + DTYPES.index(dtype) + 4 * training) % 8 == 0
        label = "-".join(
            map(short, (*place, activation, dtype, name.replace(" ", "-"), "eval-training"[5 * training :]))
        )
        marks = [] if is_quick else pytest.mark.full
        calls.append(pytest.param(*place, activation, dtype, name, training, marks=marks, id=label))
    return calls


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("function", "residual", "activation", "dtype", "way", "training"), ordinary(), indirect=["way"]
)
def test_ordinary_data(
    function: str, residual: bool, activation: str | None, dtype: torch.dtype, way: Way, training: bool
) -> None:
    case = way.case(function, dtype=dtype, residual=residual, activation=activation, training=training)
    check(with_exact_sums(case) if activation == "relu" else case)


@in_ways("whole", "planes in small pieces")
@each_mode
def test_running_statistics_are_torchs(training: bool, way: Way) -> None:
    for dtype, momentum in itertools.product((torch.float32, torch.float16, torch.float64), (0.0, 0.1, 1.0)):
        case = way.case("add_batch_norm", dtype=dtype, parameters=torch.float32, training=training)
        ours, torchs = case.running(), case.running()
        F.add_batch_norm(case.x, case.residual, *ours, training=training, momentum=momentum)
        TF.batch_norm((case.residual + case.x).float(), *torchs, training=training, momentum=momentum)
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5)


@in_ways("whole channels_last")
def test_running_statistics_that_are_no_run_of_elements(way: Way) -> None:
    case = way.case("batch_norm")
    expected = case.running()
    F.batch_norm(case.x, *expected, training=True)
    strided = [statistic.repeat_interleave(2)[::2] for statistic in case.running()]
    F.batch_norm(case.x, *strided, training=True)
    torch.testing.assert_close(strided, list(expected), rtol=0, atol=0)


@pytest.mark.one_in(3)
@in_ways("whole", "columns in small pieces")
@pytest.mark.parametrize("activation", TORCH_ACTIVATIONS)
@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.full)], ids=["training", "eval"])
def test_every_activation(training: bool, activation: str, way: Way) -> None:
    dtype = HALF[list(TORCH_ACTIVATIONS).index(activation) % 2]
    case = way.case("batch_norm", dtype=dtype, residual=True, activation=activation, training=training)
    check(with_exact_sums(case))


@in_ways("whole", "channels_last in small pieces")
@pytest.mark.parametrize("affine", ["neither", "weight", "bias"])
@each_mode
def test_weight_and_bias_are_optional(training: bool, affine: str, way: Way) -> None:
    case = way.case("batch_norm", dtype=torch.float16, residual=True, activation="silu", training=training)
    check(
        with_fields(
            case,
            weight=case.weight if affine == "weight" else None,
            bias=case.bias if affine == "bias" else None,
        )
    )


def with_data(case: BatchCase, data: Any) -> BatchCase:
    """A case each of whose channels is such data; where what is normalized is a sum, the halves are exact."""
    of_channels = case.x.transpose(0, 1)
    x = data(of_channels.reshape(1, case.x.shape[1], -1)).view(of_channels.shape).transpose(0, 1).contiguous()
    case = with_fields(case, x=x / 2, residual=x / 2) if case.adds_first else with_fields(case, x=x)
    lies_last = case.dy.dim() > 2 and not case.dy.is_contiguous()
    return with_layout(case, channels_last if lies_last else torch.Tensor.contiguous)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@in_ways(*WAYS)
@pytest.mark.parametrize(
    ("data", "dtype"),
    [
        pytest.param(data, dtype, marks=[] if (data, dtype) in quick else pytest.mark.full)
        for data, dtype in itertools.product(HARD, DTYPES)
        for quick in [((large_mean, torch.float32), (outlier, torch.float16), (constant_rows, torch.bfloat16))]
        # One element of a channel decides its result, and chance how well that rounds.
        if data is not outlier or dtype in HALF
    ],
    ids=lambda value: getattr(value, "__name__", short(value)),
)
def test_data_that_rounds_badly(data: Any, dtype: torch.dtype, way: Way) -> None:
    check(with_data(way.case("batch_norm", dtype=dtype), data))


SHAPES = [
    (2, 1),
    (1, 1, 2),
    (3, 5, 1, 1),
    (5, 70),
    (2, 30, 49),
    (1, 30, 7, 7),
    (2, 8, 14, 14),
    (70, 3, 7, 7),
    (2, 3, 2, 3, 5),
    (1, 3, 300),
    (2, 2, 16, 16),
    (150, 2, 16, 16),  # many partial results of a channel
    (300, 9),
]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("shape", SHAPES, ids=short)
@pytest.mark.parametrize("layout", [torch.clone, channels_last], ids=["contiguous", "channels_last"])
@each_mode
def test_shapes(training: bool, layout: Any, shape: tuple[int, ...]) -> None:
    case = make_case("batch_norm", *shape, dtype=torch.float16, residual=True, activation="relu", training=training)
    check(with_layout(with_exact_sums(case), layout if len(shape) > 2 else torch.clone))


@pytest.mark.one_in(6)
@in_ways("whole", "columns in small pieces", "whole matrix")
@pytest.mark.parametrize("activation", [None, "leaky_relu", "gelu"])
@pytest.mark.parametrize(
    ("function", "residual"),
    [pytest.param(*place, marks=[] if place == ("batch_norm", True) else pytest.mark.full) for place in PLACES],
)
@each_mode
def test_every_choice_of_gradients(
    training: bool, function: str, residual: bool, activation: str | None, way: Way, family_calls: list[FamilyCall]
) -> None:
    """`check` also holds that a frozen operand gets None; and no launcher computes or allocates one nobody wants."""
    case = way.case(function, dtype=torch.float16, residual=residual, activation=activation, training=training)
    case = with_exact_sums(case)
    given = [name for name in OPERANDS if getattr(case, name) is not None]
    for frozen in itertools.chain.from_iterable(itertools.combinations(given, count) for count in range(5)):
        family_calls.clear()
        check(with_fields(case, frozen=frozen))
        wanted = {f"d{name}" for name in given if name not in frozen}
        if case.adds_first and "dresidual" in wanted:  # it is dx, and goes by that name
            wanted = wanted - {"dresidual"} | {"dx"}
        elif activation is None:  # dresidual is dy, which is at hand
            wanted -= {"dresidual"}
        backward = [call.result._asdict() for call in family_calls if call.direction == "backward"]
        computed = {name for found in backward for name, gradient in found.items() if gradient is not None}
        assert computed == wanted, frozen
        assert len(backward) == bool(wanted), frozen


@in_ways("whole", "planes in small pieces")
@pytest.mark.parametrize("types", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)], ids=short)
@each_mode
def test_parameters_of_another_type(training: bool, types: tuple[torch.dtype, torch.dtype], way: Way) -> None:
    check(way.case("batch_norm", dtype=types[0], parameters=types[1], activation="silu", training=training))


@pytest.mark.one_in(2)
@in_ways("whole", "channels_last in small pieces")
@pytest.mark.parametrize("missing", ["dy", "dtotal"])
@each_mode
def test_an_output_that_nothing_uses_and_a_float32_residual(training: bool, missing: str, way: Way) -> None:
    case = way.case("add_batch_norm", dtype=torch.float16, activation="silu", training=training)
    case = with_fields(case, residual=case.residual.float(), dtotal=case.dtotal.float())
    check(case)
    for frozen in ((), ("x",), ("residual",), ("weight", "bias"), ("x", "residual")):
        check(with_fields(case, frozen=frozen, **{missing: None}))


# Where channels of a matrix have gaps between them in a program's tile, the mask has none.
@pytest.mark.one_in(1)
@pytest.mark.parametrize(
    ("samples", "channels", "plane"),
    [
        (samples, channels, plane)
        for samples, channels in ((1, 30), (2, 300), (4, 8), (5, 30))
        for plane in (1, 2, 3, 5, 6, 7, 8, 9, 15, 25, 49, 121, 225)
        if samples * plane > 1
    ],
)
def test_the_mask_lies_as_the_elements_do(samples: int, channels: int, plane: int) -> None:
    drawn = torch.randn(2, samples, channels, plane, generator=torch.Generator().manual_seed(plane))
    x, residual = drawn.to(DEVICE).unbind()
    y = F.batch_norm(x.requires_grad_(), None, None, training=True, residual=residual, activation="relu")
    (bits,) = [tensor for tensor in y.grad_fn.saved_tensors if tensor is not None and tensor.dtype == torch.uint8]
    flags = np.unpackbits(bits.cpu().numpy(), axis=1, bitorder="little")[:, : channels * plane]
    np.testing.assert_array_equal(flags.astype(bool), (y > 0).reshape(samples, -1).cpu().numpy())
