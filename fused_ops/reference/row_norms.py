"""Layer norm and RMS norm: statistics over the trailing dimensions, one row at a time.

In every function below x has shape (*rows, *normalized_shape), weight and bias have shape `normalized_shape`,
and residual, y, total and their gradients have x's shape. Whatever dtype comes in, everything is computed and
returned in float64. ValueError is raised where a shape is another or the activation is unknown.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from .activations import ActivationLike
from .arrays import Array, float64, propagate_non_finite
from .norm_call import Gradients, NormCall, total_of
from .normalize import normalize, normalize_backward

NormalizedShape = int | Sequence[int]


def rms_norm_eps(*dtypes: np.dtype) -> float:
    """The eps that torch 2.13's rms_norm takes for eps=None: the machine epsilon of the dtype it computes in.

    That is float32's for half, bfloat16 and float32, and float64's for float64; `torch.finfo(x.dtype).eps` is
    8192 times larger for half. NumPy has no bfloat16: hold it in a float32 array, or pass eps.
    """
    return float(np.finfo(np.result_type(np.float32, *dtypes)).eps)


class _RowNorm(NormCall):
    """One call of a row norm."""

    subtract_mean: bool

    def __init__(
        self,
        function: str,
        x: ArrayLike,
        normalized_shape: NormalizedShape,
        weight: ArrayLike | None,
        bias: ArrayLike | None,
        eps: float,
        residual: ArrayLike | None,
        activation: ActivationLike,
    ) -> None:
        x = float64(x)
        if isinstance(normalized_shape, Sequence):
            shape = tuple(normalized_shape)
        else:
            shape = (operator.index(normalized_shape),)
        if not shape or x.shape[-len(shape) :] != shape:
            raise ValueError(
                f"{function}: normalized_shape must be the trailing dimensions of x, one at least, "
                f"but is {shape} while x has shape {x.shape}"
            )
        super().__init__(function, x, shape, 0, weight, bias, residual, activation)
        self.axes = tuple(range(x.ndim - len(shape), x.ndim))
        self.x_hat, self.rstd = normalize(x, self.axes, eps, self.subtract_mean)

    def dx(self, dx_hat: Array) -> Array:
        return normalize_backward(dx_hat, self.x_hat, self.rstd, self.axes, self.subtract_mean)


class _LayerNorm(_RowNorm):
    subtract_mean = True


class _RMSNorm(_RowNorm):
    subtract_mean = False


@propagate_non_finite
def layer_norm(
    x: ArrayLike,
    normalized_shape: NormalizedShape,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    residual: ArrayLike | None = None,
    activation: ActivationLike = None,
) -> Array:
    """y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual), var the biased variance.

    Layer Normalization (Ba, Kiros, Hinton 2016, arXiv:1607.06450).

    >>> layer_norm([[1.0, 3.0]], 2, eps=0.0)
    array([[-1.,  1.]])
    """
    norm = _LayerNorm("layer_norm", x, normalized_shape, weight, bias, eps, residual, activation)
    return norm.forward()


@propagate_non_finite
def layer_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    normalized_shape: NormalizedShape,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    residual: ArrayLike | None = None,
    activation: ActivationLike = None,
) -> Gradients:
    """The gradients of sum(dy * layer_norm(...)): dx, and dresidual, dweight, dbias of what was given."""
    norm = _LayerNorm("layer_norm", x, normalized_shape, weight, bias, eps, residual, activation)
    return norm.backward(dy)


@propagate_non_finite
def rms_norm(
    x: ArrayLike,
    normalized_shape: NormalizedShape,
    weight: ArrayLike | None = None,
    eps: float | None = None,
    *,
    residual: ArrayLike | None = None,
    activation: ActivationLike = None,
) -> Array:
    """y = activation(x / sqrt(mean(x^2) + eps) * weight + residual); eps=None is `rms_norm_eps` of x's dtype.

    Root Mean Square Layer Normalization (Zhang, Sennrich 2019, arXiv:1910.07467).

    >>> rms_norm([[1.0, 7.0]], 2, eps=0.0)
    array([[0.2, 1.4]])
    """
    eps = rms_norm_eps(np.asarray(x).dtype) if eps is None else eps
    norm = _RMSNorm("rms_norm", x, normalized_shape, weight, None, eps, residual, activation)
    return norm.forward()


@propagate_non_finite
def rms_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    normalized_shape: NormalizedShape,
    weight: ArrayLike | None = None,
    eps: float | None = None,
    *,
    residual: ArrayLike | None = None,
    activation: ActivationLike = None,
) -> Gradients:
    """The gradients of sum(dy * rms_norm(...)): dx, and dresidual, dweight of what was given."""
    eps = rms_norm_eps(np.asarray(x).dtype) if eps is None else eps
    norm = _RMSNorm("rms_norm", x, normalized_shape, weight, None, eps, residual, activation)
    return norm.backward(dy)


@propagate_non_finite
def add_layer_norm(
    x: ArrayLike,
    residual: ArrayLike,
    normalized_shape: NormalizedShape,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    activation: ActivationLike = None,
    dropout_p: float = 0.0,
    training: bool = True,
    keep: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """(y, total): total = residual + dropout(x), y = layer_norm(total, ..., activation=activation).

    dropout(x) = x * keep / (1 - dropout_p) while training, with its mask `keep` of x's shape; otherwise x.
    """
    total, _ = total_of("add_layer_norm", x, residual, dropout_p, training, keep)
    norm = _LayerNorm("add_layer_norm", total, normalized_shape, weight, bias, eps, None, activation)
    return norm.forward(), total


@propagate_non_finite
def add_layer_norm_backward(
    dy: ArrayLike | None,
    dtotal: ArrayLike | None,
    x: ArrayLike,
    residual: ArrayLike,
    normalized_shape: NormalizedShape,
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
    total, factor = total_of("add_layer_norm", x, residual, dropout_p, training, keep)
    norm = _LayerNorm("add_layer_norm", total, normalized_shape, weight, bias, eps, None, activation)
    return norm.add_backward(dy, dtotal, factor)


@propagate_non_finite
def add_rms_norm(
    x: ArrayLike,
    residual: ArrayLike,
    normalized_shape: NormalizedShape,
    weight: ArrayLike | None = None,
    eps: float | None = None,
    *,
    activation: ActivationLike = None,
    dropout_p: float = 0.0,
    training: bool = True,
    keep: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """(y, total): total = residual + dropout(x), y = rms_norm(total, ..., activation=activation).

    eps=None is `rms_norm_eps` of the dtype that residual + x has.
    dropout(x) = x * keep / (1 - dropout_p) while training, with its mask `keep` of x's shape; otherwise x.
    """
    eps = rms_norm_eps(np.asarray(x).dtype, np.asarray(residual).dtype) if eps is None else eps
    total, _ = total_of("add_rms_norm", x, residual, dropout_p, training, keep)
    norm = _RMSNorm("add_rms_norm", total, normalized_shape, weight, None, eps, None, activation)
    return norm.forward(), total


@propagate_non_finite
def add_rms_norm_backward(
    dy: ArrayLike | None,
    dtotal: ArrayLike | None,
    x: ArrayLike,
    residual: ArrayLike,
    normalized_shape: NormalizedShape,
    weight: ArrayLike | None = None,
    eps: float | None = None,
    *,
    activation: ActivationLike = None,
    dropout_p: float = 0.0,
    training: bool = True,
    keep: ArrayLike | None = None,
) -> Gradients:
    """The gradients of sum(dy * y) + sum(dtotal * total): dx, dresidual; dweight if weight was given.

    None for dy or dtotal says that no gradient arrived there.
    """
    eps = rms_norm_eps(np.asarray(x).dtype, np.asarray(residual).dtype) if eps is None else eps
    total, factor = total_of("add_rms_norm", x, residual, dropout_p, training, keep)
    norm = _RMSNorm("add_rms_norm", total, normalized_shape, weight, None, eps, None, activation)
    return norm.add_backward(dy, dtotal, factor)
