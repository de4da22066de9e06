"""Each activation: its value and its slope side by side, and one table at the end.

Slopes at kinks and at NaN are those of torch 2.13. There torch's vectorized CPU loops and their scalar tails
disagree at NaN (relu6: 0 or 1, elu: NaN or 1, selu: NaN or scale, hardswish: NaN or 1); the scalar tail has
the formula of torch's CUDA kernels, and it is the one taken here. At -Inf torch's gelu, gelu_tanh, silu, mish
and hardswish are 0 * Inf = NaN, and so they are here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

from .arrays import Array, float64, propagate_non_finite

SELU_SCALE = 1.0507009873554804934193349852946
SELU_ALPHA = 1.6732632423543772848170429916717
SQRT_HALF = math.sqrt(0.5)
SQRT_TWO_OVER_PI = math.sqrt(2.0 / math.pi)

_erfc = np.vectorize(math.erfc, otypes=[np.float64])


def relu(x: Array) -> Array:
    return np.maximum(x, 0.0)


def relu_slope(x: Array) -> Array:
    return np.where(x <= 0.0, 0.0, 1.0)


def relu6(x: Array) -> Array:
    return np.clip(x, 0.0, 6.0)


def relu6_slope(x: Array) -> Array:
    return np.where((x <= 0.0) | (x >= 6.0), 0.0, 1.0)


def leaky_relu(x: Array, negative_slope: float) -> Array:
    return np.where(x > 0.0, x, negative_slope * x)


def leaky_relu_slope(x: Array, negative_slope: float) -> Array:
    return np.where(x > 0.0, 1.0, negative_slope)


def elu(x: Array, alpha: float) -> Array:
    return np.where(x <= 0.0, alpha * np.expm1(np.minimum(x, 0.0)), x)


def elu_slope(x: Array, alpha: float) -> Array:
    return np.where(x <= 0.0, alpha * np.exp(np.minimum(x, 0.0)), 1.0)


def selu(x: Array) -> Array:
    return SELU_SCALE * elu(x, SELU_ALPHA)


def selu_slope(x: Array) -> Array:
    return SELU_SCALE * elu_slope(x, SELU_ALPHA)


def _normal_cdf(x: Array) -> Array:
    # erfc keeps the digits that 1 + erf cancels for negative x.
    return np.asarray(0.5 * _erfc(-SQRT_HALF * x))


def gelu(x: Array) -> Array:
    return x * _normal_cdf(x)


def gelu_slope(x: Array) -> Array:
    density = np.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
    return _normal_cdf(x) + x * density


def _gelu_tanh_argument(x: Array) -> Array:
    # 0.5 * (1 + tanh(u)) is sigmoid(2 u), which keeps the digits that 1 + tanh cancels.
    return 2.0 * SQRT_TWO_OVER_PI * (x + 0.044715 * x**3)


def gelu_tanh(x: Array) -> Array:
    return x * sigmoid(_gelu_tanh_argument(x))


def gelu_tanh_slope(x: Array) -> Array:
    u = _gelu_tanh_argument(x)
    du = 2.0 * SQRT_TWO_OVER_PI * (1.0 + 3.0 * 0.044715 * x**2)
    return sigmoid(u) + x * sigmoid_slope(u) * du


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def silu_slope(x: Array) -> Array:
    return sigmoid(x) * (1.0 + x * sigmoid(-x))


def sigmoid(x: Array) -> Array:
    # exp of minus the absolute value cannot overflow.
    decay = np.exp(-np.abs(x))
    return np.where(x >= 0.0, 1.0, decay) / (1.0 + decay)


def sigmoid_slope(x: Array) -> Array:
    return sigmoid(x) * sigmoid(-x)


def tanh(x: Array) -> Array:
    return np.tanh(x)


def tanh_slope(x: Array) -> Array:
    return 1.0 - np.tanh(x) ** 2


def mish(x: Array) -> Array:
    return x * np.tanh(np.logaddexp(0.0, x))


def mish_slope(x: Array) -> Array:
    t = np.tanh(np.logaddexp(0.0, x))
    return t + x * (1.0 - t * t) * sigmoid(x)


def hardswish(x: Array) -> Array:
    return x * np.clip(x + 3.0, 0.0, 6.0) / 6.0


def hardswish_slope(x: Array) -> Array:
    return np.where(x <= -3.0, 0.0, np.where(x < 3.0, x / 3.0 + 0.5, 1.0))


def hardsigmoid(x: Array) -> Array:
    return np.clip(x + 3.0, 0.0, 6.0) / 6.0


def hardsigmoid_slope(x: Array) -> Array:
    return np.where((x > -3.0) & (x < 3.0), 1.0 / 6.0, 0.0)


def softplus(x: Array, beta: float, threshold: float) -> Array:
    return np.where(beta * x > threshold, x, np.logaddexp(0.0, beta * x) / beta)


def softplus_slope(x: Array, beta: float, threshold: float) -> Array:
    return np.where(beta * x > threshold, 1.0, sigmoid(beta * x))


def identity(x: Array) -> Array:
    return x.copy()


def identity_slope(x: Array) -> Array:
    return np.ones_like(x)


class Rule(NamedTuple):
    value: Callable[..., Array]
    slope: Callable[..., Array]
    defaults: Mapping[str, float] = {}


ACTIVATIONS: Mapping[str, Rule] = {
    "relu": Rule(relu, relu_slope),
    "relu6": Rule(relu6, relu6_slope),
    "leaky_relu": Rule(leaky_relu, leaky_relu_slope, {"negative_slope": 0.01}),
    "elu": Rule(elu, elu_slope, {"alpha": 1.0}),
    "selu": Rule(selu, selu_slope),
    "gelu": Rule(gelu, gelu_slope),
    "gelu_tanh": Rule(gelu_tanh, gelu_tanh_slope),
    "silu": Rule(silu, silu_slope),
    "sigmoid": Rule(sigmoid, sigmoid_slope),
    "tanh": Rule(tanh, tanh_slope),
    "mish": Rule(mish, mish_slope),
    "hardswish": Rule(hardswish, hardswish_slope),
    "hardsigmoid": Rule(hardsigmoid, hardsigmoid_slope),
    "softplus": Rule(softplus, softplus_slope, {"beta": 1.0, "threshold": 20.0}),
}


class NamedActivation(Protocol):
    """What `activation=` takes beside a name: `fused_ops.Activation`, or anything with its two attributes."""

    @property
    def name(self) -> str: ...

    @property
    def parameters(self) -> Mapping[str, float]: ...


ActivationLike = str | NamedActivation | None


def resolve(activation: ActivationLike) -> tuple[Rule, dict[str, float]]:
    """The rule of `activation` and all its parameters; ValueError for an unknown name or parameter."""
    if activation is None:
        return Rule(identity, identity_slope), {}
    name = activation if isinstance(activation, str) else getattr(activation, "name", None)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown; the known ones are {', '.join(ACTIVATIONS)}")
    rule = ACTIVATIONS[name]
    given = {} if isinstance(activation, str) else dict(activation.parameters)
    unknown = [parameter for parameter in given if parameter not in rule.defaults]
    if unknown:
        known = ", ".join(rule.defaults) or "none"
        raise ValueError(f"activation {name!r} has no parameter {', '.join(unknown)}; known ones: {known}")
    return rule, {**rule.defaults, **given}


@propagate_non_finite
def activation_value(x: ArrayLike, activation: ActivationLike) -> Array:
    """activation(x), elementwise, in float64.

    `activation` is None (the identity), a name of `ACTIVATIONS`, or an object with `name` and `parameters`.
    Raises ValueError, naming the known ones, for any other.

    >>> activation_value([-2.0, 3.0], "relu")
    array([0., 3.])
    """
    rule, parameters = resolve(activation)
    return rule.value(float64(x), **parameters)


@propagate_non_finite
def activation_slope(x: ArrayLike, activation: ActivationLike) -> Array:
    """d activation(x) / dx, elementwise, in float64: the factor that takes dy to dx.

    `activation` as in `activation_value`.

    >>> activation_slope([-2.0, 3.0], "relu")
    array([0., 1.])
    """
    rule, parameters = resolve(activation)
    return rule.slope(float64(x), **parameters)
