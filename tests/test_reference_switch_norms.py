"""The reference's switchable norm against a composition in torch, finite differences and the norms that it mixes."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fused_ops import reference
from tests import reference_cases
from tests.reference_cases import (
    EPS,
    HARD_SPANS,
    INF,
    SILU,
    Arrays,
    as_torch,
    assert_matches_differences,
    assert_norm_matches_torch,
    assert_running_statistics_match,
    assert_within,
    call,
    drawn_off_kinks,
    every_activation_and_none,
    exactly_standardized,
    outputs_of,
    parametrized_cases,
    parametrized_kinds,
    switch_spans,
    torch_switch_norm,
    total_of,
)

pytestmark = pytest.mark.one_in(8)

# Where the batch's statistics come from: x; x, while running statistics follow; or the running statistics.
KINDS = ["switch_norm", "switch_norm tracking", "switch_norm running"]
KINDS += [f"add_{kind}" for kind in KINDS]
every_kind = parametrized_kinds(KINDS)
every_function = pytest.mark.parametrize("function", ["switch_norm", "add_switch_norm"])
SHAPES = [(5, 6), (6, 2), (2, 4, 1), (1, 4, 5), (4, 1, 5), (3, 6, 2), (2, 5, 3, 5), (1, 1, 3, 3), (2, 4, 1, 3, 2)]
every_shape = pytest.mark.parametrize("shape", SHAPES)


def draw(seed: int, shape: tuple[int, ...], affine: str, residual: bool) -> Arrays:
    arrays = reference_cases.draw(seed, shape, affine, residual)
    mixed = 3 if len(shape) > 2 else 2
    rng = np.random.default_rng(seed + 1000)
    return {**arrays, "mean_weight": rng.normal(size=mixed), "var_weight": rng.normal(size=mixed)}


def options_of(kind: str, channels: int) -> dict[str, Any]:
    """What the function takes beside the arrays that have gradients; those win over the None of weight and bias."""
    options: dict[str, Any] = {"weight": None, "bias": None, "training": not kind.endswith("running")}
    if kind.endswith("switch_norm"):
        return {**options, "running_mean": None, "running_var": None}
    rng = np.random.default_rng(8)
    running = {"running_mean": rng.normal(1.0, 2.0, channels), "running_var": rng.uniform(1.0, 9.0, channels)}
    return {**options, **running, "momentum": 0.3}


# ---- against finite differences ----


@pytest.mark.one_in(3)
@every_activation_and_none
# Either parameter alone differs in nothing but what torch judges below, tracking in nothing but its statistics.
@parametrized_cases([kind for kind in KINDS if "tracking" not in kind], affine=("bare", "affine"))
def test_backward_matches_finite_differences(kind: str, affine: str, residual: bool, activation: Any) -> None:
    assert_backward_matches_differences(kind, (2, 2, 4), affine, residual, activation)


@every_kind
@pytest.mark.parametrize("shape", [(4, 3), (1, 3, 2, 2), (3, 2, 1, 2, 2)])
def test_backward_matches_finite_differences_in_any_shape(kind: str, shape: tuple[int, ...]) -> None:
    assert_backward_matches_differences(kind, shape, "affine", True, None)


def assert_backward_matches_differences(
    kind: str, shape: tuple[int, ...], affine: str, residual: bool, activation: Any
) -> None:
    options = options_of(kind, shape[1])
    arrays = drawn_off_kinks(kind, activation, lambda seed: draw(seed, shape, affine, residual), options)
    options["activation"] = activation
    rng = np.random.default_rng(7)
    d_outputs = tuple(rng.normal(size=shape) for _ in range(1 + kind.startswith("add_")))
    gradients = call(kind, arrays, *d_outputs, backward=True, **options)
    assert_matches_differences(lambda changed: outputs_of(kind, changed, **options), arrays, d_outputs, gradients)


# ---- against torch ----


def assert_matches_torch(
    kind: str, arrays: Arrays, options: dict[str, Any], activation: Any = None, eps: float = 1e-5
) -> None:
    options, total = {**options, "eps": eps}, total_of(kind, arrays)
    with np.errstate(invalid="ignore"):
        spans = switch_spans(total, options["training"])
        means = [total.mean(axes, keepdims=True) for axes in spans]
        variances = [total.var(axes, keepdims=True) for axes in spans]
    if not options["training"]:
        axes = (0, *range(2, total.ndim))
        means.append(np.expand_dims(options["running_mean"], axes))
        variances.append(np.expand_dims(options["running_var"], axes))
    powers = np.exp(arrays["var_weight"])
    shares = powers / powers.sum()
    spread = np.sqrt(sum(share * var for share, var in zip(shares, variances, strict=True)) + eps)
    norm, span = torch_switch_norm(**as_torch(options)), max(total[0].size, total[:, 0].size)
    assert_norm_matches_torch(kind, arrays, norm, means, spread, span, activation, options)


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
def test_matches_torch_on_a_hard_instance(kind: str, hard: str) -> None:
    """One channel of one sample is hard to normalize; the others are not."""
    arrays = draw(5, (3, 4, 2, 3), "affine", residual=kind.startswith("add_"))
    instance = arrays["x"][1, 0]
    instance[...] = HARD_SPANS[hard](instance.reshape(-1)).reshape(instance.shape)
    if "residual" in arrays:
        arrays["residual"][1] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_matches_torch(kind, arrays, options_of(kind, 4))


@every_kind
@pytest.mark.parametrize("hard", ["large mean", "constant", "zero"])
def test_matches_torch_where_all_is_hard(kind: str, hard: str) -> None:
    arrays = draw(5, (3, 4, 2, 3), "affine", residual=kind.startswith("add_"))
    arrays["x"] = HARD_SPANS[hard](arrays["x"])
    if "residual" in arrays:
        arrays["residual"][...] = 0.0
    assert_matches_torch(kind, arrays, options_of(kind, 4))


@every_function
@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)])
def test_a_single_value_a_channel_is_normalized_by_running_statistics(function: str, shape: tuple[int, ...]) -> None:
    kind = f"{function} running"
    assert_matches_torch(kind, draw(5, shape, "affine", residual=True), options_of(kind, 3), SILU)


# ---- against the norms that it mixes ----


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (2, 3, 2, 3)])
@pytest.mark.parametrize("running", [False, True])
def test_one_share_alone_is_that_norm(shape: tuple[int, ...], running: bool) -> None:
    """A weight of -Inf has a share of 0. The order of the shares is instance, layer, batch."""
    x, options = draw(5, shape, "bare", residual=False)["x"], {"training": not running, "running_mean": None}
    options |= {"running_mean": np.ones(3), "running_var": np.full(3, 4.0)} if running else {"running_var": None}
    batch = reference.batch_norm(x, **options)
    expected = [reference.group_norm(x, 1), batch[0] if running else batch]
    if len(shape) > 2:
        expected.insert(0, reference.instance_norm(x))
    for share, y in enumerate(expected):
        weight = np.where(np.arange(len(expected)) == share, 0.0, -INF)
        switched = reference.switch_norm(x, weight=None, bias=None, mean_weight=weight, var_weight=weight, **options)
        np.testing.assert_array_equal(switched[0] if running else switched, y)


def test_means_and_variances_have_shares_of_their_own() -> None:
    x, layer, batch = draw(5, (4, 3), "bare", residual=False)["x"], [0.0, -INF], [-INF, 0.0]
    y = reference.switch_norm(x, None, None, None, None, mean_weight=layer, var_weight=batch, training=True)
    expected = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(0) + 1e-5)
    np.testing.assert_allclose(y, expected, rtol=0, atol=40 * EPS * np.abs(expected).max())


@every_kind
def test_a_constant_added_to_the_weights_changes_nothing(kind: str) -> None:
    """Not where the softmax of it would overflow, either."""
    arrays, options = draw(5, (3, 4, 6), "affine", residual=True), options_of(kind, 4)
    moved = {**arrays, **{name: arrays[name].round(2) + 1024.0 for name in ("mean_weight", "var_weight")}}
    arrays |= {name: moved[name] - 1024.0 for name in ("mean_weight", "var_weight")}
    d_outputs = [arrays["residual"]] * (1 + kind.startswith("add_"))
    for actual, expected in zip(outputs_of(kind, moved, **options), outputs_of(kind, arrays, **options), strict=True):
        np.testing.assert_array_equal(actual, expected)
    expected_gradients = call(kind, arrays, *d_outputs, backward=True, **options)
    for name, actual in call(kind, moved, *d_outputs, backward=True, **options).items():
        np.testing.assert_array_equal(actual, expected_gradients[name])


# ---- running statistics ----


@every_function
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
@every_shape
def test_running_statistics_are_those_of_batch_norm(function: str, momentum: float, shape: tuple[int, ...]) -> None:
    kind = f"{function} tracking"
    arrays = draw(5, shape, "bare", residual=kind.startswith("add_"))
    options = {**options_of(kind, shape[1]), "momentum": momentum}
    expected, total = as_torch(options), total_of(kind, arrays)
    F.batch_norm(torch.tensor(total), **expected)
    outputs = call(kind, arrays, **options)
    assert len(outputs) == 3 + kind.startswith("add_")
    assert_running_statistics_match(expected, outputs[-2:], total[:, 0].size, total, options["running_mean"])


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


@every_kind
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2), (2, 3, 0), (0, 3, 0), (0, 3, 2, 2), (2, 3, 0, 2, 1)])
def test_nothing_moves_no_statistics_and_has_no_gradients(kind: str, shape: tuple[int, ...]) -> None:
    """torch's composition has 0 * NaN as gradients of the shares here: a mean of nothing, which nothing is far from."""
    arrays, options = draw(5, shape, "affine", residual=True), options_of(kind, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outputs = call(kind, arrays, activation="silu", **options)
        d_outputs = [arrays["x"]] * (1 + kind.startswith("add_"))
        gradients = call(kind, arrays, *d_outputs, backward=True, activation="silu", **options)
    if options["running_mean"] is not None:
        expected = as_torch(options)
        F.batch_norm(torch.tensor(arrays["x"]), **expected)
        assert_within(0.0, expected["running_mean"], outputs[-2])
        assert_within(0.0, expected["running_var"], outputs[-1])
    for name, array in arrays.items():
        np.testing.assert_array_equal(gradients[f"d{name}"], np.zeros(array.shape), strict=True)


# ---- errors ----


@every_function
@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1)])
def test_a_single_value_a_channel_is_refused_while_training(function: str, shape: tuple[int, ...]) -> None:
    arrays = draw(5, shape, "affine", residual=True)
    with pytest.raises(ValueError, match=f"{function}: Expected more than 1 value per channel when training") as error:
        call(function, arrays, **options_of(function, 3))
    assert str(error.value).endswith(f"has shape {shape}")


