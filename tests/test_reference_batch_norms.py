"""The reference's batch norm against torch in float64, finite differences and exact arithmetic."""

from __future__ import annotations

import warnings
from collections.abc import Callable
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
    Arrays,
    as_torch,
    assert_matches_differences,
    assert_norm_matches_torch,
    assert_running_statistics_match,
    assert_within,
    call,
    draw,
    drawn_off_kinks,
    every_activation_and_none,
    exactly_standardized,
    outputs_of,
    parametrized_cases,
    parametrized_kinds,
    torch_outputs,
    total_of,
)

pytestmark = pytest.mark.one_in(8)

# What normalizes: the batch's own statistics; those, while running statistics follow; or the running statistics.
KINDS = ["batch_norm", "batch_norm tracking", "batch_norm running"]
KINDS += [f"add_{kind}" for kind in KINDS]
every_kind = parametrized_kinds(KINDS)
every_function = pytest.mark.parametrize("function", ["batch_norm", "add_batch_norm"])
SHAPES = [(5, 6), (30, 1), (2, 4, 1), (1, 4, 5), (3, 6, 2), (2, 5, 3, 5), (1, 1, 3, 3), (2, 4, 1, 3, 2)]
every_shape = pytest.mark.parametrize("shape", SHAPES)


def options_of(kind: str, channels: int) -> dict[str, Any]:
    """What the function takes beside the arrays that have gradients."""
    if kind.endswith("batch_norm"):
        return {"running_mean": None, "running_var": None, "training": True}
    rng = np.random.default_rng(8)
    running = {"running_mean": rng.normal(1.0, 2.0, channels), "running_var": rng.uniform(1.0, 9.0, channels)}
    return {**running, "training": kind.endswith("tracking"), "momentum": 0.3}


