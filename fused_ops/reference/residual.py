"""The end of a residual block: what the block made of its input is dropped out, scaled, and added to that input.

In every function below x, residual, y and their gradients have one shape, (N, *rest); scale has any that broadcasts
to it. The masks `keep`, of x's shape, and `keep_path`, of shape (N,), are those that dropout and drop-path drew, true
or 1 where an element or a sample is kept; they must be given where the rate is above 0 while training, and are not
looked at otherwise. Whatever dtype comes in, everything is computed and returned in float64. ValueError is raised
where a shape is another, a rate lies outside of 0 to 1, a mask is missing or the activation is unknown.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .activations import ActivationLike, activation_slope, activation_value
from .arrays import Array, checked, float64, propagate_non_finite, sum_to
from .drops import drop_path_factor, dropout_factor
from .norm_call import Gradients

FUNCTION = "residual_add"


def _checked_scale(scale: ArrayLike, shape: tuple[int, ...]) -> Array:
    scale = float64(scale)
    try:
        np.broadcast_to(scale, shape)
    except ValueError:
        raise ValueError(
            f"{FUNCTION}: scale must broadcast to x's shape {shape}, but has shape {scale.shape}"
        ) from None
    return scale


class _ResidualAdd:
    """One call: its arguments, checked and in float64, and what forward and backward share."""

    def __init__(
        self,
        x: ArrayLike,
        residual: ArrayLike,
        activation: ActivationLike,
        scale: ArrayLike | None,
        dropout_p: float,
        drop_path_p: float,
        training: bool,
        keep: ArrayLike | None,
        keep_path: ArrayLike | None,
    ) -> None:
        x = float64(x)
        residual = checked(FUNCTION, "residual", residual, x.shape)
        self.activation = activation
        self.scale = None if scale is None else _checked_scale(scale, x.shape)
        self.dropout_factor = dropout_factor(FUNCTION, keep, x.shape, dropout_p, training)
        self.drop_path_factor = drop_path_factor(FUNCTION, keep_path, x.shape, drop_path_p, training)
        self.dropped = x * self.dropout_factor
        scaled = self.dropped if self.scale is None else self.scale * self.dropped
        self.z = residual + self.drop_path_factor * scaled

    def forward(self) -> Array:
        return activation_value(self.z, self.activation)

    def backward(self, dy: ArrayLike) -> Gradients:
        dz = checked(FUNCTION, "dy", dy, self.z.shape) * activation_slope(self.z, self.activation)
        d_scaled = dz * self.drop_path_factor
        if self.scale is None:
            return {"dx": d_scaled * self.dropout_factor, "dresidual": dz}
        dscale = sum_to(d_scaled * self.dropped, self.scale.shape)
        return {"dx": d_scaled * self.scale * self.dropout_factor, "dresidual": dz, "dscale": dscale}


@propagate_non_finite
def residual_add(
    x: ArrayLike,
    residual: ArrayLike,
    *,
    activation: ActivationLike = None,
    scale: ArrayLike | None = None,
    dropout_p: float = 0.0,
    drop_path_p: float = 0.0,
    training: bool = True,
    keep: ArrayLike | None = None,
    keep_path: ArrayLike | None = None,
) -> Array:
    """y = activation(residual + drop_path(scale * dropout(x))).

    While training dropout(x) = x * keep / (1 - dropout_p) and drop_path(x) = x * keep_path / (1 - drop_path_p), the
    latter for whole samples; a rate of 1 gives 0. Otherwise both are x.
    Dropout (Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov 2014, JMLR 15), stochastic depth (Huang, Sun,
    Liu, Sedra, Weinberger 2016, arXiv:1603.09382), layer scale (Touvron, Cord, Sablayrolles, Synnaeve, Jégou 2021,
    arXiv:2103.17239).

    >>> residual_add([[1.0, 2.0], [3.0, 4.0]], np.ones((2, 2)), scale=[1.0, 10.0], drop_path_p=0.5, keep_path=[0, 1])
    array([[ 1.,  1.],
           [ 7., 81.]])
    """
    call = _ResidualAdd(x, residual, activation, scale, dropout_p, drop_path_p, training, keep, keep_path)
    return call.forward()


@propagate_non_finite
def residual_add_backward(
    dy: ArrayLike,
    x: ArrayLike,
    residual: ArrayLike,
    *,
    activation: ActivationLike = None,
    scale: ArrayLike | None = None,
    dropout_p: float = 0.0,
    drop_path_p: float = 0.0,
    training: bool = True,
    keep: ArrayLike | None = None,
    keep_path: ArrayLike | None = None,
) -> Gradients:
    """The gradients of sum(dy * residual_add(...)): dx, dresidual, and dscale if scale was given."""
    call = _ResidualAdd(x, residual, activation, scale, dropout_p, drop_path_p, training, keep, keep_path)
    return call.backward(dy)
