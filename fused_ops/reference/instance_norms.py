"""Instance norm: statistics over the positions of one channel of one sample, or running statistics of a channel.

In every function below x has shape (N, C, *positions), weight, bias and the running statistics have shape (C,),
and residual, y, total and their gradients have x's shape. Whatever dtype comes in, everything is computed and
returned in float64. ValueError is raised where a shape is another, the activation is unknown, or, as in torch,
where the statistics of x are those of a single position.
"""

from __future__ import annotations

import math

from numpy.typing import ArrayLike

from .activations import ActivationLike
from .arrays import Array, float64, propagate_non_finite
from .norm_call import Gradients, total_of
from .running_call import RunningNormCall


class _InstanceNorm(RunningNormCall):
    least_dims = 3
    flag = "use_input_stats"

    def __init__(
        self,
        function: str,
        x: ArrayLike,
        running_mean: ArrayLike | None,
        running_var: ArrayLike | None,
        weight: ArrayLike | None,
        bias: ArrayLike | None,
        use_input_stats: bool,
        momentum: float,
        eps: float,
        residual: ArrayLike | None,
        activation: ActivationLike,
    ) -> None:
        x = float64(x)
        super().__init__(function, x, running_mean, running_var, weight, bias, use_input_stats, residual, activation)
        self.axes = tuple(range(2, x.ndim))
        positions = math.prod(x.shape[2:])
        if use_input_stats and positions == 1:
            raise ValueError(
                f"{function}: x must have 2 positions at least where use_input_stats is True, but has shape {x.shape}"
            )
        self.normalize(x, eps)
        # As in torch, no positions leave running statistics as they are, and no samples make them NaN.
        if use_input_stats and (positions > 0 or len(x) == 0):
            self.move(x, self.axes, momentum)


@propagate_non_finite
def instance_norm(
    x: ArrayLike,
    running_mean: ArrayLike | None = None,
    running_var: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: ArrayLike | None = None,
    activation: ActivationLike = None,
) -> Array | tuple[Array, ...]:
    """y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual), var the biased variance.

    Mean and variance are those of one channel of one sample, or, without `use_input_stats`, the running ones.
    Where running statistics are given it is (y, running_mean, running_var), the latter as they are after the
    call: with `use_input_stats`, (1 - momentum) * running + momentum * new, where new is the mean over samples of
    the means, or of the unbiased variances; otherwise unchanged.
    Instance Normalization (Ulyanov, Vedaldi, Lempitsky 2016, arXiv:1607.08022).

    >>> instance_norm([[[1.0, 3.0], [0.0, 8.0]]], eps=0.0)
    array([[[-1.,  1.],
            [-1.,  1.]]])
    >>> y, running_mean, running_var = instance_norm([[[1.0, 3.0]]], [0.0], [1.0], momentum=0.5)
    >>> running_mean, running_var
    (array([1.]), array([1.5]))
    """
    norm = _InstanceNorm(
        "instance_norm",
        x,
        running_mean,
        running_var,
        weight,
        bias,
        use_input_stats,
        momentum,
        eps,
        residual,
        activation,
    )
    return (norm.forward(), *norm.running) if norm.running else norm.forward()


@propagate_non_finite
def instance_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    running_mean: ArrayLike | None = None,
    running_var: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: ArrayLike | None = None,
    activation: ActivationLike = None,
) -> Gradients:
    """The gradients of sum(dy * y): dx, and dresidual, dweight, dbias of what was given.

    Running statistics are constants, and have none.
    """
    norm = _InstanceNorm(
        "instance_norm",
        x,
        running_mean,
        running_var,
        weight,
        bias,
        use_input_stats,
        momentum,
        eps,
        residual,
        activation,
    )
    return norm.backward(dy)


@propagate_non_finite
def add_instance_norm(
    x: ArrayLike,
    residual: ArrayLike,
    running_mean: ArrayLike | None = None,
    running_var: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: ActivationLike = None,
    dropout_p: float = 0.0,
    training: bool = True,
    keep: ArrayLike | None = None,
) -> tuple[Array, ...]:
    """(y, total): total = residual + dropout(x), y = instance_norm(total, ..., activation=activation).

    Where running statistics are given it is (y, total, running_mean, running_var).
    dropout(x) = x * keep / (1 - dropout_p) while training, with its mask `keep` of x's shape; otherwise x.
    """
    total, _ = total_of("add_instance_norm", x, residual, dropout_p, training, keep)
    norm = _InstanceNorm(
        "add_instance_norm",
        total,
        running_mean,
        running_var,
        weight,
        bias,
        use_input_stats,
        momentum,
        eps,
        None,
        activation,
    )
    return norm.forward(), total, *norm.running


@propagate_non_finite
def add_instance_norm_backward(
    dy: ArrayLike | None,
    dtotal: ArrayLike | None,
    x: ArrayLike,
    residual: ArrayLike,
    running_mean: ArrayLike | None = None,
    running_var: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
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
    total, factor = total_of("add_instance_norm", x, residual, dropout_p, training, keep)
    norm = _InstanceNorm(
        "add_instance_norm",
        total,
        running_mean,
        running_var,
        weight,
        bias,
        use_input_stats,
        momentum,
        eps,
        None,
        activation,
    )
    return norm.add_backward(dy, dtotal, factor)
