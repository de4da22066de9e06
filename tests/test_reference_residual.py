"""The reference's residual_add, and the dropout of its add_ norms, against torch in float64 and finite differences."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fused_ops import reference
from tests.reference_cases import (
    EPS,
    INF,
    NAN,
    SILU,
    Arrays,
    assert_matches_differences,
    assert_norm_matches_torch,
    assert_within,
    call,
    drawn_mask,
    drawn_off_kinks,
    every_activation_and_none,
    float64_activation,
    largest,
    outputs_of,
    switch_spans,
    torch_dropout,
    torch_switch_norm,
)

ADD = "residual_add"


def normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.5, 2.0, shape)


def masks(shape: tuple[int, ...], rates: dict[str, float]) -> dict[str, np.ndarray]:
    """The mask of each of `rates`: seed 1 draws that of elements, seed 2 that of samples."""
    drawn = {}
    if "dropout_p" in rates:
        drawn["keep"] = drawn_mask(1, shape, rates["dropout_p"])
    if "drop_path_p" in rates:
        drawn["keep_path"] = drawn_mask(2, shape[:1], rates["drop_path_p"])
    return drawn


# ---- residual_add ----

SHAPE = (5, 3, 2)
RATES = [{}, {"dropout_p": 0.3}, {"drop_path_p": 0.4}, {"dropout_p": 0.3, "drop_path_p": 0.4}]
SCALES: list[tuple[int, ...] | None] = [None, (2,), (3, 1), (3, 2), SHAPE, (5, 1, 1), (1, 3, 1), (1,), ()]
every_rates = pytest.mark.parametrize("rates", RATES, ids=lambda rates: "-".join(rates) or "kept")
every_function = pytest.mark.parametrize("function", [reference.residual_add, reference.residual_add_backward])


def draw(seed: int, shape: tuple[int, ...], scale: tuple[int, ...] | None) -> Arrays:
    arrays = {"x": normal(seed, shape), "residual": normal(seed + 1000, shape)}
    return arrays if scale is None else {**arrays, "scale": normal(seed + 2000, scale)}


def test_masks_both_keep_and_drop() -> None:
    of_norms = (dropping("add_layer_norm", dropout_p)["keep"] for dropout_p in (0.1, 0.4, 0.5))
    for mask in (*masks(SHAPE, RATES[-1]).values(), *of_norms):
        assert 0 < mask.sum() < mask.size


def torch_residual_add(leaves: dict[str, torch.Tensor], activation: Any, rates: dict[str, float]) -> torch.Tensor:
    x, residual = leaves["x"], leaves["residual"]
    branch = torch_dropout(1, x, rates["dropout_p"]) if "dropout_p" in rates else x
    branch = branch * leaves["scale"] if "scale" in leaves else branch
    if "drop_path_p" in rates:
        samples = torch_dropout(2, torch.ones(len(x), dtype=torch.float64), rates["drop_path_p"])
        branch = branch * samples.reshape(-1, *[1] * (x.ndim - 1))
    return float64_activation(activation, residual + branch)


def assert_matches_torch(arrays: Arrays, activation: Any, rates: dict[str, float]) -> None:
    """Value and gradients against torch's. The tolerance follows the errors through the formulas.

    z is known to some 10 roundings of what is added; slopes and their own slopes are below 2. A term of dx or dscale is
    a product of dz and the factors of x, or of scale, and dscale is a sum of as many terms as x has elements at most.
    """
    leaves = {name: torch.tensor(array, requires_grad=True) for name, array in arrays.items()}
    expected = torch_residual_add(leaves, activation, rates)
    dy = normal(3, arrays["x"].shape)
    expected_gradients = torch.autograd.grad(expected, list(leaves.values()), torch.tensor(dy))
    options = {"activation": activation, **rates, **masks(arrays["x"].shape, rates)}
    gradients = call(ADD, arrays, dy, backward=True, **options)

    factor = np.prod([1.0 / (1.0 - rate) for rate in rates.values() if rate < 1.0])
    largest_product = factor * largest(arrays["x"]) * largest(arrays.get("scale", 1.0))
    error = 20 * EPS * (largest_product + largest(arrays["residual"]))
    assert_within(2 * error, expected, reference.residual_add(**arrays, **options))
    assert list(gradients) == [f"d{name}" for name in leaves]
    for name, e in zip(leaves, expected_gradients, strict=True):
        assert_within(8 * max(1, dy.size) * error * largest(dy) * largest_product, e, gradients[f"d{name}"])


@every_activation_and_none
@every_rates
def test_matches_torch(rates: dict[str, float], activation: Any) -> None:
    assert_matches_torch(draw(11, SHAPE, (3, 1)), activation, rates)


@every_rates
@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_matches_torch_with_any_scale(rates: dict[str, float], scale: tuple[int, ...] | None) -> None:
    assert_matches_torch(draw(11, SHAPE, scale), SILU, rates)


@every_rates
@pytest.mark.parametrize(
    "shape", [(7,), (4, 1), (1, 3), (2, 3, 2, 2), (3, 2, 1, 2, 2), (0,), (0, 3), (3, 0), (2, 0, 3)]
)
def test_matches_torch_in_any_shape(shape: tuple[int, ...], rates: dict[str, float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_matches_torch(draw(11, shape, shape[-1:]), SILU, rates)


@pytest.mark.parametrize("rates", [{}, {"dropout_p": 0.3}])
def test_matches_torch_without_dimensions(rates: dict[str, float]) -> None:
    assert_matches_torch(draw(11, (), ()), SILU, rates)


@every_rates
@pytest.mark.parametrize("special", [NAN, INF, -INF])
def test_what_is_not_finite_is_torchs_kept_or_dropped(special: float, rates: dict[str, float]) -> None:
    arrays = draw(11, SHAPE, (3, 1))
    arrays["x"][:, 1] = special
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_matches_torch(arrays, None, rates)


@every_activation_and_none
@pytest.mark.parametrize("dropping", [False, True])
def test_backward_matches_finite_differences(dropping: bool, activation: Any) -> None:
    shape = (4, 2, 2)
    options = {**RATES[-1], **masks(shape, RATES[-1])} if dropping else {}
    scale = (2, 1) if dropping else None
    arrays = drawn_off_kinks(ADD, activation, lambda seed: draw(seed, shape, scale), options)
    options["activation"] = activation
    dy = normal(7, shape)
    gradients = call(ADD, arrays, dy, backward=True, **options)
    assert_matches_differences(lambda changed: outputs_of(ADD, changed, **options), arrays, (dy,), gradients)


@pytest.mark.parametrize("rate", ["dropout_p", "drop_path_p"])
def test_a_rate_of_1_leaves_the_residual_alone(rate: str) -> None:
    """And x without a gradient, whatever the mask says."""
    arrays, dy = draw(11, SHAPE, (2,)), normal(3, SHAPE)
    options = {rate: 1.0, "keep": np.ones(SHAPE), "keep_path": np.ones(5)}
    np.testing.assert_array_equal(reference.residual_add(**arrays, **options), arrays["residual"])
    gradients = call(ADD, arrays, dy, backward=True, **options)
    np.testing.assert_array_equal(gradients["dresidual"], dy)
    np.testing.assert_array_equal(gradients["dx"], np.zeros(SHAPE))
    np.testing.assert_array_equal(gradients["dscale"], np.zeros(2))
    assert_matches_torch(arrays, SILU, {rate: 1.0})


NOTHING_DROPS = [
    {"dropout_p": 0.0, "drop_path_p": 0.0},
    {"dropout_p": 0.3, "drop_path_p": 1.0, "training": False},
    {"dropout_p": 1.0, "drop_path_p": 0.3, "training": False},
]


@pytest.mark.parametrize("options", NOTHING_DROPS)
@pytest.mark.parametrize("given", [{}, {"keep": np.zeros(2), "keep_path": np.zeros(7)}], ids=["unmasked", "masked"])
def test_masks_are_not_looked_at_where_nothing_drops(given: dict[str, Any], options: dict[str, Any]) -> None:
    arrays, dy = draw(11, SHAPE, (2,)), normal(3, SHAPE)
    expected = arrays["residual"] + arrays["scale"] * arrays["x"]
    np.testing.assert_array_equal(reference.residual_add(**arrays, **options, **given), expected)
    gradients = call(ADD, arrays, dy, backward=True, **options, **given)
    for name, expected in call(ADD, arrays, dy, backward=True).items():
        np.testing.assert_array_equal(gradients[name], expected)


def test_half_input_is_computed_in_float64() -> None:
    half = {name: array.astype(np.float16) for name, array in draw(11, SHAPE, (2,)).items()}
    wide = {name: array.astype(np.float64) for name, array in half.items()}
    options = {**RATES[-1], **masks(SHAPE, RATES[-1])}
    expected = reference.residual_add(**wide, **options)
    np.testing.assert_array_equal(reference.residual_add(**half, **options), expected, strict=True)


ONES = {"x": np.ones(SHAPE), "residual": np.ones(SHAPE)}
SHOWN = r"\(5, 3, 2\)"
WRONG = [
    ({"residual": np.ones(2)}, rf"residual must have shape {SHOWN}, but has shape \(2,\)$"),
    ({"scale": np.ones(3)}, rf"scale must broadcast to x's shape {SHOWN}, but has shape \(3,\)$"),
    ({"scale": np.ones((1, 5, 3, 2))}, rf"scale must broadcast to x's shape {SHOWN}, but has shape \(1, 5, 3, 2\)$"),
    ({"dropout_p": -0.1}, r"dropout_p must lie between 0 and 1, but is -0\.1$"),
    ({"dropout_p": NAN}, "dropout_p must lie between 0 and 1, but is nan$"),
    ({"drop_path_p": 1.5, "training": False}, r"drop_path_p must lie between 0 and 1, but is 1\.5$"),
    ({"dropout_p": 0.5}, r"keep must be given where dropout_p is 0\.5 .*; pass the mask"),
    (
        {"drop_path_p": 1.0, "keep": np.ones(SHAPE)},
        r"keep_path must be given where drop_path_p is 1\.0 .*; pass the mask",
    ),
    ({"dropout_p": 1.0, "keep": np.ones((5, 3))}, rf"keep must have shape {SHOWN}, but has shape \(5, 3\)$"),
    (
        {"drop_path_p": 0.5, "keep_path": np.ones((5, 1, 1))},
        r"keep_path must have shape \(5,\), but has shape \(5, 1, 1\)$",
    ),
    (
        {"x": 1.0, "residual": 1.0, "drop_path_p": 0.5, "training": False},
        r"x must have 1 dimension at least, .* but has shape \(\)$",
    ),
]


@every_function
@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_wrong_arguments_are_named(function: Callable[..., Any], wrong: dict[str, Any], message: str) -> None:
    arguments = {**ONES, **wrong}
    dy = {"dy": arguments["x"]} if function is reference.residual_add_backward else {}
    with pytest.raises(ValueError, match=f"^residual_add: {message}"):
        function(**dy, **arguments)


def test_wrong_shape_of_dy_names_both() -> None:
    with pytest.raises(ValueError, match=rf"residual_add: dy must have shape {SHOWN}, but has shape \(2,\)$"):
        reference.residual_add_backward(np.ones(2), **ONES)


def test_unknown_activation_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'swish' is unknown; .* relu, .*, softplus$"):
        reference.residual_add(**ONES, activation="swish")


# ---- the dropout of the add_ norms ----


class Norm(NamedTuple):
    """A norm that is judged on a total of NORM_SHAPE."""

    torch_norm: Callable[..., torch.Tensor]
    spans: list[tuple[int, ...]]  # the dims of each of its statistics
    options: dict[str, Any]  # what it takes beside the arrays that have gradients
    learned: tuple[str, ...] = ("weight", "bias")


# Channels and the last dimension are of one size, so that weight and bias fit every norm.
NORM_SHAPE = (3, 4, 4)
BATCH = {"running_mean": None, "running_var": None, "training": True}
NORMS = {
    "add_layer_norm": Norm(lambda t, **affine: F.layer_norm(t, (4,), **affine), [(2,)], {"normalized_shape": 4}),
    "add_rms_norm": Norm(lambda t, weight: F.rms_norm(t, (4,), weight), [(2,)], {"normalized_shape": 4}, ("weight",)),
    "add_group_norm": Norm(lambda t, **affine: F.group_norm(t, 1, **affine), [(1, 2)], {"num_groups": 1}),
    "add_instance_norm": Norm(F.instance_norm, [(2,)], {}),
    "add_batch_norm": Norm(lambda t, **affine: F.batch_norm(t, **BATCH, **affine), [(0, 2)], BATCH),
    "add_switch_norm": Norm(
        torch_switch_norm(training=True),
        switch_spans(np.empty(NORM_SHAPE), training=True),
        BATCH,
        ("weight", "bias", "mean_weight", "var_weight"),
    ),
}
every_norm = pytest.mark.parametrize("function", NORMS)


def draw_for(function: str, seed: int) -> Arrays:
    arrays = draw(seed, NORM_SHAPE, None)
    for order, name in enumerate(NORMS[function].learned):
        arrays[name] = normal(seed + order, (3,) if name in ("mean_weight", "var_weight") else (4,))
    return arrays


def dropping(function: str, dropout_p: float) -> dict[str, Any]:
    """The options of a call that drops."""
    return {**NORMS[function].options, "dropout_p": dropout_p, "keep": drawn_mask(1, NORM_SHAPE, dropout_p)}


@every_norm
@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_norm_with_dropout_matches_torch(function: str, dropout_p: float) -> None:
    arrays, norm = draw_for(function, 11), NORMS[function]

    def dropout(x: torch.Tensor) -> torch.Tensor:
        return torch_dropout(1, x, dropout_p)

    total = arrays["residual"] + dropout(torch.tensor(arrays["x"])).numpy()
    means = [total.mean(span, keepdims=True) for span in norm.spans]
    # No mixture of variances, nor a mean square, is below the least of the variances.
    spread = np.sqrt(min(total.var(span).min() for span in norm.spans))
    options = dropping(function, dropout_p)
    assert_norm_matches_torch(
        function, arrays, norm.torch_norm, means, spread, total.size, SILU, options, dropout=dropout
    )


@every_norm
def test_norm_with_dropout_matches_finite_differences(function: str) -> None:
    arrays = draw_for(function, 11)
    options = {**dropping(function, 0.4), "activation": "silu"}
    d_outputs = (normal(7, NORM_SHAPE), normal(8, NORM_SHAPE))
    gradients = call(function, arrays, *d_outputs, backward=True, **options)
    assert_matches_differences(lambda changed: outputs_of(function, changed, **options), arrays, d_outputs, gradients)


@every_norm
def test_norm_with_all_of_x_dropped_is_the_norm_of_the_residual(function: str) -> None:
    arrays, options = draw_for(function, 11), NORMS[function].options
    d_outputs = (normal(7, NORM_SHAPE), normal(8, NORM_SHAPE))
    dropped = {**options, "dropout_p": 1.0, "keep": np.ones(NORM_SHAPE)}
    alone = {**arrays, "x": np.zeros(NORM_SHAPE)}
    pairs = zip(outputs_of(function, arrays, **dropped), outputs_of(function, alone, **options), strict=True)
    for actual, expected in pairs:
        np.testing.assert_array_equal(actual, expected)
    gradients = call(function, arrays, *d_outputs, backward=True, **dropped)
    expected_gradients = call(function, alone, *d_outputs, backward=True, **options)
    expected_gradients["dx"] = np.zeros(NORM_SHAPE)
    for name, expected in expected_gradients.items():
        np.testing.assert_array_equal(gradients[name], expected)


@every_norm
@pytest.mark.parametrize("dropout_p", [0.4, 1.0])
def test_nan_of_x_is_in_total_dropped_or_not(function: str, dropout_p: float) -> None:
    arrays, options = draw_for(function, 11), dropping(function, dropout_p)
    arrays["x"][1] = NAN
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y, total = call(function, arrays, **options)
    np.testing.assert_array_equal(np.isnan(total), np.isnan(arrays["x"]))
    assert np.isnan(y[1]).all()


@every_norm
@pytest.mark.parametrize("keep", [None, np.zeros(2)], ids=["unmasked", "masked"])
def test_norm_without_dropout_does_not_look_at_the_mask(function: str, keep: Any) -> None:
    arrays, options = draw_for(function, 11), NORMS[function].options
    evaluation = {**options, "training": False}
    if "running_mean" in options:
        evaluation |= {"running_mean": np.zeros(4), "running_var": np.ones(4)}
    d_outputs = (normal(7, NORM_SHAPE), normal(8, NORM_SHAPE))
    for plain, dropout_p in ((options, 0.0), (evaluation, 0.4), (evaluation, 1.0)):
        given = {**plain, "dropout_p": dropout_p, "keep": keep}
        pairs = zip(outputs_of(function, arrays, **given), outputs_of(function, arrays, **plain), strict=True)
        for actual, expected in pairs:
            np.testing.assert_array_equal(actual, expected)
        gradients = call(function, arrays, *d_outputs, backward=True, **given)
        for name, expected in call(function, arrays, *d_outputs, backward=True, **plain).items():
            np.testing.assert_array_equal(gradients[name], expected)


@every_norm
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dropout_p": 1.5}, r"dropout_p must lie between 0 and 1, but is 1\.5$"),
        ({"dropout_p": 0.5}, r"keep must be given where dropout_p is 0\.5 .*; pass the mask"),
        ({"dropout_p": 0.5, "keep": np.ones(4)}, r"keep must have shape \(3, 4, 4\), but has shape \(4,\)$"),
    ],
)
def test_norm_names_what_is_wrong_with_its_dropout(
    function: str, backward: bool, wrong: dict[str, Any], message: str
) -> None:
    d_outputs = [np.ones(NORM_SHAPE)] * 2 * backward
    with pytest.raises(ValueError, match=f"^{function}: {message}"):
        call(function, draw_for(function, 11), *d_outputs, backward=backward, **NORMS[function].options, **wrong)
