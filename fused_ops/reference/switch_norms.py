"""Switchable norm: a learned mixture of the statistics of instance, layer and batch norm.

In every function below x has shape (N, C, *positions), weight, bias and the running statistics have shape (C,),
mean_weight and var_weight have shape (3,) in the order instance, layer, batch, or (2,) in the order layer, batch
where x has no positions, and residual, y, total and their gradients have x's shape. Whatever dtype comes in,
everything is computed and returned in float64. ValueError is raised where a shape is another, the activation is
unknown, or, as in batch norm, a channel has a single value while training.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .activations import ActivationLike
from .arrays import Array, checked, float64, mean_over, propagate_non_finite
from .norm_call import Gradients, total_of
from .normalize import center
from .running_call import RunningNormCall


class _Moments(NamedTuple):
    """x minus a mean, in x's shape, and the variance, which broadcasts to it; `axes` is None where both are given."""

    deviation: Array
    var: Array
    axes: tuple[int, ...] | None


def _softmax(values: Array) -> Array:
    powers = np.exp(values - values.max())
    return np.asarray(powers / powers.sum())


def _softmax_backward(d_shares: Array, shares: Array) -> Array:
    return shares * (d_shares - (shares * d_shares).sum())


class _SwitchNorm(RunningNormCall):
    flag = "training"

    def __init__(
        self,
        function: str,
        x: ArrayLike,
        running_mean: ArrayLike | None,
        running_var: ArrayLike | None,
        weight: ArrayLike | None,
        bias: ArrayLike | None,
        mean_weight: ArrayLike,
        var_weight: ArrayLike,
        training: bool,
        momentum: float,
        eps: float,
        residual: ArrayLike | None,
        activation: ActivationLike,
    ) -> None:
        x = float64(x)
        super().__init__(function, x, running_mean, running_var, weight, bias, training, residual, activation)
        self.refuse_single_values(x)
        self.moments = self._moments(x)
        given = {"mean_weight": mean_weight, "var_weight": var_weight}
        self.learned = {name: checked(function, name, given[name], (len(self.moments),)) for name in given}
        self.mean_shares, self.var_shares = map(_softmax, self.learned.values())

        # The shares add up to 1, so this is x minus the mixed mean, but exact where the means are large.
        deviation = sum(share * each.deviation for share, each in zip(self.mean_shares, self.moments, strict=True))
        var = sum(share * each.var for share, each in zip(self.var_shares, self.moments, strict=True))
        self.rstd = 1.0 / np.sqrt(var + eps)
        self.x_hat = float64(deviation * self.rstd)
        if training and x.size:  # as in batch norm, nothing moves nothing
            self.move(x, (0, *range(2, x.ndim)), momentum)

    def _moments(self, x: Array) -> list[_Moments]:
        positions = tuple(range(2, x.ndim))
        # Without positions an instance is a single value, and there is nothing to mix in.
        spans: list[tuple[int, ...]] = [positions, (1, *positions)] if positions else [(1,)]
        if self.use_input_stats:
            spans.append((0, *positions))
        deviations = [center(x, axes) for axes in spans]
        moments = [_Moments(each, mean_over(each**2, axes), axes) for each, axes in zip(deviations, spans, strict=True)]
        if not self.use_input_stats:
            mean, var = self.running_moments(x)
            moments.append(_Moments(x - mean, var, None))
        return moments

    def _d_deviation(self, dx_hat: Array) -> Array:
        return dx_hat * self.rstd

    def _d_var(self, dx_hat: Array) -> Array:
        """In x's shape: what is to be summed over the elements that share a variance."""
        return -0.5 * dx_hat * self.x_hat * self.rstd**2

    def dx(self, dx_hat: Array) -> Array:
        """Every deviation d = x - mean(x) and variance mean(d^2) hands its gradient on to x.

        Through a mean goes the mean of the gradient, over the same elements; mean(d) is 0.
        """
        d_deviation, d_var = self._d_deviation(dx_hat), self._d_var(dx_hat)
        dx = d_deviation.copy()
        for mean_share, var_share, each in zip(self.mean_shares, self.var_shares, self.moments, strict=True):
            if each.axes is not None:
                dx -= mean_share * mean_over(d_deviation, each.axes)
                dx += var_share * 2.0 * each.deviation * mean_over(d_var, each.axes)
        return dx

    def learned_backward(self, dx_hat: Array) -> Gradients:
        d_deviation, d_var = self._d_deviation(dx_hat), self._d_var(dx_hat)
        d_mean_shares = float64([(d_deviation * each.deviation).sum() for each in self.moments])
        d_var_shares = float64([(d_var * each.var).sum() for each in self.moments])
        return {
            "dmean_weight": _softmax_backward(d_mean_shares, self.mean_shares),
            "dvar_weight": _softmax_backward(d_var_shares, self.var_shares),
        }