@every_function
@pytest.mark.parametrize("argument", ["mean_weight", "var_weight"])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2)])
def test_a_share_too_many_or_too_few_is_refused(function: str, argument: str, shape: tuple[int, ...]) -> None:
    wanted, came = (3, 2) if len(shape) > 2 else (2, 3)
    arrays = {**draw(5, shape, "affine", residual=True), argument: np.ones(came)}
    message = rf"{function}: {argument} must have shape \({wanted},\), but has shape \({came},\)"
    with pytest.raises(ValueError, match=message):
        call(function, arrays, **options_of(function, 3))


# ---- against exact arithmetic ----


def test_large_mean_against_exact_arithmetic() -> None:
    """x_hat is good to the roundings of a mean of span terms, however large the mean: all spans are the same one."""
    span = 24
    x = 1e8 + 1e-2 * np.random.default_rng(2).normal(size=span)
    shares = {"mean_weight": [0.3, -0.4, 1.0], "var_weight": [-0.7, 0.2, 0.5]}
    y = reference.switch_norm(x.reshape(1, 1, 6, 4), None, None, None, None, **shares, training=True, eps=0.0)
    atol = (span + 20) * EPS * np.sqrt(span)  # no element of x_hat is above sqrt(span)
    np.testing.assert_allclose(y.reshape(-1), exactly_standardized(x), rtol=0, atol=atol)
