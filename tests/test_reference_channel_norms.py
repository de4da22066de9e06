"""The reference's group and instance norm against torch in float64, finite differences and exact arithmetic."""

from __future__ import annotations

import warnings
from fractions import Fraction
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
    SILU,
    STEP,
    Arrays,
    assert_matches_differences,
    assert_within,
    every_activation_and_none,
    exactly_standardized,
    float64_activation,
    kinks,
    largest,
)

AFFINE = {"bare": (), "weight": ("weight",), "bias": ("bias",), "affine": ("weight", "bias")}
# What normalizes: x's own statistics; those, while running statistics follow; or the running statistics.
KINDS = ["group_norm", "instance_norm", "instance_norm tracking", "instance_norm running"]
KINDS += [f"add_{kind}" for kind in KINDS]
CASES = [
    pytest.param(kind, affine, residual, id=f"{kind}-{affine}{'-residual' * residual}".replace(" ", "-"))
    for kind in KINDS
    for affine in AFFINE
    for residual in ((True,) if kind.startswith("add_") else (False, True))
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.replace(" ", "-"))
every_case = pytest.mark.parametrize(("kind", "affine", "residual"), CASES)


def draw(seed: int, shape: tuple[int, ...], affine: str, residual: bool) -> Arrays:
    rng = np.random.default_rng(seed)
    arrays = {"x": rng.normal(0.5, 2.0, shape)}
    if residual:
        arrays["residual"] = rng.normal(0.0, 4.0, shape)
    for name in AFFINE[affine]:
        arrays[name] = rng.normal(0.0, 4.0, shape[1:2])
    return arrays


def options_of(kind: str, channels: int, num_groups: int | None = None) -> dict[str, Any]:
    """What the function takes beside the arrays that have gradients."""
    if "group" in kind:
        return {"num_groups": num_groups}
    if kind.endswith("instance_norm"):
        return {}
    rng = np.random.default_rng(8)
    running = {"running_mean": rng.normal(1.0, 2.0, channels), "running_var": rng.uniform(1.0, 9.0, channels)}
    return {**running, "use_input_stats": kind.endswith("tracking"), "momentum": 0.3}


def call(kind: str, arrays: Arrays, *gradients: Any, backward: bool = False, **options: Any) -> Any:
    arguments = dict(arrays)
    x = [arguments.pop("x")] + ([arguments.pop("residual")] if kind.startswith("add_") else [])
    return getattr(reference, kind.split()[0] + "_backward" * backward)(*gradients, *x, **arguments, **options)


def outputs_of(kind: str, arrays: Arrays, **options: Any) -> tuple[np.ndarray, ...]:
    """(y,) or (y, total)."""
    outputs = call(kind, arrays, **options)
    return outputs[: 1 + kind.startswith("add_")] if isinstance(outputs, tuple) else (outputs,)


