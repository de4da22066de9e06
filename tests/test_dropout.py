"""The numbers of dropout inside the add_ norms against NumPy float64, which is told what kernels keep: however these
divide the work, and within torch eager's own error."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fused_ops
from fused_ops import reference
from tests.calls import as_tuple
from tests.channel_norm_cases import make_case as make_channel_case
from tests.channel_norm_cases import with_layout
from tests.layouts import Layout, channels_last, every_other_column, left_columns, transposed
from tests.norm_cases import DEVICE, check, normal, short, with_exact_sums, with_fields
from tests.switch_norm_calls import call as call_switch_norm
from tests.switch_norm_calls import statistics, tensors

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels")

from fused_ops.drops import drop_factor
from fused_ops.kernels.channel_norm.batch_backward import batch_norm_backward
from fused_ops.kernels.channel_norm.batch_forward import batch_norm_forward
from fused_ops.kernels.problem import BatchNorm, Wanted
from tests.batch_norm_cases import make_case as make_batch_case
from tests.dropout_cases import FUNCTIONS, PLANES, ROWS, factor, running, small_case, ways_of, wide
from tests.row_norm_cases import make_case as make_row_case

pytestmark = [pytest.mark.one_in(8), pytest.mark.usefixtures("triton_backend", "memory_checked")]

Tensor = torch.Tensor

# A slope of two values takes a rate of 1/2 where types are short: with multiples of 1/16 every total is then exact, and
# how it rounds does not decide on which side of the kink it lies.
SETTINGS: list[tuple[torch.dtype, str | None, float, bool]] = [
    (torch.float64, "gelu", 0.3, False),
    (torch.float32, None, 0.3, False),
    (torch.bfloat16, "gelu", 0.3, False),
    (torch.float16, "relu", 0.5, True),
    (torch.float64, "relu", 0.3, False),
    (torch.float32, "gelu", 1.0, False),
    (torch.bfloat16, "relu", 0.5, False),
    (torch.bfloat16, None, 0.3, True),
    (torch.float64, None, 1.0, False),
    (torch.float32, "relu", 0.5, False),
    (torch.float16, "gelu", 0.3, True),
    (torch.float16, None, 1.0, False),
]


def calls() -> list[Any]:
    """Every way of every norm with every setting. Quick is one of each way that keeps some elements, of planes not in
    float32, of which it takes many."""
    found = []
    ways = [(function, way) for function in FUNCTIONS for way in ways_of(function)]
    for turn, (function, way) in enumerate(ways):
        few = [s for s in SETTINGS if s[2] < 1 and (function not in PLANES or s[0] != torch.float32)]
        for setting in SETTINGS:
            dtype, activation, p, is_wide = setting
            ids = (function, way.replace(" ", "-"), dtype, activation, p, *(["wide"] if is_wide else []))
            marks = [] if setting == few[5 * turn % len(few)] else pytest.mark.full
            found.append(pytest.param(function, way, *setting, marks=marks, id="-".join(map(short, ids))))
    return found


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("function", "way", "dtype", "activation", "p", "is_wide"), calls())
def test_every_way(
    function: str, way: str, dtype: torch.dtype, activation: str | None, p: float, is_wide: bool
) -> None:
    with running(function, way) as make:
        # Of fewer statistics, what torch's own largest float32 error is would be chance (see `channel_norm_ways`).
        more = {"samples": 10} if function in PLANES and dtype == torch.float32 else {}
        case = make(dtype=dtype, activation=activation, dropout_p=p, drop_seed=17, **more)
        case = with_exact_sums(case) if activation == "relu" else case
        check(wide(case) if is_wide else case)


# --- sizes and layouts ---------------------------------------------------------------------------------------------

IMAGES = [(2, 4, 7, 7), (2, 8, 14, 14), (3, 4, 1, 1), (2, 4, 3, 2, 5), (1, 4, 300), (20, 4, 3), (5, 24)]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("layout", [torch.clone, channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", IMAGES, ids=short)
@pytest.mark.parametrize("function", [*PLANES, "add_batch_norm"])
def test_shapes_of_planes(function: str, shape: tuple[int, ...], layout: Layout) -> None:
    """Planes of 7x7, of which a few are moved as one run; of one element; of more dims; and none."""
    if "instance" in function and shape[2:].count(1) == len(shape) - 2:
        shape = (*shape[:2], 5)  # planes of one element have no statistics
    fields: dict[str, Any] = {"dtype": torch.float16, "activation": "relu", "dropout_p": 0.5, "drop_seed": 5}
    if function == "add_batch_norm":
        case: Any = make_batch_case(function, *shape, **fields)
    else:
        case = make_channel_case(function, *shape, groups=2, **fields)
    check(with_layout(with_exact_sums(case), layout))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("layout", [every_other_column, left_columns, transposed], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("function", ROWS)
def test_layouts_and_dims_of_rows(function: str, dims: int, layout: Layout) -> None:
    case = make_row_case(function, 5, 6, 7, dims=dims, dtype=torch.float64, activation="gelu", dropout_p=0.3)
    for name in ("x", "residual", "dy", "dtotal"):
        check(with_fields(case, **{name: layout(getattr(case, name))}))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("missing", ["weight", "bias", "both"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_weight_and_bias_are_optional(function: str, missing: str) -> None:
    case = small_case(function, dtype=torch.float64, activation="gelu")
    check(with_fields(case, **dict.fromkeys(("weight", "bias") if missing == "both" else (missing,))))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("types", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)], ids=short)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_parameters_of_another_type(function: str, types: tuple[torch.dtype, torch.dtype]) -> None:
    with running(function, ways_of(function)[0]) as make:
        check(make(dtype=types[0], parameters=types[1], activation="silu", dropout_p=0.3))


# --- running statistics, and norms that go by them -----------------------------------------------------------------


@pytest.mark.one_in(2)
@pytest.mark.parametrize("layout", [torch.clone, channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("function", ["add_instance_norm", "add_batch_norm", "add_switch_norm"])
def test_running_statistics_are_those_of_the_total(function: str, p: float, layout: Layout) -> None:
    x, residual = (layout(normal(3, 4, 5, dtype=torch.float64, seed=seed)) for seed in (0, 1))
    mean, var = statistics(4)
    keywords: dict[str, Any] = {"training": True, "momentum": 0.3, "dropout_p": p}
    if function == "add_switch_norm":
        keywords |= {"weight": None, "bias": None, "mean_weight": mean[:3].clone(), "var_weight": var[:3].clone()}
    moved = mean.clone(), var.clone()
    torch.manual_seed(6)
    getattr(fused_ops.functional, function)(x, residual, *moved, **keywords)
    arrays = {name: value.numpy(force=True) for name, value in keywords.items() if isinstance(value, torch.Tensor)}
    keep = (factor(x.shape, p, seed=6) != 0).numpy(force=True)
    given = (tensor.numpy(force=True) for tensor in (x, residual, mean, var))
    *_, expected_mean, expected_var = getattr(reference, function)(*given, **{**keywords, **arrays}, keep=keep)
    for actual, expected in zip(moved, (expected_mean, expected_var), strict=True):
        torch.testing.assert_close(actual.cpu(), torch.as_tensor(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=short)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_a_batch_norm_that_does_not_train_drops_nothing(activation: str | None, dtype: torch.dtype) -> None:
    case = small_case("add_batch_norm", dtype=dtype, activation=activation, training=False)
    assert 0 < case.dropout_p < 1
    actual = case.call(case.leaves())
    expected = with_fields(case, dropout_p=0.0)
    assert all(map(torch.equal, actual, expected.call(case.leaves())))
    check(expected)


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 17, 16)], ids=short)
@pytest.mark.parametrize("layout", [torch.clone, channels_last], ids=["contiguous", "channels_last"])
def test_launchers_drop_by_given_statistics_as_well(
    layout: Layout, shape: tuple[int, ...], activation: str | None
) -> None:
    """No function of ours asks for it, but an op takes a seed without training."""
    seed = torch.tensor([12345], device=DEVICE)
    norm = BatchNorm(layout is channels_last, False, 0.1, 1e-5, True, activation, 0.0, 0.0, 0.4, seed)
    x, residual, dy, dtotal = (layout(normal(*shape, dtype=torch.float64, seed=index)) for index in range(4))
    weight, bias = (normal(shape[1], dtype=torch.float64, seed=index) for index in (4, 5))
    running = statistics(shape[1])
    kept = drop_factor(seed, shape, 0.4, 0.0, torch.float64)
    out = batch_norm_forward(x, residual, weight, bias, norm, *running, save_statistics=True)
    found = batch_norm_backward(
        dy, dtotal, out.total, None, None, weight, bias, out.mean, out.rstd, norm, Wanted(True, True, True, True)
    )
    leaves = [tensor.clone().requires_grad_() for tensor in (x, residual, weight, bias)]
    total = leaves[1] + leaves[0] * kept
    y = fused_ops.functional.batch_norm(total, *running, *leaves[2:], activation=activation)
    torch.testing.assert_close((out.y, out.total), (y, total))
    torch.testing.assert_close(tuple(found), torch.autograd.grad((y, total), leaves, (dy, dtotal)))


# --- switchable norm, whose ways and types are in its own tests ----------------------------------------------------


@pytest.mark.one_in(5)
@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("layout", [torch.clone, channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(5, 6), (3, 4, 5), (2, 5, 4, 3)], ids=short)
def test_switchable_norm_is_the_reference(
    shape: tuple[int, ...], layout: Layout, activation: str | None, p: float
) -> None:
    leaves = tensors(*shape)
    leaves |= {name: layout(leaves[name].detach()).requires_grad_() for name in ("x", "residual")}
    running = statistics(shape[1])
    keywords: dict[str, Any] = {"activation": activation, "dropout_p": p}
    torch.manual_seed(8)
    outputs = call_switch_norm("add_switch_norm", True, running=(running[0].clone(), running[1].clone()), **keywords)(
        **leaves
    )
    arriving = [normal(*shape, dtype=torch.float64, seed=seed) for seed in (20, 21)]
    found = torch.autograd.grad(outputs, list(leaves.values()), arriving)

    arrays = {name: leaf.numpy(force=True) for name, leaf in leaves.items()}
    keep = (factor(shape, p, seed=8) != 0).numpy(force=True)
    arrays |= {"running_mean": running[0].numpy(force=True), "running_var": running[1].numpy(force=True)}
    keywords |= {**arrays, "training": True, "keep": keep}
    expected = as_tuple(reference.add_switch_norm(**keywords))[:2]
    gradients = reference.add_switch_norm_backward(*(d.numpy(force=True) for d in arriving), **keywords)
    # Some hundred operations in float64, on numbers of about 1.
    for actual, want in zip(outputs, expected, strict=True):
        torch.testing.assert_close(actual.detach().cpu(), torch.as_tensor(want), rtol=1e-11, atol=1e-11)
    for name, gradient in zip(leaves, found, strict=True):
        torch.testing.assert_close(
            gradient.cpu(), torch.as_tensor(gradients[f"d{name}"]), rtol=1e-11, atol=1e-11, msg=f"d{name}"
        )
