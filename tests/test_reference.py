"""The NumPy reference against torch in float64, against finite differences, and against exact arithmetic."""

from __future__ import annotations

import warnings
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fused_ops import reference
from tests.reference_cases import (
    EPS,
    HARD_SPANS,
    INF,
    NAN,
    SILU,
    STEP,
    TORCH_ACTIVATIONS,
    Arrays,
    assert_matches_differences,
    assert_within,
    every_activation,
    every_activation_and_none,
    exactly_standardized,
    float64_activation,
    kinks,
    largest,
    torch_activation,
)

pytestmark = pytest.mark.one_in(8)

# ---- activations ----


def test_the_table_holds_the_fourteen_names() -> None:
    assert list(reference.ACTIVATIONS) == list(TORCH_ACTIVATIONS)


@every_activation
def test_activation_matches_torch(activation: Any) -> None:
    dense = np.linspace(-12.0, 12.0, 481)
    special = [-INF, -1e4, -800.0, -40.0, -0.0, 20.0, np.nextafter(20.0, 21.0), 40.0, 800.0, 1e4, INF, NAN]
    beside = [np.nextafter(kink, side) for kink in kinks(activation) for side in (-INF, kink, INF)]
    x = np.concatenate([dense, special, beside])
    # One element a call: torch's vectorized loops treat NaN unlike its scalar ones (see activations.py).
    leaves = [torch.tensor([point], requires_grad=True) for point in torch.from_numpy(x).unbind()]
    values = [torch_activation(activation, leaf) for leaf in leaves]
    slopes = torch.autograd.grad([value.sum() for value in values], leaves)

    # torch has a factor 1 - t^2 or 1 - s to one EPS of 1, times up to 4 |x|; past |x| = 37 it is 0.
    tolerance = 4 * EPS * np.maximum(1.0, np.minimum(np.abs(np.nan_to_num(x)), 37.0))
    assert_within(tolerance, torch.cat(values), reference.activation_value(x, activation))
    if activation.name == "hardsigmoid":
        tolerance = np.full_like(x, np.finfo(np.float32).eps / 6)  # torch's is float32's 1 / 6 even in float64
    assert_within(tolerance, torch.cat(slopes), reference.activation_slope(x, activation))


@every_activation
def test_activation_is_clean_and_finite_far_out(activation: Any) -> None:
    x = np.array([-1e4, -800.0, -89.0, 0.0, 89.0, 800.0, 1e4])
    rule = reference.ACTIVATIONS[activation.name]
    parameters = {**rule.defaults, **activation.parameters}
    with np.errstate(all="raise", under="ignore"):
        value, slope = rule.value(x, **parameters), rule.slope(x, **parameters)
    assert np.isfinite(value).all()
    assert np.isfinite(slope).all()


def test_gelu_keeps_the_digits_of_its_tail() -> None:
    """erfc(t) = exp(-t^2) / (t sqrt(pi)) (1 - 1/(2 t^2) + 3/(4 t^4) - ...), closer than the next term."""
    x = -30.0
    t2 = x * x / 2
    series = 1 - 1 / (2 * t2) + 3 / (4 * t2**2) - 15 / (8 * t2**3)
    expected = -np.exp(-t2) / np.sqrt(2 * np.pi) * series
    next_term = 105 / (16 * t2**4)
    # exp(-450) turns half an EPS of its argument into 450 half EPS of the result, ours and the expected one.
    np.testing.assert_allclose(reference.activation_value(x, "gelu"), expected, rtol=next_term + 900 * EPS)


# ---- norms against finite differences ----

AFFINE = {"bare": (), "weight": ("weight",), "affine": ("weight", "bias")}
CASES = [
    pytest.param(function, affine, residual, id=f"{function}-{affine}{'-residual' * residual}")
    for function in ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
    for affine in AFFINE
    for residual in ((True,) if function.startswith("add_") else (False, True))
    if not (affine == "affine" and "rms" in function)
]


def draw(seed: int, shape: tuple[int, ...], span_dims: int, affine: str, residual: bool) -> Arrays:
    rng = np.random.default_rng(seed)
    arrays = {"x": rng.normal(0.5, 2.0, shape)}
    if residual:
        arrays["residual"] = rng.normal(0.0, 4.0, shape)
    for name in AFFINE[affine]:
        arrays[name] = rng.normal(0.0, 4.0, shape[-span_dims:])
    return arrays