def moments(total: np.ndarray, options: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of what normalizes each element of total, as they broadcast to it."""
    if not options.get("use_input_stats", True):
        per_channel = (-1,) + (1,) * (total.ndim - 2)
        return options["running_mean"].reshape(per_channel), np.sqrt(options["running_var"]).reshape(per_channel)
    spans = total.reshape(len(total), options.get("num_groups", total.shape[1]), -1)
    with np.errstate(invalid="ignore"):
        each = spans.mean(-1, keepdims=True), spans.std(-1, keepdims=True)
    mean, spread = (np.broadcast_to(moment, spans.shape).reshape(total.shape) for moment in each)
    return mean, spread


def total_of(kind: str, arrays: Arrays) -> np.ndarray:
    return arrays["x"] + arrays["residual"] if kind.startswith("add_") else arrays["x"]


# ---- against finite differences ----


def drawn_off_kinks(kind: str, affine: str, residual: bool, activation: Any, options: dict[str, Any]) -> Arrays:
    """The first draw that reaches every piece of the activation, with no kink where a step could cross it."""
    shape = (2, 4, 3) if "group" in kind else (2, 2, 4)
    for seed in range(1000):
        arrays = draw(seed, shape, affine, residual)
        z = outputs_of(kind, arrays, **options)[0]
        mean, spread = moments(total_of(kind, arrays), options)
        x_hat = (total_of(kind, arrays) - mean) / spread
        # |dz / dx| <= 2 |weight| / spread, |dz / dweight| = |x_hat|; what a finite step adds is less than that again.
        slope = max(1.0, np.abs(x_hat).max(), 2 * np.abs(arrays.get("weight", 1.0)).max() / spread.min())
        clear = all(np.abs(z - kink).min() > 2 * slope * STEP for kink in kinks(activation))
        pieces = len(np.unique(np.digitize(z, kinks(activation))))
        scaled = "weight" in arrays or "bias" in arrays or (residual and not kind.startswith("add_"))
        if clear and spread.min() > 1.0 and (pieces == len(kinks(activation)) + 1 or not scaled):
            return arrays
    raise AssertionError("no draw is clear of the kinks")


@every_activation_and_none
@pytest.mark.parametrize(
    ("kind", "affine", "residual"),
    # Either parameter alone differs in nothing but what torch judges below, tracking in nothing but its statistics.
    [case for case in CASES if case.values[1] in ("bare", "affine") and "tracking" not in case.values[0]],
)
def test_backward_matches_finite_differences(kind: str, affine: str, residual: bool, activation: Any) -> None:
    options = options_of(kind, 2, num_groups=2)
    arrays = drawn_off_kinks(kind, affine, residual, activation, options)
    options["activation"] = activation
    rng = np.random.default_rng(7)
    d_outputs = tuple(rng.normal(size=arrays["x"].shape) for _ in range(1 + kind.startswith("add_")))
    gradients = call(kind, arrays, *d_outputs, backward=True, **options)
    assert_matches_differences(lambda changed: outputs_of(kind, changed, **options), arrays, d_outputs, gradients)


# ---- against torch ----


def torch_outputs(kind: str, leaves: dict[str, torch.Tensor], options: dict[str, Any], activation: Any) -> Any:
    """The outputs of torch's composition, and the running statistics that it leaves behind."""
    x, residual = leaves["x"], leaves.get("residual")
    added = kind.startswith("add_")
    total = x + residual if added and residual is not None else x
    own = {name: torch.tensor(value) if isinstance(value, np.ndarray) else value for name, value in options.items()}
    weight, bias = leaves.get("weight"), leaves.get("bias")
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # without one torch's group_norm fails in backward: no device
    y = (F.group_norm if "group" in kind else F.instance_norm)(total, weight=weight, bias=bias, **own)
    y = float64_activation(activation, y if added or residual is None else y + residual)
    return ((y, total) if added else (y,)), [own[name] for name in ("running_mean", "running_var") if name in own]


def assert_matches_torch(
    kind: str, arrays: Arrays, options: dict[str, Any], activation: Any = None, eps: float = 1e-5
) -> None:
    """Outputs and gradients against torch's. The tolerance follows the errors through the formulas.

    Each of the two results takes at most span + terms + 20 roundings one after another, terms being those of
    dweight. An element of x_hat is as uncertain as x and its mean are in units of the spread, whence an error of z.
    Slopes and their own slopes are below 2. A term of dx or dweight is a product of dz, weight, x_hat twice, and
    rstd or terms.
    """
    x = arrays["x"]
    options = {**options, "eps": eps}
    leaves = {name: torch.tensor(array, requires_grad=True) for name, array in arrays.items()}
    expected, _ = torch_outputs(kind, leaves, options, activation)
    rng = np.random.default_rng(3)
    d_outputs = [rng.normal(size=x.shape) for _ in expected]
    expected_gradients = torch.autograd.grad(expected, list(leaves.values()), list(map(torch.tensor, d_outputs)))
    outputs = outputs_of(kind, arrays, activation=activation, **options)
    gradients = call(kind, arrays, *d_outputs, backward=True, activation=activation, **options)

    terms = len(x) * prod(x.shape[2:])
    span = prod(x.shape[1:]) // options.get("num_groups", x.shape[1])
    total = expected[-1].detach().numpy() if kind.startswith("add_") else x
    mean, spread = moments(total, options)
    with np.errstate(invalid="ignore"):
        rstd = 1 / np.sqrt(spread**2 + eps)
        x_hat = largest(np.sqrt(span), (total - mean) * rstd)
        uncertainty = largest(total * rstd, mean * rstd)
    weight = largest(arrays.get("weight", 1.0))
    added = largest(arrays.get("residual", 0.0), arrays.get("bias", 0.0))
    z_error = 2 * (span + terms + 20) * EPS * (uncertainty * x_hat * weight + added)
    for e, y in zip(expected, outputs, strict=True):
        assert_within(2 * z_error, e, y)
    assert set(gradients) == {f"d{name}" for name in arrays}
    gradient_error = 8 * z_error * largest(*d_outputs) * weight * x_hat**2 * max(largest(rstd), terms)
    for name, e in zip(leaves, expected_gradients, strict=True):
        assert_within(gradient_error, e, gradients[f"d{name}"])


@every_activation_and_none
@every_case
def test_matches_torch(kind: str, affine: str, residual: bool, activation: Any) -> None:
    arrays = draw(11, (3, 4, 6), affine, residual)
    assert_matches_torch(kind, arrays, options_of(kind, 4, num_groups=2), activation)


SHAPES = [
    (5, 6),
    (2, 30),
    (1, 4, 5),
    (3, 6, 2),
    (2, 30, 7),
    (2, 6, 3, 5),
    (1, 1, 3, 3),
    (2, 4, 1, 3, 2),
    (1, 3, 2, 2, 3),
]


GROUPINGS = [(shape, groups) for shape in SHAPES for groups in range(1, shape[1] + 1) if shape[1] % groups == 0]


@pytest.mark.parametrize("function", ["group_norm", "add_group_norm"])
@pytest.mark.parametrize(("shape", "num_groups"), GROUPINGS)
def test_group_norm_matches_torch_in_any_shape(function: str, shape: tuple[int, ...], num_groups: int) -> None:
    arrays = draw(5, shape, "affine", residual=True)
    assert_matches_torch(function, arrays, {"num_groups": num_groups}, SILU)


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if "instance" in kind], ids=lambda kind: kind.replace(" ", "-")
)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) > 2])
def test_instance_norm_matches_torch_in_any_shape(kind: str, shape: tuple[int, ...]) -> None:
    arrays = draw(5, shape, "affine", residual=True)
    assert_matches_torch(kind, arrays, options_of(kind, shape[1]), SILU)


