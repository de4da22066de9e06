"""Mean, variance, x_hat, and the one dx formula, over any axes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .arrays import Array, mean_over


def center(x: Array, axes: Sequence[int]) -> Array:
    """x minus its mean over `axes`.

    The rounded mean is off by half a unit in its last place, which is much where the mean is large and the
    deviation small. There the differences from it are exact, and removing their own mean undoes that error.
    """
    deviation = x - mean_over(x, axes)
    return deviation - mean_over(deviation, axes)


def normalize(x: Array, axes: Sequence[int], eps: float, subtract_mean: bool = True) -> tuple[Array, Array]:
    """(x_hat, rstd): x_hat = (x - mean) * rstd, rstd = 1 / sqrt(mean((x - mean)^2) + eps).

    Without `subtract_mean` the mean counts as 0. rstd keeps `axes` as axes of length 1.
    """
    deviation = center(x, axes) if subtract_mean else x
    rstd = 1.0 / np.sqrt(mean_over(deviation * deviation, axes) + eps)
    return deviation * rstd, rstd


def normalize_backward(
    dx_hat: Array, x_hat: Array, rstd: Array, axes: Sequence[int], subtract_mean: bool = True
) -> Array:
    """dx = rstd * (dx_hat - mean(dx_hat) - x_hat * mean(dx_hat * x_hat)).

    Without `subtract_mean` the term mean(dx_hat) falls away.
    """
    removed = x_hat * mean_over(dx_hat * x_hat, axes)
    if subtract_mean:
        removed = removed + mean_over(dx_hat, axes)
    return rstd * (dx_hat - removed)