def call(function: str, arrays: Arrays, *gradients: Any, backward: bool = False, **options: Any) -> Any:
    arguments = dict(arrays)
    x = [arguments.pop("x")] + ([arguments.pop("residual")] if function.startswith("add_") else [])
    options = {"normalized_shape": arrays["x"].shape[-1:], **options}
    return getattr(reference, function + "_backward" * backward)(*gradients, *x, **arguments, **options)


def outputs_of(function: str, arrays: Arrays, **options: Any) -> tuple[np.ndarray, ...]:
    outputs = call(function, arrays, **options)
    return outputs if function.startswith("add_") else (outputs,)


def drawn_off_kinks(function: str, affine: str, residual: bool, activation: Any) -> Arrays:
    """The first draw that reaches every piece of the activation, with no kink where a step could cross it."""
    for seed in range(1000):
        arrays = draw(seed, (3, 5), 1, affine, residual)
        z = outputs_of(function, arrays)[0]
        total = arrays["x"] + arrays["residual"] if function.startswith("add_") else arrays["x"]
        spread = total.std(-1) if "layer" in function else np.sqrt((total**2).mean(-1))
        # |dz / dx| <= 2 |weight| / spread, twice that for what a finite step adds; |dz / dweight| <= sqrt(5).
        reach = STEP * max(3.0, 4 * np.abs(arrays.get("weight", 1.0)).max() / spread.min())
        clear = all(np.abs(z - kink).min() > reach for kink in kinks(activation))
        pieces = len(np.unique(np.digitize(z, kinks(activation))))
        scaled = "weight" in arrays or (residual and not function.startswith("add_"))
        if clear and spread.min() > 1.0 and (pieces == len(kinks(activation)) + 1 or not scaled):
            return arrays
    raise AssertionError("no draw is clear of the kinks")


@every_activation_and_none
@pytest.mark.parametrize(("function", "affine", "residual"), CASES)
def test_backward_matches_finite_differences(function: str, affine: str, residual: bool, activation: Any) -> None:
    arrays = drawn_off_kinks(function, affine, residual, activation)
    rng = np.random.default_rng(7)
    gradients = tuple(rng.normal(size=(3, 5)) for _ in range(1 + function.startswith("add_")))
    actual = call(function, arrays, *gradients, backward=True, activation=activation)
    assert_matches_differences(lambda a: outputs_of(function, a, activation=activation), arrays, gradients, actual)


# ---- norms against torch ----


def torch_outputs(function: str, leaves: dict[str, torch.Tensor], shape: Any, eps: Any, activation: Any) -> Any:
    x, residual = leaves["x"], leaves.get("residual")
    added = function.startswith("add_")
    total = x + residual if added and residual is not None else x
    if "rms" in function:
        y = F.rms_norm(total, shape, leaves.get("weight"), eps)
    else:
        y = F.layer_norm(total, shape, leaves.get("weight"), leaves.get("bias"), eps)
    z = y if added or residual is None else y + residual
    y = float64_activation(activation, z)
    return (y, total) if added else (y,)