@every_kind
@pytest.mark.parametrize("hard", HARD_SPANS)
def test_matches_torch_on_a_hard_span(kind: str, hard: str) -> None:
    """One sample's first group, or its first channel, is hard to normalize; the other spans are not."""
    arrays = draw(5, (3, 4, 2, 3), "affine", residual=kind.startswith("add_"))
    channels = 2 if "group" in kind else 1
    span = arrays["x"][1, :channels]
    span[...] = HARD_SPANS[hard](span.reshape(-1)).reshape(span.shape)
    if "residual" in arrays:
        arrays["residual"][1] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_matches_torch(kind, arrays, options_of(kind, 4, num_groups=2))


@pytest.mark.parametrize("function", ["instance_norm", "add_instance_norm"])
def test_one_position_is_normalized_by_running_statistics(function: str) -> None:
    kind = f"{function} running"
    arrays = draw(5, (2, 3, 1), "affine", residual=True)
    assert_matches_torch(kind, arrays, options_of(kind, 3), SILU)


# ---- running statistics ----


@pytest.mark.parametrize("function", ["instance_norm", "add_instance_norm"])
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) > 2])
def test_running_statistics_match_torch(function: str, momentum: float, shape: tuple[int, ...]) -> None:
    kind = f"{function} tracking"
    arrays = draw(5, shape, "bare", residual=kind.startswith("add_"))
    options = {**options_of(kind, shape[1]), "momentum": momentum}
    _, expected = torch_outputs(kind, {name: torch.tensor(array) for name, array in arrays.items()}, options, None)
    outputs = call(kind, arrays, **options)
    assert len(outputs) == 3 + kind.startswith("add_")
    # A sum over positions, one over samples, and some 10 more; every term of a variance is below 4 x^2.
    error = (prod(shape[2:]) + shape[0] + 10) * EPS
    size = largest(total_of(kind, arrays), options["running_mean"])
    for magnitude, e, statistic in zip((size, largest(4 * size**2)), expected, outputs[-2:], strict=True):
        assert_within(2 * error * magnitude, e, statistic)


