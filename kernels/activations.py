"""Each activation as device code: its value, its slope, and a table of both at the end.

``value(z, alpha, beta)`` and ``slope(z, alpha, beta)`` work on float32 or float64 tiles; ``alpha`` and ``beta`` are
run-time scalars of the same type, so that a new parameter never compiles a kernel anew. Every formula is arranged so
that no intermediate overflows and so that small results keep their relative accuracy, down to where exp of the argument
is the smallest normal number.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

# They stand to the right of a tensor: interpreted, a constexpr times a tensor is a constexpr, which builtins refuse.
_SQRT_HALF = tl.constexpr(0.7071067811865476)  # 1 / sqrt(2)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
_INV_SQRT_2_PI = tl.constexpr(0.3989422804014327)  # height of the normal density at 0
_GELU_CUBIC = tl.constexpr(0.044715)  # Hendrycks and Gimpel's fit
_SELU_SCALE = tl.constexpr(1.0507009873554805)
_SELU_ALPHA = tl.constexpr(1.6732632423543772)
_LOG2_E = tl.constexpr(1.4426950408889634)


# --- numerically careful building blocks ---------------------------------------------------------------------------


@triton.jit
def _exp(v):
    """exp(v). In float32 a GPU makes 0 of what is below the smallest normal number, v < -87.3: to keep it takes five
    instructions where these are two, as exact."""
    if v.dtype == tl.float64:
        return tl.exp(v)
    else:
        return tl.math.exp2(v * _LOG2_E)


@triton.jit
def _reciprocal(u):
    """1 / u for u >= 1. In float32 a division takes eight instructions, which look at the range of u; this is 0 where
    u * u overflows."""
    if u.dtype == tl.float64:
        return 1.0 / u
    else:
        return tl.math.rsqrt(u * u)


@triton.jit
def _expm1_nonpositive(v):
    """exp(v) - 1 for v <= 0 (other lanes: any finite or NaN value), without cancellation near 0."""
    e = _exp(v)
    if v.dtype == tl.float64:
        # Kahan: the rounding error of exp cancels between numerator and log.
        safe = tl.where((e == 1.0) | (e == 0.0), 0.5, e)
        near = (safe - 1.0) * v / tl.log(safe)
        near = tl.where(e == 1.0, v, near)
        return tl.where(e == 0.0, -1.0, near)
    else:
        # Taylor to v^8: relative error under 2^-24 for |v| <= 1/2, where exp(v) - 1 would lose bits.
        p = v * (1.0 / 40320) + (1.0 / 5040)
        p = p * v + (1.0 / 720)
        p = p * v + (1.0 / 120)
        p = p * v + (1.0 / 24)
        p = p * v + (1.0 / 6)
        p = p * v + 0.5
        return tl.where(v > -0.5, p * v * v + v, e - 1.0)


@triton.jit
def _log1p_unit(e):
    """log(1 + e) for 0 <= e <= 1."""
    if e.dtype == tl.float64:
        u = 1.0 + e
        return tl.log(u) + (e - (u - 1.0)) / u  # the first-order remainder that rounding 1 + e lost
    else:
        # 2 atanh(s), of which log takes twice the registers. The terms left out are under 2^-26 of it.
        s = e * _reciprocal(e + 2.0)
        w = s * s
        p = w * (1.0 / 13) + (1.0 / 11)
        p = p * w + (1.0 / 9)
        p = p * w + (1.0 / 7)
        p = p * w + (1.0 / 5)
        p = p * w + (1.0 / 3)
        return (p * w * s + s) * 2.0


@triton.jit
def _sigmoid(z):
    e = _exp(-tl.abs(z))
    return tl.where(z >= 0, 1.0, e) * _reciprocal(1.0 + e)


@triton.jit
def _sigmoid_and_slope(z):
    """sigmoid(z) and sigmoid(z) * sigmoid(-z): 1 - sigmoid(z) would cancel for large z."""
    e = _exp(-tl.abs(z))
    inv = _reciprocal(1.0 + e)
    return tl.where(z >= 0, 1.0, e) * inv, e * inv * inv


@triton.jit
def _tanh(z):
    v = -2.0 * tl.abs(z)
    m = _expm1_nonpositive(v)
    e = _exp(v)
    # Near 0 by expm1, so that nothing cancels; near 1 as its distance from 1, whose rounding errors are small.
    t = tl.where(v > -2.0, -m * _reciprocal(m + 2.0), 1.0 - 2.0 * e * _reciprocal(1.0 + e))
    return tl.where(z < 0, -t, t)


# --- activations: value, then slope --------------------------------------------------------------------------------
# Where the slope takes but two values, `passes` stands in its place: true where the slope is 1, false where it is
# `alpha` (0 for relu and relu6), so that one bit an element is all that backward needs. Comparisons are written so
# that a NaN gets the value and the slope that torch gives it.


@triton.jit
def relu_passes(z):
    return ~(z <= 0)


@triton.jit
def relu_value(z, alpha, beta):
    return tl.where(z <= 0, 0.0, z)


@triton.jit
def relu6_passes(z):
    return ~((z <= 0) | (z >= 6))


@triton.jit
def relu6_value(z, alpha, beta):
    return tl.where(z <= 0, 0.0, tl.where(z >= 6, 6.0, z))


@triton.jit
def leaky_relu_passes(z):
    return z > 0


@triton.jit
def leaky_relu_value(z, alpha, beta):
    return tl.where(z > 0, z, z * alpha)


@triton.jit
def elu_value(z, alpha, beta):
    return tl.where(z > 0, z, alpha * _expm1_nonpositive(z))


@triton.jit
def elu_slope(z, alpha, beta):
    return tl.where(z <= 0, alpha * _exp(z), 1.0)


@triton.jit
def selu_value(z, alpha, beta):
    return tl.where(z > 0, z, _expm1_nonpositive(z) * _SELU_ALPHA) * _SELU_SCALE


@triton.jit
def selu_slope(z, alpha, beta):
    return tl.where(z <= 0, _exp(z) * _SELU_ALPHA, 1.0) * _SELU_SCALE


@triton.jit
def _normal_cdf(z):
    """The probability that a standard normal number is below z, and exp(-z * z / 2)."""
    bell = _exp(z * z * -0.5)
    if z.dtype == tl.float64:
        return 0.5 * (1.0 + tl.math.erf(z * _SQRT_HALF)), bell
    else:
        # What is outside of |z| over the bell is a polynomial in 1 / (1 + |z| / sqrt(8)), whose fit is off by 6e-8 and
        # by 4e-6 of what is outside, at most: half the instructions of erf, and no difference from 1 where z < 0.
        t = _reciprocal(tl.abs(z) * (0.5 * _SQRT_HALF) + 1.0)
        p = t * 0.04484871382035144 - 0.1802712425416265
        p = p * t + 0.19612335046585402
        p = p * t + 0.018779289053761628
        p = p * t + 0.14045494729527067
        p = p * t + 0.1389122298195749
        p = p * t + 0.14115276662302684
        outside = p * t * bell
        return tl.where(z < 0, outside, 1.0 - outside), bell


@triton.jit
def gelu_value(z, alpha, beta):
    below, _ = _normal_cdf(z)
    return z * below


@triton.jit
def gelu_slope(z, alpha, beta):
    below, bell = _normal_cdf(z)
    return below + z * (bell * _INV_SQRT_2_PI)


# 0.5 * (1 + tanh(u)) is sigmoid(2 * u), whose slope has a form in which nothing cancels.


@triton.jit
def _twice_gelu_tanh_argument(z):
    return (z + z * z * z * _GELU_CUBIC) * (2.0 * _SQRT_2_OVER_PI)


@triton.jit
def gelu_tanh_value(z, alpha, beta):
    return z * _sigmoid(_twice_gelu_tanh_argument(z))


@triton.jit
def gelu_tanh_slope(z, alpha, beta):
    s, ds = _sigmoid_and_slope(_twice_gelu_tanh_argument(z))
    return s + z * ds * ((z * z * (3.0 * _GELU_CUBIC) + 1.0) * (2.0 * _SQRT_2_OVER_PI))


@triton.jit
def silu_value(z, alpha, beta):
    return z * _sigmoid(z)


@triton.jit
def silu_slope(z, alpha, beta):
    s, ds = _sigmoid_and_slope(z)
    return s + z * ds


@triton.jit
def sigmoid_value(z, alpha, beta):
    return _sigmoid(z)


@triton.jit
def sigmoid_slope(z, alpha, beta):
    _, ds = _sigmoid_and_slope(z)
    return ds


@triton.jit
def tanh_value(z, alpha, beta):
    return _tanh(z)


@triton.jit
def tanh_slope(z, alpha, beta):
    _, ds = _sigmoid_and_slope(2.0 * z)
    return 4.0 * ds


@triton.jit
def mish_value(z, alpha, beta):
    # tanh(softplus(z)) = n(n + 2) / (n(n + 2) + 2), n = exp(z); for z > 0 expanded by exp(-2z): nothing overflows.
    e = _exp(-tl.abs(z))
    numerator = tl.where(z > 0, 1.0 + 2.0 * e, e * (e + 2.0))
    return z * (numerator * _reciprocal(numerator + tl.where(z > 0, 2.0 * e * e, 2.0)))


@triton.jit
def mish_slope(z, alpha, beta):
    e = _exp(-tl.abs(z))
    numerator = tl.where(z > 0, 1.0 + 2.0 * e, e * (e + 2.0))
    inv = _reciprocal(numerator + tl.where(z > 0, 2.0 * e * e, 2.0))
    gate_slope = 4.0 * (1.0 + e) * tl.where(z > 0, e * e, e) * inv * inv
    return numerator * inv + z * gate_slope


@triton.jit
def hardswish_value(z, alpha, beta):
    return z * (tl.minimum(tl.maximum(z + 3.0, 0.0), 6.0) * (1.0 / 6.0))


@triton.jit
def hardswish_slope(z, alpha, beta):
    return tl.where(z <= -3, 0.0, tl.where(z < 3, z * (1.0 / 3.0) + 0.5, 1.0))


@triton.jit
def hardsigmoid_value(z, alpha, beta):
    return tl.where(z <= -3, 0.0, tl.where(z >= 3, 1.0, (z + 3.0) * (1.0 / 6.0)))


@triton.jit
def hardsigmoid_slope(z, alpha, beta):
    # Of two plain numbers tl.where would make float32.
    return tl.where((z > -3) & (z < 3), tl.full((), 1.0 / 6.0, z.dtype), 0.0)


@triton.jit
def softplus_value(z, alpha, beta):
    t = z * alpha
    soft = (tl.where(t > 0, t, 0.0) + _log1p_unit(_exp(-tl.abs(t)))) / alpha
    return tl.where(t > beta, z, soft)


@triton.jit
def softplus_slope(z, alpha, beta):
    t = z * alpha
    return tl.where(t > beta, 1.0, _sigmoid(t))


class Activation(NamedTuple):
    """Device functions of one activation: its value and either its slope or, where that takes two values, `passes`."""

    value: Any = None
    slope: Any = None
    passes: Any = None


ACTIVATIONS: dict[str | None, Activation] = {
    None: Activation(),
    "relu": Activation(relu_value, passes=relu_passes),
    "relu6": Activation(relu6_value, passes=relu6_passes),
    "leaky_relu": Activation(leaky_relu_value, passes=leaky_relu_passes),
    "elu": Activation(elu_value, elu_slope),
    "selu": Activation(selu_value, selu_slope),
    "gelu": Activation(gelu_value, gelu_slope),
    "gelu_tanh": Activation(gelu_tanh_value, gelu_tanh_slope),
    "silu": Activation(silu_value, silu_slope),
    "sigmoid": Activation(sigmoid_value, sigmoid_slope),
    "tanh": Activation(tanh_value, tanh_slope),
    "mish": Activation(mish_value, mish_slope),
    "hardswish": Activation(hardswish_value, hardswish_slope),
    "hardsigmoid": Activation(hardsigmoid_value, hardsigmoid_slope),
    "softplus": Activation(softplus_value, softplus_slope),
}
