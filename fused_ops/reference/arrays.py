"""What every file of the reference needs from NumPy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

# A decorator: Inf - Inf, 0 * Inf and 1 / sqrt(0) give NaN or Inf in torch without a word, and so here;
# overflow still warns.
propagate_non_finite = np.errstate(divide="ignore", invalid="ignore")


def float64(values: ArrayLike) -> Array:
    return np.asarray(values, dtype=np.float64)


def checked(function: str, argument: str, values: ArrayLike, shape: tuple[int, ...]) -> Array:
    array = float64(values)
    if array.shape != shape:
        raise ValueError(f"{function}: {argument} must have shape {shape}, but has shape {array.shape}")
    return array


def sum_to(values: Array, shape: tuple[int, ...]) -> Array:
    """Undo a broadcast: the gradient of an array of `shape` that was broadcast to the shape of `values`."""
    padded = (1,) * (values.ndim - len(shape)) + shape
    stretched = tuple(axis for axis, size in enumerate(padded) if size != values.shape[axis])
    return np.asarray(values.sum(axis=stretched, keepdims=True).reshape(shape))


def mean_over(values: Array, axes: Sequence[int]) -> Array:
    """The mean over `axes`, which stay as axes of length 1; NaN of nothing, where np.mean would warn."""
    count = math.prod(values.shape[axis] for axis in axes)
    return np.asarray(values.sum(axis=tuple(axes), keepdims=True) / count)
