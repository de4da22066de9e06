"""Group norm: statistics over some channels and all positions of one sample.

In every function below x has shape (N, C, *positions), weight and bias have shape (C,), and residual, y, total and
their gradients have x's shape. Whatever dtype comes in, everything is computed and returned in float64. ValueError
is raised where a shape is another, the activation is unknown, num_groups does not divide C, or, as in torch, the
only sample has a single value a group.
"""

from __future__ import annotations

import math
import operator

from numpy.typing import ArrayLike

from .activations import ActivationLike
from .arrays import Array, float64, propagate_non_finite
from .norm_call import ChannelNormCall, Gradients, total_of
from .normalize import normalize, normalize_backward


class _GroupNorm(ChannelNormCall):
    def __init__(
        self,
        function: str,
        x: ArrayLike,
        num_groups: int,
        weight: ArrayLike | None,
        bias: ArrayLike | None,
        eps: float,
        residual: ArrayLike | None,
        activation: ActivationLike,
    ) -> None:
        x = float64(x)
        super().__init__(function, x, weight, bias, residual, activation)
        samples, channels, *positions = x.shape
        groups = operator.index(num_groups)
        if groups < 1 or channels % groups:
            raise ValueError(
                f"{function}: num_groups must be 1 at least and divide the number of channels, "
                f"but is {groups} while x has shape {x.shape}"
            )
        # torch's own rule, which lets a batch of several samples pass.
        if samples * (channels // groups) * math.prod(positions) == 1:
            raise ValueError(
                f"{function}: a single sample must have 2 values a group at least, "
                f"but num_groups is {groups} while x has shape {x.shape}"
            )
        self.grouped = (samples, groups, channels // groups, *positions)
        self.axes = tuple(range(2, len(self.grouped)))
        x_hat, self.rstd = normalize(x.reshape(self.grouped), self.axes, eps)
        self.x_hat = x_hat.reshape(x.shape)

    def dx(self, dx_hat: Array) -> Array:
        dx_hat, x_hat = dx_hat.reshape(self.grouped), self.x_hat.reshape(self.grouped)
        return normalize_backward(dx_hat, x_hat, self.rstd, self.axes).reshape(self.x_hat.shape)


@propagate_non_finite
def group_norm(
    x: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    residual: ArrayLike | None = None,
    activation: ActivationLike = None,
) -> Array:
    """y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual), var the biased variance.

    Mean and variance are those of one sample's group: C / num_groups neighbouring channels at all positions.
    Group Normalization (Wu, He 2018, arXiv:1803.08494).

    >>> group_norm([[1.0, 3.0, 0.0, 8.0]], 2, eps=0.0)
    array([[-1.,  1., -1.,  1.]])
    """
    norm = _GroupNorm("group_norm", x, num_groups, weight, bias, eps, residual, activation)
    return norm.forward()


@propagate_non_finite
def group_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    residual: ArrayLike | None = None,
    activation: ActivationLike = None,
) -> Gradients:
    """The gradients of sum(dy * group_norm(...)): dx, and dresidual, dweight, dbias of what was given."""
    norm = _GroupNorm("group_norm", x, num_groups, weight, bias, eps, residual, activation)
    return norm.backward(dy)


@propagate_non_finite
def add_group_norm(
    x: ArrayLike,
    residual: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    activation: ActivationLike = None,
    dropout_p: float = 0.0,
    training: bool = True,
    keep: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """(y, total): total = residual + dropout(x), y = group_norm(total, ..., activation=activation).

    dropout(x) = x * keep / (1 - dropout_p) while training, with its mask `keep` of x's shape; otherwise x.
    """
    total, _ = total_of("add_group_norm", x, residual, dropout_p, training, keep)
    norm = _GroupNorm("add_group_norm", total, num_groups, weight, bias, eps, None, activation)
    return norm.forward(), total


@propagate_non_finite
def add_group_norm_backward(
    dy: ArrayLike | None,
    dtotal: ArrayLike | None,
    x: ArrayLike,
    residual: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    activation: ActivationLike = None,
    dropout_p: float = 0.0,
    training: bool = True,
    keep: ArrayLike | None = None,
) -> Gradients:
    """The gradients of sum(dy * y) + sum(dtotal * total): dx, dresidual; dweight, dbias of what was given.

    None for dy or dtotal says that no gradient arrived there.
    """
    total, factor = total_of("add_group_norm", x, residual, dropout_p, training, keep)
    norm = _GroupNorm("add_group_norm", total, num_groups, weight, bias, eps, None, activation)
    return norm.add_backward(dy, dtotal, factor)