def moments(total: np.ndarray, options: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of what normalizes each element of total, as they broadcast to it."""
    axes = (0, *range(2, total.ndim))
    if not options["training"]:
        mean, var = (np.expand_dims(options[f"running_{name}"], axes) for name in ("mean", "var"))
        return mean, var
    with np.errstate(invalid="ignore"):
        return total.mean(axes, keepdims=True), total.var(axes, keepdims=True)


# ---- against finite differences ----


@every_activation_and_none
# Either parameter alone differs in nothing but what torch judges below, tracking in nothing but its statistics.
@parametrized_cases([kind for kind in KINDS if "tracking" not in kind], affine=("bare", "affine"))
def test_backward_matches_finite_differences(kind: str, affine: str, residual: bool, activation: Any) -> None:
    options = options_of(kind, 3)
    arrays = drawn_off_kinks(kind, activation, lambda seed: draw(seed, (2, 3, 3), affine, residual), options)
    options["activation"] = activation
    rng = np.random.default_rng(7)
    d_outputs = tuple(rng.normal(size=arrays["x"].shape) for _ in range(1 + kind.startswith("add_")))
    gradients = call(kind, arrays, *d_outputs, backward=True, **options)
    assert_matches_differences(lambda changed: outputs_of(kind, changed, **options), arrays, d_outputs, gradients)


# ---- against torch ----


def torch_norm(options: dict[str, Any]) -> Callable[..., torch.Tensor]:
    return lambda total, weight=None, bias=None: F.batch_norm(total, weight=weight, bias=bias, **options)


def assert_matches_torch(
    kind: str, arrays: Arrays, options: dict[str, Any], activation: Any = None, eps: float = 1e-5
) -> None:
    options = {**options, "eps": eps}
    mean, var = moments(total_of(kind, arrays), options)
    spread, span = np.sqrt(var + eps), arrays["x"].size // arrays["x"].shape[1]
    norm = torch_norm(as_torch(options))
    assert_norm_matches_torch(kind, arrays, norm, [mean], spread, span, activation, options)


@every_activation_and_none
@parametrized_cases(KINDS)
def test_matches_torch(kind: str, affine: str, residual: bool, activation: Any) -> None:
    assert_matches_torch(kind, draw(11, (3, 4, 6), affine, residual), options_of(kind, 4), activation)


@every_kind
@every_shape
def test_matches_torch_in_any_shape(kind: str, shape: tuple[int, ...]) -> None:
    assert_matches_torch(kind, draw(5, shape, "affine", residual=True), options_of(kind, shape[1]), SILU, eps=0.1)


@every_kind
@pytest.mark.parametrize("hard", HARD_SPANS)
def test_matches_torch_on_a_hard_channel(kind: str, hard: str) -> None:
    """One channel is hard to normalize; the others are not."""
    arrays = draw(5, (3, 4, 2, 3), "affine", residual=kind.startswith("add_"))
    channel = arrays["x"][:, 1]
    channel[...] = HARD_SPANS[hard](channel.reshape(-1)).reshape(channel.shape)
    if "residual" in arrays:
        arrays["residual"][:, 1] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_matches_torch(kind, arrays, options_of(kind, 4))


@every_function
@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)])
def test_a_single_value_is_normalized_by_running_statistics(function: str, shape: tuple[int, ...]) -> None:
    kind = f"{function} running"
    assert_matches_torch(kind, draw(5, shape, "affine", residual=True), options_of(kind, 3), SILU)


# ---- running statistics ----


@every_function
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
@every_shape
def test_running_statistics_match_torch(function: str, momentum: float, shape: tuple[int, ...]) -> None:
    kind = f"{function} tracking"
    arrays = draw(5, shape, "bare", residual=kind.startswith("add_"))
    options = {**options_of(kind, shape[1]), "momentum": momentum}
    expected = as_torch(options)
    torch_outputs(kind, torch_norm(expected), as_torch(arrays))
    outputs = call(kind, arrays, **options)
    assert len(outputs) == 3 + kind.startswith("add_")
    count = shape[0] * prod(shape[2:])
    assert_running_statistics_match(expected, outputs[-2:], count, total_of(kind, arrays), options["running_mean"])


def test_running_statistics_against_exact_arithmetic() -> None:
    """The variance is good to the roundings of a sum, however large the mean."""
    x = 1e8 + 1e-2 * np.random.default_rng(2).normal(size=(3, 1, 4))
    exact = [Fraction(value) for value in x.reshape(-1)]
    exact_mean = sum(exact) / len(exact)
    exact_var = sum((value - exact_mean) ** 2 for value in exact) / (len(exact) - 1)
    _, mean, var = reference.batch_norm(x, [0.0], [0.0], training=True, momentum=1.0)
    rtol = (len(exact) + 20) * EPS
    np.testing.assert_allclose(mean, float(exact_mean), rtol=rtol)
    np.testing.assert_allclose(var, float(exact_var), rtol=rtol)


@every_function
def test_running_statistics_stay_without_training(function: str) -> None:
    kind = f"{function} running"
    arrays, options = draw(5, (2, 3, 4), "bare", residual=kind.startswith("add_")), options_of(kind, 3)
    for name, statistic in zip(("running_mean", "running_var"), call(kind, arrays, **options)[-2:], strict=True):
        np.testing.assert_array_equal(statistic, options[name], strict=True)
        assert not np.shares_memory(statistic, options[name])


@every_function
def test_tracking_changes_neither_outputs_nor_gradients_nor_arguments(function: str) -> None:
    kind = f"{function} tracking"
    arrays, options = draw(5, (2, 3, 4), "affine", residual=True), options_of(kind, 3)
    given, untracked = {name: np.copy(value) for name, value in options.items()}, options_of(function, 3)
    d_outputs = [arrays["residual"]] * (1 + kind.startswith("add_"))
    tracked = call(kind, arrays, *d_outputs, backward=True, **options)
    pairs = zip(outputs_of(kind, arrays, **options), outputs_of(function, arrays, **untracked), strict=True)
    for actual, expected in pairs:
        np.testing.assert_array_equal(actual, expected)
    for name, expected in call(function, arrays, *d_outputs, backward=True, **untracked).items():
        np.testing.assert_array_equal(tracked.pop(name), expected)
    assert not tracked
    for name, value in options.items():
        np.testing.assert_array_equal(value, given[name])


# ---- nothing at all ----


@every_kind
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2), (2, 3, 0), (0, 3, 0), (0, 3, 2, 2), (2, 3, 0, 2, 1)])
def test_nothing_is_torchs(kind: str, shape: tuple[int, ...]) -> None:
    """Outputs and gradients of a batch without elements, and the running statistics that it leaves as they were."""
    arrays = draw(5, shape, "affine", residual=True)
    leaves = {name: torch.tensor(array, requires_grad=True) for name, array in arrays.items()}
    options = options_of(kind, 3)
    torch_options = as_torch(options)
    expected = torch_outputs(kind, torch_norm(torch_options), leaves, SILU)
    expected_gradients = torch.autograd.grad([each.sum() for each in expected], list(leaves.values()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outputs = call(kind, arrays, activation="silu", **options)
        d_outputs = [arrays["x"]] * len(expected)
        gradients = call(kind, arrays, *d_outputs, backward=True, activation="silu", **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if options["running_mean"] is not None:
        expected += (torch_options["running_mean"], torch_options["running_var"])
    for e, actual in zip(expected, outputs, strict=True):
        assert_within(0.0, e, actual)
    for name, e in zip(leaves, expected_gradients, strict=True):
        assert_within(0.0, e, gradients[f"d{name}"])


# ---- errors ----


@every_function
@pytest.mark.parametrize(
    ("training", "eps", "wanted"), [(True, 0.0, "positive"), (True, -1e-5, "positive"), (False, -1e-5, "0 or positive")]
)
def test_eps_is_refused_where_torch_refuses_it(function: str, training: bool, eps: float, wanted: str) -> None:
    options = {"running_mean": np.zeros(3), "running_var": np.ones(3), "training": training, "eps": eps}
    arrays = draw(5, (2, 3), "bare", residual=function.startswith("add_"))
    message = f"{function}: eps must be {wanted} where training is {training}, but is {eps}$"
    for backward in (False, True):
        gradients = [arrays["x"]] * (1 + function.startswith("add_")) * backward
        with pytest.raises(ValueError, match=message):
            call(function, arrays, *gradients, backward=backward, **options)


def test_no_eps_is_torchs_without_training() -> None:
    kind = "batch_norm running"
    assert_matches_torch(kind, draw(5, (2, 3), "affine", residual=False), options_of(kind, 3), eps=0.0)


# ---- against exact arithmetic ----


def test_large_mean_against_exact_arithmetic() -> None:
    """x_hat is good to the roundings of a mean of span terms, however large the mean."""
    span = 24
    channels = 1e8 + 1e-2 * np.random.default_rng(2).normal(size=(3, span))
    expected = np.array([exactly_standardized(each) for each in channels])
    x = channels.reshape(3, 4, 6).swapaxes(0, 1)
    # torch refuses an eps of 0 while training; this one is lost beside any variance.
    y = reference.batch_norm(x, None, None, training=True, eps=1e-300)
    atol = (span + 20) * EPS * np.sqrt(span)  # no element of x_hat is above sqrt(span)
    np.testing.assert_allclose(y.swapaxes(0, 1).reshape(3, span), expected, rtol=0, atol=atol)