@propagate_non_finite
def switch_norm(
    x: ArrayLike,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    mean_weight: ArrayLike,
    var_weight: ArrayLike,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: ArrayLike | None = None,
    activation: ActivationLike = None,
) -> Array | tuple[Array, ...]:
    """y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual).

    mean = sum(softmax(mean_weight) * means) and var = sum(softmax(var_weight) * vars): mixtures of the means and the
    biased variances of one channel of one sample, of one sample, and of one channel over samples and positions; on
    (N, C) input of the last two. Without `training` the channel's are the running ones, which must then be given.
    Where running statistics are given it is (y, running_mean, running_var), the latter as they are after the call:
    while `training`, (1 - momentum) * running + momentum * new, where new is the channel's mean, or its unbiased
    variance; otherwise unchanged.
    Switchable Normalization (Luo, Ren, Peng, Zhang, Li 2018, arXiv:1806.10779).

    >>> x = [[0.0, 2.0], [14.0, 16.0]]
    >>> switch_norm(x, None, None, None, None, [0.0, 0.0], [0.0, 0.0], training=True, eps=0.0)
    array([[-0.8, -0.6],
           [ 0.6,  0.8]])
    """
    norm = _SwitchNorm(
        "switch_norm",
        x,
        running_mean,
        running_var,
        weight,
        bias,
        mean_weight,
        var_weight,
        training,
        momentum,
        eps,
        residual,
        activation,
    )
    return (norm.forward(), *norm.running) if norm.running else norm.forward()


@propagate_non_finite
def switch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    mean_weight: ArrayLike,
    var_weight: ArrayLike,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: ArrayLike | None = None,
    activation: ActivationLike = None,
) -> Gradients:
    """The gradients of sum(dy * y): dx, dmean_weight, dvar_weight; dresidual, dweight, dbias of what
    was given.

    Running statistics are constants, and have none.
    """
    norm = _SwitchNorm(
        "switch_norm",
        x,
        running_mean,
        running_var,
        weight,
        bias,
        mean_weight,
        var_weight,
        training,
        momentum,
        eps,
        residual,
        activation,
    )
    return norm.backward(dy)


@propagate_non_finite
def add_switch_norm(
    x: ArrayLike,
    residual: ArrayLike,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    mean_weight: ArrayLike,
    var_weight: ArrayLike,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: ActivationLike = None,
    dropout_p: float = 0.0,
    keep: ArrayLike | None = None,
) -> tuple[Array, ...]:
    """(y, total): total = residual + dropout(x), y = switch_norm(total, ..., activation=activation).

    Where running statistics are given it is (y, total, running_mean, running_var).
    dropout(x) = x * keep / (1 - dropout_p) while training, with its mask `keep` of x's shape; otherwise x.
    """
    total, _ = total_of("add_switch_norm", x, residual, dropout_p, training, keep)
    norm = _SwitchNorm(
        "add_switch_norm",
        total,
        running_mean,
        running_var,
        weight,
        bias,
        mean_weight,
        var_weight,
        training,
        momentum,
        eps,
        None,
        activation,
    )
    return norm.forward(), total, *norm.running


@propagate_non_finite
def add_switch_norm_backward(
    dy: ArrayLike | None,
    dtotal: ArrayLike | None,
    x: ArrayLike,
    residual: ArrayLike,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    mean_weight: ArrayLike,
    var_weight: ArrayLike,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: ActivationLike = None,
    dropout_p: float = 0.0,
    keep: ArrayLike | None = None,
) -> Gradients:
    """The gradients of sum(dy * y) + sum(dtotal * total): dx, dresidual, dmean_weight, dvar_weight;
    dweight, dbias of what was given.

    None for dy or dtotal says that no gradient arrived there.
    """
    total, factor = total_of("add_switch_norm", x, residual, dropout_p, training, keep)
    norm = _SwitchNorm(
        "add_switch_norm",
        total,
        running_mean,
        running_var,
        weight,
        bias,
        mean_weight,
        var_weight,
        training,
        momentum,
        eps,
        None,
        activation,
    )
    return norm.add_backward(dy, dtotal, factor)
