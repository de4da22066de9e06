"""Weight standardization: every filter of a convolution gets mean 0 and variance 1."""

from __future__ import annotations

from numpy.typing import ArrayLike

from .arrays import Array, checked, float64, propagate_non_finite
from .norm_call import Gradients
from .normalize import normalize, normalize_backward


def _filters(weight: ArrayLike) -> tuple[Array, tuple[int, ...]]:
    """weight in float64, and the axes of one filter."""
    weight = float64(weight)
    if weight.ndim < 2:
        raise ValueError(
            "weight_standardize: weight must have 2 dimensions at least, (filters, *filter), "
            f"but has shape {weight.shape}"
        )
    return weight, tuple(range(1, weight.ndim))


@propagate_non_finite
def weight_standardize(weight: ArrayLike, eps: float = 1e-5) -> Array:
    """weight_hat = (weight - mean) / sqrt(var + eps), over all dimensions but the first; var is the biased variance.

    Weight Standardization (Qiao, Wang, Liu, Shen, Yuille 2019, arXiv:1903.10520). Whatever dtype comes in,
    it is computed and returned in float64. Raises ValueError where weight has fewer than 2 dimensions.

    >>> weight_standardize([[1.0, 3.0], [0.0, 8.0]], eps=0.0)
    array([[-1.,  1.],
           [-1.,  1.]])
    """
    weight, axes = _filters(weight)
    weight_hat, _ = normalize(weight, axes, eps)
    return weight_hat


@propagate_non_finite
def weight_standardize_backward(dy: ArrayLike, weight: ArrayLike, eps: float = 1e-5) -> Gradients:
    """The gradient of sum(dy * weight_standardize(weight, eps)): dweight."""
    weight, axes = _filters(weight)
    dy = checked("weight_standardize", "dy", dy, weight.shape)
    weight_hat, rstd = normalize(weight, axes, eps)
    return {"dweight": normalize_backward(dy, weight_hat, rstd, axes)}
