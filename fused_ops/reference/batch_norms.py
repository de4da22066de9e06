"""Batch norm: statistics of one channel over all samples and positions, or running statistics of a channel.

In every function below x has shape (N, C, *positions), weight, bias and the running statistics have shape (C,),
and residual, y, total and their gradients have x's shape. Whatever dtype comes in, everything is computed and
returned in float64. ValueError is raised where a shape is another, the activation is unknown, or, as in torch,
where the statistics of x are those of a single value or eps is not positive while training, negative otherwise.
"""

from __future__ import annotations

from numpy.typing import ArrayLike

from .activations import ActivationLike
from .arrays import Array, float64, propagate_non_finite
from .norm_call import Gradients, total_of
from .running_call import RunningNormCall


class _BatchNorm(RunningNormCall):
    flag = "training"

    def __init__(
        self,
        function: str,
        x: ArrayLike,
        running_mean: ArrayLike | None,
        running_var: ArrayLike | None,
        weight: ArrayLike | None,
        bias: ArrayLike | None,
        training: bool,
        momentum: float,
        eps: float,
        residual: ArrayLike | None,
        activation: ActivationLike,
    ) -> None:
        x = float64(x)
        super().__init__(function, x, running_mean, running_var, weight, bias, training, residual, activation)
        self.refuse_single_values(x)
        if eps < 0.0 or (training and eps == 0.0):
            raise ValueError(
                f"{function}: eps must be {'positive' if training else '0 or positive'} "
                f"where training is {training}, but is {eps}"
            )
        self.axes = (0, *range(2, x.ndim))
        self.normalize(x, eps)
        if training and x.size:  # as in torch, nothing moves nothing
            self.move(x, self.axes, momentum)


@propagate_non_finite
def batch_norm(
    x: ArrayLike,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: ArrayLike | None = None,
    activation: ActivationLike = None,
) -> Array | tuple[Array, ...]:
    """y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual), var the biased variance.

    Mean and variance are those of one channel over samples and positions while `training`, otherwise the running
    ones, which must then be given. Where running statistics are given it is (y, running_mean, running_var), the
    latter as they are after the call: while `training`, (1 - momentum) * running + momentum * new, where new is the
    mean, or the unbiased variance; otherwise unchanged.
    Batch Normalization (Ioffe, Szegedy 2015, arXiv:1502.03167).

    >>> y, running_mean, running_var = batch_norm([[1.0], [3.0]], [0.0], [1.0], training=True, momentum=0.5)
    >>> running_mean, running_var
    (array([1.]), array([1.5]))
    >>> batch_norm([[1.0], [3.0]], [1.0], [4.0], eps=0.0)[0]
    array([[0.],
           [1.]])
    """
    norm = _BatchNorm(
        "batch_norm",
        x,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        residual,
        activation,
    )
    return (norm.forward(), *norm.running) if norm.running else norm.forward()


@propagate_non_finite
def batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: ArrayLike | None = None,
    activation: ActivationLike = None,
) -> Gradients:
    """The gradients of sum(dy * y): dx, and dresidual, dweight, dbias of what was given.

    Running statistics are constants, and have none.
    """
    norm = _BatchNorm(
        "batch_norm",
        x,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        residual,
        activation,
    )
    return norm.backward(dy)


@propagate_non_finite
def add_batch_norm(
    x: ArrayLike,
    residual: ArrayLike,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: ActivationLike = None,
    dropout_p: float = 0.0,
    keep: ArrayLike | None = None,
) -> tuple[Array, ...]:
    """(y, total): total = residual + dropout(x), y = batch_norm(total, ..., activation=activation).

    Where running statistics are given it is (y, total, running_mean, running_var).
    dropout(x) = x * keep / (1 - dropout_p) while training, with its mask `keep` of x's shape; otherwise x.
    """
    total, _ = total_of("add_batch_norm", x, residual, dropout_p, training, keep)
    norm = _BatchNorm(
        "add_batch_norm",
        total,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        None,
        activation,
    )
    return norm.forward(), total, *norm.running


@propagate_non_finite
def add_batch_norm_backward(
    dy: ArrayLike | None,
    dtotal: ArrayLike | None,
    x: ArrayLike,
    residual: ArrayLike,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: ActivationLike = None,
    dropout_p: float = 0.0,
    keep: ArrayLike | None = None,
) -> Gradients:
    """The gradients of sum(dy * y) + sum(dtotal * total): dx, dresidual; dweight, dbias of what was given.

    None for dy or dtotal says that no gradient arrived there.
    """
    total, factor = total_of("add_batch_norm", x, residual, dropout_p, training, keep)
    norm = _BatchNorm(
        "add_batch_norm",
        total,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        None,
        activation,
    )
    return norm.add_backward(dy, dtotal, factor)
