"""y = activation(weight * x_hat + bias + residual), and its gradient: what follows every norm."""

from __future__ import annotations

from .activations import ActivationLike, activation_slope, activation_value
from .arrays import Array, sum_to


def pre_activation(x_hat: Array, weight: Array | None, bias: Array | None, residual: Array | None) -> Array:
    """weight * x_hat + bias + residual, where what is None falls away; weight and bias broadcast to x_hat."""
    z = x_hat if weight is None else x_hat * weight
    z = z if bias is None else z + bias
    return z if residual is None else z + residual


def epilogue(
    x_hat: Array, weight: Array | None, bias: Array | None, residual: Array | None, activation: ActivationLike
) -> Array:
    return activation_value(pre_activation(x_hat, weight, bias, residual), activation)


def epilogue_backward(
    dy: Array,
    x_hat: Array,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    activation: ActivationLike,
) -> tuple[Array, dict[str, Array]]:
    """(dx_hat, gradients): gradients holds dresidual, dweight, dbias, each where its argument was given."""
    dz = dy * activation_slope(pre_activation(x_hat, weight, bias, residual), activation)
    gradients: dict[str, Array] = {}
    if residual is not None:
        gradients["dresidual"] = dz
    if weight is not None:
        gradients["dweight"] = sum_to(dz * x_hat, weight.shape)
    if bias is not None:
        gradients["dbias"] = sum_to(dz, bias.shape)
    return dz if weight is None else dz * weight, gradients
