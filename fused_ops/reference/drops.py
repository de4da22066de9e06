"""What dropout and drop-path multiply by, given the masks that they drew.

What is kept is divided by 1 - p, so that its expectation stays; at a rate p of 1 nothing is. A dropped NaN or Inf
becomes NaN, since a product drops it, as in torch on a CPU.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .arrays import Array, checked


def dropout_factor(
    function: str, keep: ArrayLike | None, shape: tuple[int, ...], dropout_p: float, training: bool
) -> Array:
    """keep / (1 - dropout_p), of x's `shape`, or ones where nothing is dropped and keep is not looked at.

    Dropout (Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov 2014, JMLR 15).
    """
    return _factor(function, "keep", keep, shape, "dropout_p", dropout_p, training)


def drop_path_factor(
    function: str, keep_path: ArrayLike | None, shape: tuple[int, ...], drop_path_p: float, training: bool
) -> Array:
    """keep_path / (1 - drop_path_p), one value a sample, as it broadcasts to x, or ones as in `dropout_factor`.

    Stochastic depth (Huang, Sun, Liu, Sedra, Weinberger 2016, arXiv:1603.09382).
    """
    if drop_path_p > 0.0 and not shape:
        raise ValueError(
            f"{function}: x must have 1 dimension at least, (N, *rest), where drop_path_p is {drop_path_p}, "
            f"but has shape {shape}"
        )
    factor = _factor(function, "keep_path", keep_path, shape[:1], "drop_path_p", drop_path_p, training)
    return factor.reshape(shape[:1] + (1,) * (len(shape) - 1))


def _factor(
    function: str,
    mask_name: str,
    mask: ArrayLike | None,
    shape: tuple[int, ...],
    rate_name: str,
    rate: float,
    training: bool,
) -> Array:
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"{function}: {rate_name} must lie between 0 and 1, but is {rate}")
    if rate == 0.0 or not training:
        return np.ones(shape)
    if mask is None:
        raise ValueError(
            f"{function}: {mask_name} must be given where {rate_name} is {rate} while training, but is None; "
            f"pass the mask that was drawn, of shape {shape}"
        )
    kept = checked(function, mask_name, mask, shape)
    return np.zeros(shape) if rate == 1.0 else kept / (1.0 - rate)
