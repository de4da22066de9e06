"""The reference's group and instance norm against torch in float64, finite differences and exact arithmetic."""

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

# What normalizes: x's own statistics; those, while running statistics follow; or the running statistics.
KINDS = ["group_norm", "instance_norm", "instance_norm tracking", "instance_norm running"]
KINDS += [f"add_{kind}" for kind in KINDS]
every_kind = parametrized_kinds(KINDS)
every_case = parametrized_cases(KINDS)


def options_of(kind: str, channels: int, num_groups: int | None = None) -> dict[str, Any]:
    """What the function takes beside the arrays that have gradients."""
    if "group" in kind:
        return {"num_groups": num_groups}
    if kind.endswith("instance_norm"):
        return {}
    rng = np.random.default_rng(8)
    running = {"running_mean": rng.normal(1.0, 2.0, channels), "running_var": rng.uniform(1.0, 9.0, channels)}
    return {**running, "use_input_stats": kind.endswith("tracking"), "momentum": 0.3}


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


# ---- against finite differences ----


@every_activation_and_none
# Either parameter alone differs in nothing but what torch judges below, tracking in nothing but its statistics.
@parametrized_cases([kind for kind in KINDS if "tracking" not in kind], affine=("bare", "affine"))
def test_backward_matches_finite_differences(kind: str, affine: str, residual: bool, activation: Any) -> None:
    options = options_of(kind, 2, num_groups=2)
    shape = (2, 4, 3) if "group" in kind else (2, 2, 4)
    arrays = drawn_off_kinks(kind, activation, lambda seed: draw(seed, shape, affine, residual), options)
    options["activation"] = activation
    rng = np.random.default_rng(7)
    d_outputs = tuple(rng.normal(size=arrays["x"].shape) for _ in range(1 + kind.startswith("add_")))
    gradients = call(kind, arrays, *d_outputs, backward=True, **options)
    assert_matches_differences(lambda changed: outputs_of(kind, changed, **options), arrays, d_outputs, gradients)


# ---- against torch ----


def torch_norm(kind: str, options: dict[str, Any]) -> Callable[..., torch.Tensor]:
    def norm(total: torch.Tensor, weight: Any = None, bias: Any = None) -> torch.Tensor:
        if weight is None and bias is not None:
            weight = torch.ones_like(bias)  # without one torch's group_norm fails in backward: no device
        return (F.group_norm if "group" in kind else F.instance_norm)(total, weight=weight, bias=bias, **options)

    return norm


def assert_matches_torch(
    kind: str, arrays: Arrays, options: dict[str, Any], activation: Any = None, eps: float = 1e-5
) -> None:
    options = {**options, "eps": eps}
    norm = torch_norm(kind, as_torch(options))
    mean, std = moments(total_of(kind, arrays), options)
    span = prod(arrays["x"].shape[1:]) // options.get("num_groups", arrays["x"].shape[1])
    assert_norm_matches_torch(kind, arrays, norm, [mean], np.sqrt(std**2 + eps), span, activation, options)


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
    expected = as_torch(options)
    torch_outputs(kind, torch_norm(kind, expected), as_torch(arrays))
    outputs = call(kind, arrays, **options)
    assert len(outputs) == 3 + kind.startswith("add_")
    count = prod(shape[2:]) + shape[0]  # a sum over positions, and one over samples
    assert_running_statistics_match(expected, outputs[-2:], count, total_of(kind, arrays), options["running_mean"])


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
    expected = as_torch(options)
    F.instance_norm(torch.zeros(shape).double(), **expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, *statistics = reference.instance_norm(np.zeros(shape), **options)
    assert_within(0.0, expected["running_mean"], statistics[0])
    assert_within(0.0, expected["running_var"], statistics[1])


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