def assert_matches_torch(function: str, arrays: Arrays, dims: int, activation: Any = None, eps: float = 1e-5) -> None:
    """Outputs and gradients against torch's. The tolerance follows the errors through the formulas.

    Each of the two results takes at most span + rows + 20 roundings one after another. An element of x_hat,
    at most sqrt(span), is as uncertain as x is in units of the row's spread, whence an error of z. Slopes and
    their own slopes are below 2. A term of dx or dweight is a product of dz, weight, x_hat twice, and rstd or
    rows.
    """
    shape = arrays["x"].shape[arrays["x"].ndim - dims :]
    span, rows = prod(shape), prod(arrays["x"].shape[: arrays["x"].ndim - dims])
    leaves = {name: torch.tensor(array, requires_grad=True) for name, array in arrays.items()}
    expected = torch_outputs(function, leaves, shape, eps, activation)
    rng = np.random.default_rng(3)
    d_outputs = [rng.normal(size=arrays["x"].shape) for _ in expected]
    expected_gradients = torch.autograd.grad(expected, list(leaves.values()), list(map(torch.tensor, d_outputs)))
    options = {"normalized_shape": shape, "eps": eps, "activation": activation}
    outputs = outputs_of(function, arrays, **options)
    gradients = call(function, arrays, *d_outputs, backward=True, **options)

    total = expected[-1].detach().numpy() if function.startswith("add_") else arrays["x"]
    rows_of_total = total.reshape(rows, span)[np.isfinite(total.reshape(rows, span)).all(1)]
    spread = rows_of_total.std(1) if "layer" in function else np.sqrt((rows_of_total**2).mean(1))
    rstd, weight = largest(1 / np.sqrt(spread**2 + eps)), largest(arrays.get("weight", 1.0))
    uncertainty = largest(rows_of_total / np.sqrt(spread**2 + eps)[:, None])
    added = largest(arrays.get("residual", 0.0), arrays.get("bias", 0.0))
    z_error = 2 * (span + rows + 20) * EPS * (uncertainty * np.sqrt(span) * weight + added)
    for e, y in zip(expected, outputs, strict=True):
        assert_within(2 * z_error, e, y)
    assert set(gradients) == {f"d{name}" for name in arrays}
    gradient_error = 8 * z_error * largest(*d_outputs) * weight * span * max(rstd, rows)
    for name, e in zip(leaves, expected_gradients, strict=True):
        assert_within(gradient_error, e, gradients[f"d{name}"])


@every_activation_and_none
@pytest.mark.parametrize(("function", "affine", "residual"), CASES)
def test_matches_torch(function: str, affine: str, residual: bool, activation: Any) -> None:
    assert_matches_torch(function, draw(11, (4, 3, 6), 1, affine, residual), 1, activation)


FUNCTIONS = ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"]
every_function = pytest.mark.parametrize("function", FUNCTIONS)


@every_function
@pytest.mark.parametrize(
    ("shape", "dims"),
    [
        ((7,), 1),
        ((3, 1), 1),
        ((2, 3), 2),
        ((2, 3, 4), 2),
        ((2, 1, 3, 2), 3),
        ((2, 2, 2, 2, 3), 4),
        ((1, 2, 3, 2, 2), 5),
    ],
)
def test_matches_torch_in_any_shape(function: str, shape: tuple[int, ...], dims: int) -> None:
    affine = "weight" if "rms" in function else "affine"
    assert_matches_torch(function, draw(5, shape, dims, affine, residual=True), dims, SILU)


@every_function
@pytest.mark.parametrize("kind", HARD_SPANS)
def test_matches_torch_on_a_hard_row(function: str, kind: str) -> None:
    arrays = draw(5, (4, 8), 1, "weight", residual=function.startswith("add_"))
    arrays["x"][1] = HARD_SPANS[kind](arrays["x"][1])
    if "residual" in arrays:
        arrays["residual"][1] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_matches_torch(function, arrays, 1)


def test_large_mean_against_exact_arithmetic() -> None:
    """x_hat is good to the roundings of a mean of span terms, however large the mean."""
    span = 24
    x = 1e8 + 1e-2 * np.random.default_rng(2).normal(size=span)
    expected = exactly_standardized(x)
    atol = (span + 20) * EPS * np.sqrt(span)  # no element of x_hat is above sqrt(span)
    np.testing.assert_allclose(reference.layer_norm(x, span, eps=0.0), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rms_norm_eps_is_torchs(dtype: Any) -> None:
    x = (np.random.default_rng(4).normal(size=(3, 8)) * 1e-4).astype(dtype)
    expected = F.rms_norm(torch.from_numpy(x), (8,)).numpy()
    # torch computes in float32 or float64, some 30 roundings of sum and formula, then rounds once to x's own.
    computed_in = np.float64 if dtype is np.float64 else np.float32
    rtol = 30 * np.finfo(computed_in).eps + np.finfo(dtype).eps / 2
    actual = reference.rms_norm(x, 8)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=np.finfo(dtype).smallest_subnormal)
    np.testing.assert_array_equal(reference.add_rms_norm(x, np.zeros_like(x), 8)[0], actual)
    np.testing.assert_array_equal(actual, reference.rms_norm(x, 8, eps=float(np.finfo(computed_in).eps)))