def test_running_statistics_against_exact_arithmetic() -> None:
    """The variance is good to the roundings of a sum, however large the mean."""
    positions = 12
    x = 1e8 + 1e-2 * np.random.default_rng(2).normal(size=(2, 1, positions))
    exact = [[Fraction(value) for value in sample] for sample in x[:, 0]]
    means = [sum(sample) / positions for sample in exact]
    variances = [sum((v - m) ** 2 for v in sample) / (positions - 1) for sample, m in zip(exact, means, strict=True)]
    _, mean, var = reference.instance_norm(x, [0.0], [0.0], momentum=1.0)
    rtol = (positions + 20) * EPS
    np.testing.assert_allclose(mean, float(sum(means) / 2), rtol=rtol)
    np.testing.assert_allclose(var, float(sum(variances) / 2), rtol=rtol)


@pytest.mark.parametrize("function", ["instance_norm", "add_instance_norm"])
def test_running_statistics_stay_without_input_statistics(function: str) -> None:
    kind = f"{function} running"
    arrays, options = draw(5, (2, 3, 4), "bare", residual=kind.startswith("add_")), options_of(kind, 3)
    for name, statistic in zip(("running_mean", "running_var"), call(kind, arrays, **options)[-2:], strict=True):
        np.testing.assert_array_equal(statistic, options[name], strict=True)
        assert not np.shares_memory(statistic, options[name])


@pytest.mark.parametrize("function", ["instance_norm", "add_instance_norm"])
def test_tracking_changes_neither_outputs_nor_gradients_nor_arguments(function: str) -> None:
    kind = f"{function} tracking"
    arrays, options = draw(5, (2, 3, 4), "affine", residual=True), options_of(kind, 3)
    given = {name: np.copy(value) for name, value in options.items()}
    d_outputs = [arrays["residual"]] * (1 + kind.startswith("add_"))
    tracked = call(kind, arrays, *d_outputs, backward=True, **options)
    for actual, expected in zip(outputs_of(kind, arrays, **options), outputs_of(function, arrays), strict=True):
        np.testing.assert_array_equal(actual, expected)
    for name, expected in call(function, arrays, *d_outputs, backward=True).items():
        np.testing.assert_array_equal(tracked.pop(name), expected)
    assert not tracked
    for name, value in options.items():
        np.testing.assert_array_equal(value, given[name])


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (0, 3, 0), (2, 0, 4)])
def test_running_statistics_of_nothing_are_torchs(shape: tuple[int, ...]) -> None:
    options = options_of("instance_norm tracking", shape[1])
    _, expected = torch_outputs("instance_norm tracking", {"x": torch.zeros(shape).double()}, options, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, *statistics = reference.instance_norm(np.zeros(shape), **options)
    for e, statistic in zip(expected, statistics, strict=True):
        assert_within(0.0, e, statistic)


# ---- against exact arithmetic ----


@pytest.mark.parametrize("function", ["group_norm", "instance_norm"])
def test_large_mean_against_exact_arithmetic(function: str) -> None:
    """x_hat is good to the roundings of a mean of span terms, however large the mean."""
    span = 24
    spans = 1e8 + 1e-2 * np.random.default_rng(2).normal(size=(2, 3, span))
    expected = np.array([[exactly_standardized(each) for each in sample] for sample in spans])
    if function == "group_norm":
        actual = reference.group_norm(spans.reshape(2, 6, 3, 4), 3, eps=0.0).reshape(spans.shape)
    else:
        actual = reference.instance_norm(spans.reshape(2, 3, 6, 4), eps=0.0).reshape(spans.shape)
    atol = (span + 20) * EPS * np.sqrt(span)  # no element of x_hat is above sqrt(span)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)
