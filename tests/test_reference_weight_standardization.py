"""The reference's weight standardization against torch in float64, finite differences and exact arithmetic."""

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
    assert_matches_differences,
    assert_within,
    exactly_standardized,
    largest,
)

# A linear layer; convolutions over one, two and three dimensions, depthwise and pointwise ones among them.
SHAPES = [(3, 7), (4, 3, 5), (4, 1, 3), (5, 2, 3, 3), (3, 30, 1, 1), (2, 3, 2, 3, 2), (3, 1), (1, 1, 1, 1)]
every_shape = pytest.mark.parametrize("shape", SHAPES)


def normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.5, 2.0, shape)


def assert_matches_torch(weight: np.ndarray, **eps: float) -> None:
    """Value and gradient against layer norm of every filter; the tolerance follows the errors through the formulas.

    Each of the two results takes at most span + 20 roundings one after another. An element of weight_hat, at most
    sqrt(span), is as uncertain as weight is in units of the spread; a term of dweight is a product of dy,
    weight_hat twice and rstd.
    """
    leaf = torch.tensor(weight, requires_grad=True)
    expected = F.layer_norm(leaf, weight.shape[1:], **eps)
    dy = normal(3, weight.shape)
    (expected_gradient,) = torch.autograd.grad(expected, leaf, torch.tensor(dy))

    span = prod(weight.shape[1:])
    filters = weight.reshape(len(weight), span)
    with np.errstate(invalid="ignore"):
        rstd = 1 / np.sqrt(filters.var(1, keepdims=True) + eps.get("eps", 1e-5))
        uncertainty = largest(filters * rstd)
    error = 4 * (span + 20) * EPS * uncertainty * np.sqrt(span)
    assert_within(error, expected, reference.weight_standardize(weight, **eps))
    gradients = reference.weight_standardize_backward(dy, weight, **eps)
    assert list(gradients) == ["dweight"]
    assert_within(4 * error * largest(dy) * span * largest(rstd), expected_gradient, gradients["dweight"])


@every_shape
@pytest.mark.parametrize("eps", [{}, {"eps": 0.1}], ids=["default", "large"])
def test_matches_torch(shape: tuple[int, ...], eps: Any) -> None:
    assert_matches_torch(normal(5, shape), **eps)


@pytest.mark.parametrize("hard", HARD_SPANS)
def test_matches_torch_on_a_hard_filter(hard: str) -> None:
    weight = normal(5, (4, 2, 3, 2))
    weight[1] = HARD_SPANS[hard](weight[1].reshape(-1)).reshape(weight[1].shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_matches_torch(weight)


@every_shape
def test_backward_matches_finite_differences(shape: tuple[int, ...]) -> None:
    arrays, dy, eps = {"weight": normal(5, shape)}, normal(7, shape), 0.1
    gradients = reference.weight_standardize_backward(dy, arrays["weight"], eps)
    assert_matches_differences(
        lambda changed: (reference.weight_standardize(changed["weight"], eps),), arrays, (dy,), gradients
    )


def test_large_mean_against_exact_arithmetic() -> None:
    span = 24
    filters = 1e8 + 1e-2 * np.random.default_rng(2).normal(size=(2, span))
    expected = np.array([exactly_standardized(each) for each in filters])
    actual = reference.weight_standardize(filters.reshape(2, 2, 4, 3), eps=0.0).reshape(filters.shape)
    atol = (span + 20) * EPS * np.sqrt(span)  # no element of weight_hat is above sqrt(span)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", [(0, 3, 2), (3, 0), (3, 2, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    weight = np.zeros(shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reference.weight_standardize(weight).shape == shape
        assert reference.weight_standardize_backward(weight, weight)["dweight"].shape == shape


def test_half_input_is_computed_in_float64() -> None:
    half = normal(0, (3, 4)).astype(np.float16)
    actual = reference.weight_standardize(half)
    np.testing.assert_array_equal(actual, reference.weight_standardize(half.astype(np.float64)), strict=True)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_too_few_dimensions_name_the_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="weight_standardize: weight must have 2 dimensions") as error:
        reference.weight_standardize(np.ones(shape))
    assert str(error.value).endswith(f"has shape {shape}")
    with pytest.raises(ValueError, match="weight_standardize: weight must have 2 dimensions"):
        reference.weight_standardize_backward(np.ones(shape), np.ones(shape))


def test_wrong_shape_of_dy_names_both() -> None:
    with pytest.raises(ValueError, match=r"weight_standardize: dy must have shape \(3, 4\), but has shape \(4,\)"):
        reference.weight_standardize_backward(np.ones(4), np.ones((3, 4)))
